"""Labelled boxes that T2I-CompBench's rules judge, whoever found them, and reading them from a file of the user's own detector.

The file is JSON: image file name -> list of {"label": "dog", "score": 0.93, "box": [x1, y1, x2, y2]}. Boxes are in the frame in which the
rules measure distances: the image resized so that its short side is FRAME pixels, y downward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.files import read_json
from diffalign.rules import Box

FRAME = 479  # pixels of the short side after the resize of the original detector; distances in the rules are in these pixels
PEOPLE = ("girl", "boy", "man", "woman")  # the label space knows them as "person"


@dataclass(frozen=True)
class Labelled:
    """One detected object. `score` in [0, 1]."""

    label: str
    score: float
    box: Box


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of boxes as areas (no +1), 0 where both are empty."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union else 0.0


def to_frame(box: Box, width: int, height: int) -> Box:
    """A box of an image of `width` x `height` pixels in the frame of the rules."""
    scale = FRAME / min(width, height)
    return (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)


def best_first(objects: Iterable[Labelled]) -> list[Labelled]:
    """By score, the order the rules expect; equal scores keep theirs."""
    return sorted(objects, key=lambda found: -found.score)


def read_detections(path: Path) -> dict[str, list[Labelled]]:
    """The user's detections per image file name, best first. Raises ValueError naming the entry that is wrong."""
    data = read_json(path)
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must hold an object of image name -> list of detections; got {type(data).__name__}")
    return {name: best_first(_read_object(path, name, entry) for entry in entries) for name, entries in data.items()}


def _read_object(path: Path, name: str, entry: Any) -> Labelled:
    try:
        label, score, box = entry["label"], float(entry["score"]), tuple(float(v) for v in entry["box"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path}, {name!r}: a detection needs "label", "score" and "box"; got {str(entry)[:80]}') from error
    if len(box) != 4 or not all(map(math.isfinite, (*box, score))) or box[0] > box[2] or box[1] > box[3]:
        raise ValueError(f"{path}, {name!r}: box must be finite [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, score finite; got {entry}")
    return Labelled(str(label), score, box)


def first_with(objects: Sequence[Labelled], label: str) -> Labelled | None:
    """The first object with exactly this label."""
    return next((found for found in objects if found.label == label), None)
