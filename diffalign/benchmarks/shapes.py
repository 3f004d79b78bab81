"""The shapes benchmark: held-out prompts in GenEval's six tasks, judged by the exact detector that no method optimises.

Rows and summary follow GenEval (Ghosh et al., arXiv 2310.11513): one row per image, overall = the unweighted mean of the task means.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.benchmarks.base import Item, item_seed, limited_to, read_image, require_complete, spread_over_tasks
from diffalign.benchmarks.geneval_rules import keep
from diffalign.shapes import prompts as world
from diffalign.shapes.detector import LIMITS, detect, judge_images


@dataclass(frozen=True)
class ShapesBenchmark:
    """`limit` prompts (None: all) of a split, the same number from each task as far as it goes, with `samples` images each.

    A limited run makes a subset of the full run's items, with the same seeds, so that it can be extended later.
    """

    split: str = "test"
    samples: int = 1
    limit: int | None = None
    seed: int = 0
    name: str = "shapes"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1; got {self.samples}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 prompt; got {self.limit}")

    def items(self) -> list[Item]:
        rows = world.metadata(self.split)
        chosen = spread_over_tasks([row["tag"] for row in rows], self.limit)
        return [
            Item(index, sample, item_seed(self.seed, index, sample), rows[index]["tag"], rows[index]["prompt"], rows[index])
            for index in chosen
            for sample in range(self.samples)
        ]

    def limited(self) -> str | None:
        """What a figure of fewer than all prompts must be quoted with."""
        return limited_to([row["tag"] for row in world.metadata(self.split)], self.limit)

    def protocol(self) -> dict[str, Any]:
        """What a figure of this run must be quoted with."""
        limited = self.limited()
        head = {"limited": limited} if limited else {"prompts": "all"}
        return {**head, "images per prompt": self.samples, "scorer": "the exact detector of the shapes world"}

    def score(self, folder: Path) -> list[dict[str, Any]]:
        """One row per item with GenEval's keys: filename, tag, prompt, correct, reason, metadata and details as JSON strings.

        Raises FileNotFoundError where images are missing and ValueError where one cannot be read.
        """
        items = self.items()
        require_complete(items, folder)
        rows = []
        for item in items:
            image = read_image(item.image_path(folder))
            (verdict,) = judge_images(image[None], [item.metadata])
            rows.append(
                {
                    "filename": item.name,
                    "tag": item.task,
                    "prompt": item.prompt,
                    "correct": verdict.correct,
                    "reason": verdict.reason,
                    "metadata": json.dumps(item.metadata),
                    "details": json.dumps(_details(image, item.task)),
                }
            )
        return rows


def _details(image: np.ndarray, task: str) -> dict[str, list[list[float]]]:
    """The objects the judge counted: shape -> [x1, y1, x2, y2, score] each."""
    threshold = LIMITS.counting_threshold if task == "counting" else LIMITS.threshold
    kept = {shape: keep(found, threshold, LIMITS) for shape, found in detect(image).items()}
    return {shape: [[*d.box, round(d.score, 4)] for d in found] for shape, found in kept.items() if found}
