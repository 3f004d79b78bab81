"""GenEval as Flow-GRPO trains on it: partial credit for an image that is nearly right. A reward, not the benchmark's score.

Source: Liu et al., "Flow-GRPO" (arXiv 2505.05470) with the rules of its reward server. It differs from `geneval_rules`:

- counts must be met exactly by all kept objects, not by the best `count` of them, and `exclude` is ignored;
- the score is a mean over terms. Each clause adds 1 - |count - found| / count, which a large surplus makes negative (five objects instead
  of one: 1 - 4/1 = -3); then, where a colour or a position is asked for,
    wrong count          0, once
    colour               1 - |count - of that colour| / count
    position, no target  0
    position fails       0 and then also 1, so that such an image with all its objects scores 3/4
    position holds       1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.rules import ColorClassifier, Detection, Limits, keep, relative_position

UPSTREAM = Limits()


@dataclass(frozen=True)
class PartialCredit:
    """`score`: the mean of the terms, at most 1, possibly negative. `strict`: every clause holds exactly (score 1 says the same)."""

    score: float
    strict: bool


def partial_credit(
    metadata: Mapping[str, Any],
    detections: Mapping[str, Sequence[Detection]],
    classify_colors: ColorClassifier,
    limits: Limits = UPSTREAM,
) -> PartialCredit:
    """Judges one image from its raw detections per class, cut by `limits` as the benchmark does."""
    threshold = limits.counting_threshold if metadata.get("tag") == "counting" else limits.threshold
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        found = keep(detections.get(clause["class"], ()), threshold, limits)
        added, holds = _clause_terms(clause, found, groups, classify_colors, limits.position_threshold)
        terms += added
        groups.append(found if holds else None)
    return PartialCredit(sum(terms) / len(terms) if terms else 0.0, None not in groups)


def _clause_terms(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    classify_colors: ColorClassifier,
    position_threshold: float,
) -> tuple[list[float], bool]:
    """The clause's terms, and whether it holds."""
    name, count = clause["class"], clause["count"]
    terms = [1 - abs(count - len(found)) / count]
    if len(found) != count:
        return terms + [0.0] * ("color" in clause or "position" in clause), False
    if "color" in clause:
        right = list(classify_colors(name, found)).count(clause["color"])
        terms.append(1 - abs(count - right) / count)
        if right != count:
            return terms, False
    if "position" in clause:
        relation, index = clause["position"]
        targets = groups[index]
        if targets is None:
            return terms + [0.0], False
        holds = all(relation in relative_position(a.box, b.box, position_threshold) for a in found for b in targets)
        return terms + ([1.0] if holds else [0.0, 1.0]), holds
    return terms, True
