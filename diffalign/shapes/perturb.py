"""Captions said otherwise: what DCPO's perturbation does with a language model, by the grammar of the shapes world.

    weak     the same said in other words: another carrier, the two kinds the other way round with the opposite relation
    medium   and one respect of it changed: a colour, a shape, a relation or a count
    strong   and two

The paper's levels are a paraphraser's lexical diversity of 40, 60 and 80 %, which keeps the meaning less and less. Nothing is said that
training may not learn (`rewards_described.may_be_said`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from diffalign.shapes.prompts import CARRIERS, NUMBER_WORDS, article, plural
from diffalign.shapes.scenes import COLORS, SHAPES
from diffalign.shapes.train.rewards_described import may_be_said
from diffalign.shapes.train.rewards_scenes import Claim, read_claim, split_carrier

Strength = Literal["weak", "medium", "strong"]
STRENGTHS: tuple[str, ...] = get_args(Strength)
TRIES = 40
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def perturbed(caption: str, strength: Strength, rng: np.random.Generator) -> str | None:
    """The caption said otherwise; None where nothing else may be said. ValueError for one outside the short captions' grammar."""
    if strength not in STRENGTHS:
        raise ValueError(f"strength must be one of {', '.join(STRENGTHS)}, got {strength!r}")
    carrier, claim = split_carrier(caption)[0], read_claim(caption)
    others = [each for each in CARRIERS if each != carrier]
    for _ in range(TRIES):
        changed = turned(claim) if claim.second else claim
        for respect in rng.permutation(respects(claim))[: STRENGTHS.index(strength)]:
            changed = altered(changed, respect, rng)
        said = others[rng.integers(len(others))] + body(changed)
        if may_be_said(said):
            return said
    return None


def otherwise(strength: Strength) -> Callable[[Sequence[str]], list[str]]:
    """A function that says texts otherwise, each always alike; a text that nothing else may be said for stays as it is."""

    def say(texts: Sequence[str]) -> list[str]:
        return [perturbed(text, strength, np.random.default_rng(list(text.encode()))) or text for text in texts]

    return say


def respects(claim: Claim) -> list[str]:
    """What of a claim can be changed."""
    found = ["shape"]
    if claim.count > 1:
        found.append("count")
    if claim.first[1] or (claim.second and claim.second[1]):
        found.append("color")
    if claim.relation:
        found.append("relation")
    return found


def turned(claim: Claim) -> Claim:
    """The same claim of two kinds, the second named first."""
    return Claim(claim.second, claim.count, claim.first, _OPPOSITE[claim.relation] if claim.relation else None)


def altered(claim: Claim, respect: str, rng: np.random.Generator) -> Claim:
    """The claim with one respect changed."""
    if respect == "count":
        return replace(claim, count=int(_other(rng, list(NUMBER_WORDS), [claim.count])))
    if respect == "relation":
        return replace(claim, relation=_OPPOSITE[claim.relation])
    taken = [kind[0] for kind in (claim.first, claim.second) if kind]
    sides = ["first"] if claim.second is None else ["first", "second"]
    if respect == "color":
        sides = [side for side in sides if getattr(claim, side)[1]]
    side = sides[rng.integers(len(sides))]
    shape, color = getattr(claim, side)
    kind = (_other(rng, SHAPES, taken), color) if respect == "shape" else (shape, _other(rng, list(COLORS), [color]))
    return replace(claim, **{side: kind})


def body(claim: Claim) -> str:
    """A claim in words, without a carrier; `read_claim` reads it back."""
    first = " ".join(filter(None, (claim.first[1], claim.first[0])))
    if claim.count > 1:
        color = f"{claim.first[1]} " if claim.first[1] else ""
        return f"{NUMBER_WORDS[claim.count]} {color}{plural(claim.first[0])}"
    if claim.second is None:
        return article(first)
    second = " ".join(filter(None, (claim.second[1], claim.second[0])))
    return f"{article(first)} {claim.relation or 'and'} {article(second)}"


def _other(rng: np.random.Generator, choices: list | tuple, taken: list) -> str:
    left = [choice for choice in choices if choice not in taken]
    return left[rng.integers(len(left))]
