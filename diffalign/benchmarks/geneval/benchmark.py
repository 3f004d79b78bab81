"""GenEval from items to official rows: prompts from the recipe, any detector and colour classifier, upstream's layout and results.

Paper: Ghosh et al. (arXiv 2310.11513). Official protocol: 553 prompts, 4 images each, detector Mask2Former Swin-S of mmdet 2.x. Upstream
re-seeds with the same number before every prompt, so that all prompts share four noises; here every image has a seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffalign.benchmarks.base import Item, item_seed, limited_to, spread_over_tasks
from diffalign.benchmarks.geneval.partial_credit import UPSTREAM, partial_credit
from diffalign.benchmarks.geneval.prompts import metadata
from diffalign.benchmarks.geneval.results import result_row
from diffalign.benchmarks.scoring import Fault, Pixels, Task, collect, score_all
from diffalign.rules import Detection, Limits, Verdict, evaluate, keep

SAMPLES = 4  # images per prompt of the official protocol

Detector = Callable[[Sequence[Pixels]], list[dict[str, list[Detection]]]]
Colors = Callable[[Pixels, str, Sequence[Detection]], list[str]]


@dataclass(frozen=True)
class GenEvalScorer:
    """Judges images of items. Each score: "correct", "reason", "details" as upstream, and Flow-GRPO's "partial" and "strict" beside."""

    detector: Detector
    colors: Colors
    version: str
    limits: Limits = UPSTREAM
    name: str = "geneval"

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[dict[str, Any]]:
        rows = [item.metadata for item in items]
        return [self.judge(*each) for each in zip(images, rows, self.detector(images), strict=True)]

    def judge(self, image: Pixels, row: Mapping[str, Any], found: Mapping[str, Sequence[Detection]]) -> dict[str, Any]:
        threshold = self.limits.counting_threshold if row["tag"] == "counting" else self.limits.threshold
        kept = {name: keep(objects, threshold, self.limits) for name, objects in found.items()}
        kept = {name: objects for name, objects in kept.items() if objects}
        classify = remembering(self.colors, image)
        verdict = evaluate(row, kept, classify, self.limits.position_threshold)
        credit = partial_credit(row, found, classify, self.limits)
        details = {name: [[*d.box, d.score] for d in objects] for name, objects in kept.items()}
        return {"correct": verdict.correct, "reason": verdict.reason, "details": details, "partial": credit.score, "strict": credit.strict}


def remembering(colors: Colors, image: Pixels) -> Callable[[str, Sequence[Detection]], list[str]]:
    """The colour classifier of one image, asked once for each object."""
    seen: dict[int, str] = {}

    def classify(name: str, objects: Sequence[Detection]) -> list[str]:
        new = [d for d in objects if id(d) not in seen]
        if new:
            seen.update(zip(map(id, new), colors(image, name, new), strict=True))
        return [seen[id(d)] for d in objects]

    return classify


@dataclass(frozen=True)
class GenEvalBenchmark:
    """`limit` prompts (None: all 553), as many of each task as goes, with `samples` images each.

    source: the user's copy of the prompts, as `geneval_prompts.metadata` takes it; needed where NumPy's random stream has changed.
    Without a scorer it can only say what to generate. With `allow_missing` the rows may be fewer than the items.
    """

    scorer: GenEvalScorer | None = None
    samples: int = SAMPLES
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    allow_missing: bool = False
    source: str | Path | None = None
    name: str = "geneval"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1; got {self.samples}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 prompt; got {self.limit}")

    def items(self) -> list[Item]:
        rows = metadata(self.source)
        return [
            Item(index, sample, item_seed(self.seed, index, sample), rows[index]["tag"], rows[index]["prompt"], rows[index])
            for index in spread_over_tasks([row["tag"] for row in rows], self.limit)
            for sample in range(self.samples)
        ]

    def limited(self) -> str | None:
        """What a figure of fewer than all prompts must be quoted with."""
        return limited_to([row["tag"] for row in metadata(self.source)], self.limit)

    def tasks(self) -> list[Task]:
        """What there is to judge. Raises ValueError without a scorer."""
        if self.scorer is None:
            raise ValueError("judging GenEval needs a detector and a colour classifier; none were given")
        return [Task(self.scorer, self.items())]

    def score(self, folder: Path) -> list[dict[str, Any]]:
        """Judges what has not been judged, and returns upstream's rows in the order of the items.

        Raises FileNotFoundError naming images that are missing or cut short, unless they are allowed.
        """
        return score_all(self, folder)

    def judged(self, folder: Path) -> tuple[list[dict[str, Any]], list[Fault]]:
        """Upstream's rows of what has been judged already, by whichever shard, and what has not."""
        (task,) = self.tasks()
        scores, faults = collect(task, folder)
        return [_row(item, scores[item.name]) for item in task.items if item.name in scores], faults

    def protocol(self) -> dict[str, Any]:
        """What a figure of this run must be quoted with."""
        version = self.scorer.version if self.scorer else None
        limits = asdict(self.scorer.limits) if self.scorer else None
        limited = self.limited()
        head = {"limited": limited} if limited else {"prompts": "553"}
        return {**head, "images per prompt": self.samples, "scorer": version, "limits": limits}


def _row(item: Item, score: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: [Detection(tuple(box[:4]), box[4]) for box in boxes] for name, boxes in score["details"].items()}
    return result_row(item.name, item.metadata, Verdict(score["correct"], score["reason"]), kept)
