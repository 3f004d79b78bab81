"""GenEval's judge of single images: any detector and colour classifier under its rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffalign.benchmarks.base import Item, Pixels, Record
from diffalign.benchmarks.geneval.partial_credit import UPSTREAM, partial_credit
from diffalign.rules import Detection, Limits, evaluate, keep

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

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        rows = [item.metadata for item in items]
        return [self.judge(*each) for each in zip(images, rows, self.detector(images), strict=True)]

    def judge(self, image: Pixels, row: Record, found: Mapping[str, Sequence[Detection]]) -> Record:
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
