"""Draws the README's picture: a prompt of each task before and after ReNO on the embedded one-step model, each with the judge's verdict.

`python scripts/readme_picture.py` writes docs/images/readme_grid.png in a minute or two on one core. The prompts are drawn from the test
split by --seed, one of each task, before any image is made; none is chosen by its result.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import diffalign
from diffalign.files import whole_file
from diffalign.reports.plots import Pair, grid
from diffalign.shapes import prompts
from diffalign.shapes.detector import judge_image

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "readme_grid.png"
SIDE, COLUMNS = 192, 2  # three times an image's own pixels; about as wide as a page of the repository is shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pipeline", default="shapes-turbo", help="an embedded model of one step (default: %(default)s)")
    parser.add_argument("--reward", default="shapes-reward", help="what ReNO climbs (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=50, help="evaluations for each image (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the noises (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    began = time.monotonic()
    rows = draw(prompts.metadata("test"), np.random.default_rng(args.seed))
    texts = [row["prompt"] for row in rows]
    pipeline = diffalign.load_pipeline(args.pipeline, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    method = diffalign.ReNO(diffalign.load_reward({args.reward: 1.0}, device="cpu"), budget=args.budget)
    out = pipeline(texts, seed=[args.seed + i for i in range(len(texts))], plugins=[method])
    pairs = []
    for i, row in enumerate(rows):
        images = (out.initial_images[i], out.images[i])
        pairs.append(Pair(row["prompt"], *images, *(judge_image(np.asarray(image), row).correct for image in images)))
    with whole_file(args.out) as temporary:
        grid(pairs, columns=COLUMNS, side=SIDE).save(temporary, format="PNG")
    before, after = (sum(correct) for correct in zip(*((pair.before_correct, pair.after_correct) for pair in pairs), strict=True))
    print(f"{args.out.name}: of {len(pairs)} images the judge accepts {before} before and {after} after; {time.monotonic() - began:.0f} s")


def draw(rows: list[dict], rng: np.random.Generator) -> list[dict]:
    """One prompt of each task, in the order of the tasks."""
    by_task = {task: [row for row in rows if row["tag"] == task] for task in dict.fromkeys(row["tag"] for row in rows)}
    return [candidates[rng.integers(len(candidates))] for candidates in by_task.values()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
