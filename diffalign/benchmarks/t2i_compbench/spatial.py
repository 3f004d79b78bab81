"""T2I-CompBench's rules for two objects in a spatial relation: in the plane (2D) and in depth (3D).

Sources: Huang et al., T2I-CompBench (arXiv 2307.06350), and T2I-CompBench++ (arXiv 2307.06350v3) for 3D. An image scores

    0.25 score(A) + 0.25 score(B) + 0.5 relation(A, B)      both objects found
    0.25 score                                               one found, otherwise 0

and in 2D anything below 0.5 becomes 0. Boxes are in the frame of `t2i_detections`. Objects come best first.

What the published numbers contain, and we therefore keep: "on top of" without "the" is recognised and scores 0; 3D labels match as
substrings ("cat" finds "cattle"); an overlap of exactly 0.5 scores 0 in 3D; and the depth map is indexed [x, y], that is transposed.
`depth_axes="corrected"` reads it [y, x]; results made so are not comparable with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from diffalign.benchmarks.t2i_compbench.detections import PEOPLE, Labelled, first_with, overlap
from diffalign.rules import Box

BESIDE = ("on side of", "next to", "near")
DIRECTIONS = ("on the left of", "on the right of", "on the bottom of", "on the top of")
RELATIONS_2D = (*BESIDE, *DIRECTIONS, "on top of")  # the order in which they are looked for in a prompt
RELATIONS_3D = ("in front of", "behind", "hidden")
NEAR_PIXELS = 150.0
LARGEST_OVERLAP_2D = 0.1
FULL_OVERLAP_3D = 0.5
LEAST_SCORE_2D = 0.5
TORCH_GRAIN = 32768  # values that torch sums in one run
COMPLEX_PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")

DepthMap = Float[np.ndarray, "h w"]


@dataclass(frozen=True)
class Token:
    """A word of a tagged prompt; `pos` is its universal part of speech (NOUN, PROPN, ADJ, ...)."""

    text: str
    pos: str


# --- the prompt ---------------------------------------------------------------------------------------------------------------


def find_relation(prompt: str, relations: Sequence[str]) -> str | None:
    """The first of `relations` that occurs in the prompt."""
    return next((relation for relation in relations if relation in prompt), None)


def template_objects(prompt: str) -> tuple[str, str]:
    """The two objects of "a X ... a Y", which all prompts of the spatial categories are. Raises ValueError for any other prompt."""
    match = re.fullmatch(r"an? ([\w-]+) .+ an? ([\w-]+)\.?", prompt.strip(), flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f'not of the form "a X <relation> a Y", so its objects need a part-of-speech tagger: {prompt!r}')
    return match[1], match[2]


def complex_objects(tokens: Sequence[Token]) -> tuple[str, str] | None:
    """The objects around a free sentence's preposition: the nearest noun before it, the first after it. None unless exactly two are found.

    Where no common noun follows, the end of the first run of proper nouns stands in.
    """
    objects: list[str] = []
    for i in range(len(tokens)):
        length = next((k for k in (3, 2, 1) if " ".join(t.text for t in tokens[i : i + k]) in COMPLEX_PREPOSITIONS), None)
        if length is None:
            continue
        before = [t.text for t in reversed(tokens[:i]) if t.pos in ("NOUN", "PROPN")]
        after = tokens[i + length :]
        following = [t.text for t in after if t.pos == "NOUN"] or [
            t.text for t, successor in pairwise(after) if t.pos == "PROPN" and successor.pos != "PROPN"
        ]
        objects += before[:1] + following[:1]
    return (objects[0], objects[1]) if len(objects) == 2 else None


def as_label(word: str) -> str:
    """The detector's word for an object of a prompt."""
    return "person" if word in PEOPLE else word


# --- two dimensions -----------------------------------------------------------------------------------------------------------


def position_2d(relation: str | None, a: Box, b: Box) -> float:
    """How far A stands in the relation to B, in [0, 1]; 0 for no or an unknown relation."""
    dx = (b[0] + b[2]) / 2 - (a[0] + a[2]) / 2
    dy = (b[1] + b[3]) / 2 - (a[1] + a[3]) / 2
    if relation in BESIDE:
        return 1.0 if abs(dx) < NEAR_PIXELS or abs(dy) < NEAR_PIXELS else NEAR_PIXELS / max(abs(dx), abs(dy))
    held = {
        "on the left of": dx > 0 and abs(dx) > abs(dy),
        "on the right of": dx < 0 and abs(dx) > abs(dy),
        "on the top of": dy > 0 and abs(dy) > abs(dx),
        "on the bottom of": dy < 0 and abs(dy) > abs(dx),
    }
    if not held.get(relation or "", False):
        return 0.0
    iou = overlap(a, b)
    return 1.0 if iou < LARGEST_OVERLAP_2D else LARGEST_OVERLAP_2D / iou


def score_2d(prompt: str, objects: Sequence[Labelled], pair: tuple[str, str] | None) -> float:
    """The image's score. `pair`: the prompt's two objects as they are written in it; None (a free sentence without a pair) scores 0."""
    if pair is None:
        return 0.0
    a, b = (first_with(objects, as_label(word)) for word in pair)
    score = _confidence(a, b)
    if a and b:
        score += position_2d(find_relation(prompt, RELATIONS_2D), a.box, b.box) / 2
    return score if score >= LEAST_SCORE_2D else 0.0


def _confidence(a: Labelled | None, b: Labelled | None) -> float:
    """A quarter of each score. With neither, 0; with both the same object, its score twice."""
    return sum(0.25 * found.score for found in (a, b) if found)


# --- depth --------------------------------------------------------------------------------------------------------------------


def position_3d(relation: str | None, a: Box, b: Box, depth: DepthMap, depth_axes: str = "published") -> float:
    """How far A stands before or behind B, in [0, 1]. `depth`: one value per pixel of the frame, larger is nearer."""
    if relation not in RELATIONS_3D:
        return 0.0
    nearer = _mean_depth(depth, a, depth_axes) - _mean_depth(depth, b, depth_axes)
    holds = nearer > 0 if relation == "in front of" else nearer < 0  # both false where a box covers nothing (nan)
    iou = overlap(a, b)
    if not holds or iou == FULL_OVERLAP_3D:
        return 0.0
    return 1.0 if iou > FULL_OVERLAP_3D else iou / FULL_OVERLAP_3D


def score_3d(prompt: str, objects: Sequence[Labelled], pair: tuple[str, str], depth: DepthMap, depth_axes: str = "published") -> float:
    """The image's score. `pair`: the prompt's two objects as they are written in it."""
    words = tuple(map(as_label, pair))
    a, b = _last_seen(objects, words)
    score = _confidence(a, b)
    if a and b:
        score += position_3d(find_relation(prompt, RELATIONS_3D), a.box, b.box, depth, depth_axes) / 2
    return score


def _last_seen(objects: Sequence[Labelled], words: tuple[str, ...]) -> tuple[Labelled | None, ...]:
    """For each word the last object whose label contains it, among those up to where both words have been seen.

    Where one word never occurs the other takes its first object.
    """
    present = [any(word in found.label for found in objects) for word in words]
    if not all(present):
        return tuple(next((found for found in objects if word in found.label), None) for word in words)
    seen: list[Labelled | None] = [None, None]
    for found in objects:
        for k, word in enumerate(words):
            if word in found.label:
                seen[k] = found
        if None not in seen:
            break
    return tuple(seen)


def _mean_depth(depth: DepthMap, box: Box, axes: str) -> float:
    if axes not in ("published", "corrected"):
        raise ValueError(f"depth_axes must be 'published' or 'corrected'; got {axes!r}")
    x1, y1, x2, y2 = (int(v) for v in box)
    region = depth[y1:y2, x1:x2] if axes == "corrected" else depth[x1:x2, y1:y2]
    if not region.size:
        return float("nan")
    return float(region.mean(dtype=np.float64)) if axes == "corrected" else published_mean(np.asarray(depth, np.float32)[x1:x2, y1:y2])


def published_mean(region: Float[np.ndarray, "h w"]) -> float:
    """torch's float32 mean of a part of a map, as with 8 threads or more, whatever the number of threads here.

    Which of two equally deep boxes is "nearer" is decided by the rounding of that sum, so its order matters: torch cuts the values into
    equal runs of at most 32768, adds each run row by row, then the runs.
    """
    import torch  # the rules alone need no torch, so they load fast

    values, count = torch.from_numpy(region), region.size
    runs = -(-count // TORCH_GRAIN)
    if runs == 1:
        return float(values.mean())
    if values.is_contiguous():
        values = values.reshape(1, count)
    width, length, rows = values.shape[1], -(-count // runs), values.sum(1).numpy()
    total = np.float32(0)
    for begin in range(0, count, length):
        end, run = min(begin + length, count), np.float32(0)
        for row in range(begin // width, -(-end // width)):
            first, last = max(begin - row * width, 0), min(end - row * width, width)
            run += rows[row] if (first, last) == (0, width) else values[row, first:last].sum().numpy()
        total += run
    return float(total / np.float32(count))
