"""The shapes benchmark: held-out prompts in GenEval's six tasks, or the hard tier's three, judged by the detector that no method optimises.

Rows and summary follow GenEval (Ghosh et al., arXiv 2310.11513): one row per image, overall = the unweighted mean of the task means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from diffalign import rules
from diffalign.benchmarks.base import Benchmark, Item, Judgements, Pixels, Prompt, Record, Task, require_counts
from diffalign.benchmarks.context import Context
from diffalign.benchmarks.shapes.options import SPLITS, ShapesOptions
from diffalign.rules import Detection, keep
from diffalign.shapes import detector, hard, scenes
from diffalign.shapes import prompts as world
from diffalign.shapes.detector import LIMITS, detect, judge_found

ZERO_SHOT = "the models have read no list of three kinds and no 'that is not'"


@dataclass(frozen=True)
class ShapesScorer:
    """The judge. Its version is that of its code, so that images are judged anew where that has changed."""

    name: str = "shapes"

    @property
    def version(self) -> str:
        return f"the exact detector of the shapes world, {_code()}"

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        return [self.judge(image, item) for image, item in zip(images, items, strict=True)]

    def judge(self, image: Pixels, item: Item) -> Record:
        found = detect(image)
        verdict = judge_found(image, found, item.metadata)
        return {"correct": verdict.correct, "reason": verdict.reason, "details": _details(found, item.task)}


@cache
def _code() -> str:
    modules = (rules, scenes, detector)
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()[:8]


@dataclass(frozen=True)
class ShapesBenchmark(Benchmark):
    """`limit` prompts (None: all) of one of SPLITS, the same number from each task as far as it goes, with `samples` images each.

    A limited run makes a subset of the full run's items, with the same seeds, so that it can be extended later.
    """

    split: str = "test"
    samples: int = 1
    limit: int | None = None
    seed: int = 0
    batch_size: int = 32
    name: str = "shapes"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {self.split!r}")
        require_counts(self)

    @classmethod
    def build(cls, options: ShapesOptions, context: Context) -> ShapesBenchmark:
        return cls(options.split, context.samples, context.limit, context.seed)

    def prompts(self) -> list[Prompt]:
        return [Prompt(i, row["tag"], row["prompt"], row) for i, row in enumerate(self.rows())]

    def rows(self) -> list[Record]:
        """All rows of the split, in GenEval's metadata schema."""
        return hard.metadata() if self.split == hard.TIER else world.metadata(self.split)

    def tasks(self) -> list[Task]:
        return [Task(ShapesScorer(), self.items())]

    def row(self, item: Item, judged: Judgements) -> Record:
        """GenEval's keys: filename, tag, prompt, correct, reason, metadata and details as JSON strings."""
        ((_, score),) = judged.values()
        return {
            "filename": item.name,
            "tag": item.task,
            "prompt": item.prompt,
            "correct": score["correct"],
            "reason": score["reason"],
            "metadata": json.dumps(item.metadata),
            "details": json.dumps(score["details"]),
        }

    def protocol(self) -> Record:
        limited = self.limited()
        head = {"limited": limited} if limited else {"prompts": "all"}
        if self.split == hard.TIER:
            head["zero-shot"] = ZERO_SHOT
        return {**head, "images per prompt": self.samples, "scorer": "the exact detector of the shapes world"}


def _details(found: Mapping[str, Sequence[Detection]], task: str) -> dict[str, list[list[float]]]:
    """The objects the judge counted: shape -> [x1, y1, x2, y2, score] each."""
    threshold = LIMITS.counting_threshold if task == "counting" else LIMITS.threshold
    kept = {shape: keep(those, threshold, LIMITS) for shape, those in found.items()}
    return {shape: [[*d.box, round(d.score, 4)] for d in those] for shape, those in kept.items() if those}
