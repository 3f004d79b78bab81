"""The shapes benchmark: held-out prompts in GenEval's six tasks, or the hard tier's three, judged by the detector that no method optimises.

Rows and summary follow GenEval (Ghosh et al., arXiv 2310.11513): one row per image, overall = the unweighted mean of the task means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.benchmarks.base import Item, item_seed, limited_to, read_image, require_complete, spread_over_tasks
from diffalign.rules import Detection, keep
from diffalign.shapes import hard
from diffalign.shapes import prompts as world
from diffalign.shapes.detector import LIMITS, detect, judge_found

SPLITS = (*world.SPLITS, hard.TIER)
ZERO_SHOT = "the models have read no list of three kinds and no 'that is not'"


@dataclass(frozen=True)
class ShapesBenchmark:
    """`limit` prompts (None: all) of one of SPLITS, the same number from each task as far as it goes, with `samples` images each.

    A limited run makes a subset of the full run's items, with the same seeds, so that it can be extended later.
    """

    split: str = "test"
    samples: int = 1
    limit: int | None = None
    seed: int = 0
    name: str = "shapes"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {self.split!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1; got {self.samples}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 prompt; got {self.limit}")

    def items(self) -> list[Item]:
        rows = self.rows()
        chosen = spread_over_tasks([row["tag"] for row in rows], self.limit)
        return [
            Item(index, sample, item_seed(self.seed, index, sample), rows[index]["tag"], rows[index]["prompt"], rows[index])
            for index in chosen
            for sample in range(self.samples)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the split, in GenEval's metadata schema."""
        return hard.metadata() if self.split == hard.TIER else world.metadata(self.split)

    def limited(self) -> str | None:
        """What a figure of fewer than all prompts must be quoted with."""
        return limited_to([row["tag"] for row in self.rows()], self.limit)

    def protocol(self) -> dict[str, Any]:
        """What a figure of this run must be quoted with."""
        limited = self.limited()
        head = {"limited": limited} if limited else {"prompts": "all"}
        if self.split == hard.TIER:
            head["zero-shot"] = ZERO_SHOT
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
            found = detect(image)
            verdict = judge_found(image, found, item.metadata)
            rows.append(
                {
                    "filename": item.name,
                    "tag": item.task,
                    "prompt": item.prompt,
                    "correct": verdict.correct,
                    "reason": verdict.reason,
                    "metadata": json.dumps(item.metadata),
                    "details": json.dumps(_details(found, item.task)),
                }
            )
        return rows


def _details(found: Mapping[str, Sequence[Detection]], task: str) -> dict[str, list[list[float]]]:
    """The objects the judge counted: shape -> [x1, y1, x2, y2, score] each."""
    threshold = LIMITS.counting_threshold if task == "counting" else LIMITS.threshold
    kept = {shape: keep(those, threshold, LIMITS) for shape, those in found.items()}
    return {shape: [[*d.box, round(d.score, 4)] for d in those] for shape, those in kept.items() if those}
