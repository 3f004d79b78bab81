"""`diffalign score --audit`: what it writes, on a reward whose answers are known."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from diffalign.cli import main


@pytest.fixture
def folder(tmp_path):
    """Grey squares of different brightness on black."""
    made = tmp_path / "images"
    made.mkdir()
    for i in range(6):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[8:24, 8:24] = 40 + 30 * i
        Image.fromarray(pixels).save(made / f"{i}.png")
    return made


def test_an_audit_is_a_table_a_plot_and_two_files(folder, tmp_path, capsys):
    out = tmp_path / "out"
    rewards = ["brightness", "jpeg-compressibility"]
    code = main(["score", str(folder), "--reward", *rewards, "--prompt", "a square", "--device", "cpu", "--out", str(out), "--audit"])
    assert code == 0
    with (out / "audit.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    stored = json.loads((out / "audit.json").read_text())
    assert stored["images"] == 6
    assert [row["reward"] for row in rows] == [row["reward"] for row in stored["rows"]]
    effects = {(row["reward"], row["kind"], row["amount"]): float(row["effect"]) for row in rows}
    assert effects["brightness", "flip", next(a for r, k, a in effects if k == "flip")] == pytest.approx(0, abs=1e-6)
    brighter = [effect for (reward, kind, _), effect in effects.items() if reward == "brightness" and kind == "brightness"]
    assert min(brighter) < 0 < max(brighter)
    assert Image.open(out / "audit.png").size[0] > 400
    printed = capsys.readouterr().out
    assert "in standard deviations" in printed
    assert "audit.csv" in printed
