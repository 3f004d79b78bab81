"""GenEval's rule engine: from detected objects and a prompt's metadata to correct / not correct, with the reason.

The rules of Ghosh et al., "GenEval" (arXiv 2310.11513), restated: every `include` clause must hold, no `exclude` clause may. A clause
asks for `count` objects of a class, optionally all of one colour, optionally all in one relation to an earlier clause's objects.
Real GenEval and the shapes world both judge with this file; they differ in the detector and in `Limits` alone.

Boxes are (x1, y1, x2, y2) in pixels, y downward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One detected object. `mask` is whatever the colour classifier needs; the rules never look at it."""

    box: Box
    score: float
    mask: object = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Limits:
    """Which detections count. The defaults are upstream's options and their defaults.

    threshold / counting_threshold: the score must be greater than this (the second for prompts tagged "counting").
    max_objects: at most this many per class, before suppression. max_overlap: 1.0 keeps all, otherwise greedy NMS at this IoU.
    position_threshold: how far centres must be apart, as a fraction of the summed sizes.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


@dataclass(frozen=True)
class Verdict:
    """The judgement of one image: `reason` is empty where `correct` is true, else one line per failed clause."""

    correct: bool
    reason: str


def relative_position(box: Box, target: Box, position_threshold: float = 0.1) -> tuple[str, ...]:
    """Relations of `box` to `target`, in the order of RELATIONS; two can hold at once, none when the centres are too close."""
    offset, revised = [], []
    for axis in (0, 1):
        delta = (box[axis] + box[axis + 2]) / 2 - (target[axis] + target[axis + 2]) / 2
        slack = position_threshold * (abs(box[axis + 2] - box[axis]) + abs(target[axis + 2] - target[axis]))
        offset.append(delta)
        revised.append(math.copysign(max(abs(delta) - slack, 0.0), delta))
    if all(abs(r) < 1e-3 for r in revised):
        return ()
    length = math.hypot(*offset)
    dx, dy = revised[0] / length, revised[1] / length
    held = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return tuple(name for name, holds in zip(RELATIONS, held, strict=True) if holds)


def iou(a: Box, b: Box) -> float:
    """Intersection over union with upstream's convention that a box covers its last pixel (+1 in width and height)."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + 1, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + 1, 0)
    intersection = width * height
    areas = [max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0) for box in (a, b)]
    return intersection / (areas[0] + areas[1] - intersection) if intersection else 0.0


@lru_cache
def _float32_at(threshold: float) -> tuple[float, float]:
    """The threshold as float32, and the next float32 above it."""
    at = np.float32(threshold)
    return float(at), float(np.nextafter(at, np.float32(np.inf)))


def keep(detections: Sequence[Detection], threshold: float, limits: Limits) -> list[Detection]:
    """Detections of one class that count, most confident first: score cut (in float32, as upstream), cap, then greedy NMS."""
    at, above = _float32_at(threshold)
    # Only a float64 between two neighbouring float32 has to be rounded to tell.
    confident = [d for d in detections if d.score >= above or (d.score > at and np.float32(d.score) > at)]
    if len(confident) > 1:
        confident.sort(key=lambda d: -d.score)
    confident = confident[: limits.max_objects]
    if limits.max_overlap == 1.0:
        return confident
    kept: list[Detection] = []
    for candidate in confident:
        if all(iou(candidate.box, other.box) < limits.max_overlap for other in kept):
            kept.append(candidate)
    return kept


ColorClassifier = Callable[[str, Sequence[Detection]], Sequence[str]]


def evaluate(
    metadata: Mapping,
    objects: Mapping[str, Sequence[Detection]],
    classify_colors: ColorClassifier,
    position_threshold: float = 0.1,
) -> Verdict:
    """Judge one image. `objects`: kept detections per class, best first; `classify_colors(class, detections)` names their colours."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = list(objects.get(name, ()))[:count]
        reason = _check_clause(clause, found, groups, classify_colors, position_threshold)
        groups.append(None if reason else found)
        if reason:
            reasons.append(reason)
    for clause in metadata.get("exclude", ()):
        found = len(objects.get(clause["class"], ()))
        if found >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return Verdict(not reasons, "\n".join(reasons))


def judge(metadata: Mapping, detections: Mapping[str, Sequence[Detection]], classify_colors: ColorClassifier, limits: Limits) -> Verdict:
    """Cut the raw detections by `limits` (the counting threshold where the tag asks for it), then `evaluate`."""
    threshold = limits.counting_threshold if metadata.get("tag") == "counting" else limits.threshold
    objects = {name: keep(found, threshold, limits) for name, found in detections.items()}
    return evaluate(metadata, {k: v for k, v in objects.items() if v}, classify_colors, limits.position_threshold)


def _check_clause(
    clause: Mapping,
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    classify_colors: ColorClassifier,
    position_threshold: float,
) -> str:
    """Why the clause fails, or the empty string."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        seen = list(classify_colors(name, found))
        matching = seen.count(clause["color"])
        if matching < count:
            counts = ", ".join(f"{seen.count(c)} {c}" for c in COLORS if c in seen)
            return f"expected {clause['color']} {name}>={count}, found {matching} {clause['color']}; and {counts}"
    if "position" in clause:
        relation, index = clause["position"]
        targets = groups[index]
        if targets is None:
            return f"no target for {name} to be {relation}"
        for thing in found:
            for target in targets:
                relations = relative_position(thing.box, target.box, position_threshold)
                if relation not in relations:
                    return f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return ""
