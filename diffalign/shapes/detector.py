"""The judge: an exact detector for the shapes world. Nothing in the package ever optimises it.

Objects are the connected regions that differ from the ground. A region's score for a shape is the overlap (IoU) of the two after both are
scaled to a common box, times the ratio of their proportions; its shape is the one with the highest score, its colour the nearest of the
ten to the mean of its inner pixels.
Deterministic, no weights; about a millisecond an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from diffalign.rules import Detection, Limits, Verdict, judge, keep
from diffalign.shapes.scenes import COLORS, GROUND, SHAPES, SIZE, Thing, coverage, outline

FOREGROUND_DISTANCE = 40.0  # Euclidean distance in 8-bit RGB from the ground
LEAST_AREA = 40  # pixels; the smallest thing ever drawn covers about 100
TEMPLATE_SIZE = 32
LIMITS = Limits(threshold=0.6, counting_threshold=0.6)  # template IoU; of 1,000 drawn scenes the lowest true score is above 0.7


@cache
def _templates() -> np.ndarray:
    """One binary mask per shape, scaled to its own box: "shapes TEMPLATE_SIZE TEMPLATE_SIZE"."""
    masks = [coverage(Thing(shape, "black", SIZE / 2, SIZE / 2, SIZE / 3), 4 * SIZE) > 0.5 for shape in SHAPES]
    return np.stack([_to_box(mask) for mask in masks])


@cache
def _aspects() -> np.ndarray:
    """Width over height of each shape's outline."""
    boxes = [np.ptp(outline(shape), axis=0) for shape in SHAPES]
    return np.array([width / height for width, height in boxes])


def _to_box(mask: np.ndarray) -> np.ndarray:
    """The mask cropped to its box and scaled to TEMPLATE_SIZE, as soft values in [0, 1]."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray((crop * 255).astype(np.uint8)).resize((TEMPLATE_SIZE, TEMPLATE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32) / 255.0


def detect(image: np.ndarray) -> dict[str, list[Detection]]:
    """Objects in a "h w 3" uint8 image by shape, best first. Each detection's mask is a boolean "h w" array."""
    distance = np.linalg.norm(image.astype(np.float32) - np.array(GROUND, dtype=np.float32), axis=2)
    labels, count = ndimage.label(distance > FOREGROUND_DISTANCE, structure=np.ones((3, 3)))
    found: dict[str, list[Detection]] = {}
    for i in range(1, count + 1):
        mask = labels == i
        if mask.sum() < LEAST_AREA:
            continue
        soft = _to_box(mask)
        templates = _templates()
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        overlap = np.minimum(templates, soft).sum(axis=(1, 2)) / np.maximum(templates, soft).sum(axis=(1, 2))
        stretch = (columns[-1] + 1 - columns[0]) / (rows[-1] + 1 - rows[0]) / _aspects()
        overlap *= np.minimum(stretch, 1 / stretch)  # scaling to a common box hides it, and two things grown together are stretched
        best = int(overlap.argmax())
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        found.setdefault(SHAPES[best], []).append(Detection(box, float(overlap[best]), mask))
    for detections in found.values():
        detections.sort(key=lambda d: -d.score)
    return found


def classify_color(image: np.ndarray, mask: np.ndarray) -> str:
    """The palette colour nearest to the mean of the mask's inner pixels (all of them where nothing is left after erosion)."""
    inner = ndimage.binary_erosion(mask)
    mean = image[inner if inner.any() else mask].astype(np.float32).mean(axis=0)
    return min(COLORS, key=lambda name: float(np.linalg.norm(mean - np.array(COLORS[name], dtype=np.float32))))


def judge_image(image: np.ndarray, metadata: Mapping, limits: Limits = LIMITS) -> Verdict:
    """The verdict on a "h w 3" uint8 image of the shapes world for one metadata row; see `judge_found`."""
    return judge_found(image, detect(image), metadata, limits)


def judge_found(image: np.ndarray, found: Mapping[str, Sequence[Detection]], metadata: Mapping, limits: Limits = LIMITS) -> Verdict:
    """The same where `detect` has been called. GenEval's rules, and one of this world's own.

    A clause with `not_color` asks that none of the clearest `count` things of its class, those that `color` looks at, be of that colour.
    """
    verdict = judge(metadata, found, lambda _, those: [classify_color(image, d.mask) for d in those], limits)
    reasons = [verdict.reason] if verdict.reason else []
    for clause in metadata["include"]:
        if "not_color" in clause:
            clearest = keep(found.get(clause["class"], ()), limits.threshold, limits)[: clause["count"]]
            if any(classify_color(image, d.mask) == clause["not_color"] for d in clearest):
                reasons.append(f"expected {clause['class']} not {clause['not_color']}, found {clause['not_color']}")
    return Verdict(not reasons, "\n".join(reasons))


def judge_images(images: np.ndarray, rows: Sequence[Mapping]) -> list[Verdict]:
    """`judge_image` for each of "b h w 3" uint8 images."""
    return [judge_image(image, row) for image, row in zip(images, rows, strict=True)]
