"""A folder of images with prompts, and what `diffalign score` made of it: for the tests of the command."""

from __future__ import annotations

import csv
import json

import numpy as np
from PIL import Image

from diffalign.cli import main
from diffalign.files import read_lines

PROMPTS = {"a.png": "a red circle", "b.jpg": "two blue squares", "sub/c.png": "a green star above a red cross", "wide.png": "a red circle"}
SIZES = {"a.png": (64, 64), "b.jpg": (64, 64), "sub/c.png": (96, 96), "wide.png": (40, 100)}
CHEAP = ("brightness", "jpeg-compressibility")
SHAPES = ("shapes-clip", "shapes-preference", "shapes-aesthetic")


def make_images(folder):
    """Two images of one size, one larger, one wide, in two folders, each with its prompt beside it."""
    rng = np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)
    for name, size in SIZES.items():
        path = folder / name
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(PROMPTS[name])
    return folder


def command(capsys, out):
    """A function that runs the command, by default into `out`, and returns (exit code, stdout, stderr)."""

    def run(folder, *arguments, reward=CHEAP, out=out):
        code = main(["score", str(folder), "--reward", *reward, "--device", "cpu", "--out", str(out), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def results(out):
    return json.loads((out / "results.json").read_text())


def scores(out, reward):
    """File -> score, as results.csv has it."""
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: float(row[reward]) for row in csv.DictReader(file) if row[reward]}


def lines(out, reward):
    return read_lines(out / "scores" / f"{reward}.jsonl")
