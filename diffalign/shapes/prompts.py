"""Prompts of the shapes world in GenEval's six tasks and schema, and the splits that keep composition honest.

Two kinds of combination are held out of training altogether: object-colour pairs (no training scene contains such a thing) and
object-relation pairs (in no training scene does such an object stand in that relation to another kind of object). Validation and
test hold out different ones. In the `colors`, `color_attr` and `position` tasks every held-out prompt contains a held-out pair;
`single_object`, `two_object` and `counting` prompts have no such pair to hold out, so there only the noise and the wording are new.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np

from diffalign.rules import RELATIONS, TASKS
from diffalign.shapes.scenes import COLORS, SHAPES

SPLITS = ("train", "validation", "test")
CARRIERS = ("a photo of ", "a picture of ", "a drawing of ", "")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}

HELD_OUT_COLORS = {
    "validation": frozenset({("circle", "pink"), ("star", "black"), ("cross", "yellow"), ("heart", "orange")}),
    "test": frozenset(
        {
            ("circle", "orange"),
            ("square", "purple"),
            ("triangle", "red"),
            ("diamond", "green"),
            ("star", "blue"),
            ("cross", "pink"),
            ("heart", "yellow"),
            ("ring", "brown"),
            ("square", "white"),
            ("triangle", "black"),
        }
    ),
}
HELD_OUT_RELATIONS = {
    "validation": frozenset({("ring", "left of"), ("cross", "above")}),
    "test": frozenset({("circle", "right of"), ("star", "left of"), ("triangle", "below"), ("square", "above")}),
}
PROMPTS_PER_TASK = 60


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, chosen by its first letter as GenEval does."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


@cache
def color_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """The (shape, colour) pairs that belong to a split, in a fixed order."""
    return tuple(p for p in product(SHAPES, COLORS) if _owner(p, HELD_OUT_COLORS) == split)


@cache
def relation_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """The (shape, relation) pairs that belong to a split, the shape being the subject of the relation."""
    return tuple(p for p in product(SHAPES, RELATIONS) if _owner(p, HELD_OUT_RELATIONS) == split)


def _owner(pair: tuple[str, str], held_out: dict[str, frozenset]) -> str:
    return next((split for split, pairs in held_out.items() if pair in pairs), "train")


def metadata(split: str, seed: int = 43, per_task: int = PROMPTS_PER_TASK) -> list[dict]:
    """Rows in GenEval's metadata schema (tag, include, optional exclude, prompt), all distinct, at most `per_task` of each task.

    The same split and seed always give the same rows; `single_object` has only as many as there are shapes times carriers.
    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    rows = []
    for task in TASKS:
        candidates = list(_GENERATORS[task](split))
        order = rng.permutation(len(candidates))[:per_task]
        rows += [candidates[i] for i in sorted(order)]
    return rows


def prompts(split: str, seed: int = 43, per_task: int = PROMPTS_PER_TASK) -> list[str]:
    """The prompts of `metadata(...)`."""
    return [row["prompt"] for row in metadata(split, seed, per_task)]


def _single_object(split: str) -> Iterator[dict]:
    for shape, carrier in product(SHAPES, CARRIERS):
        yield {"tag": "single_object", "include": [{"class": shape, "count": 1}], "prompt": carrier + article(shape)}


def _two_object(split: str) -> Iterator[dict]:
    for a, b, carrier in product(SHAPES, SHAPES, CARRIERS):
        if a != b:
            include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
            yield {"tag": "two_object", "include": include, "prompt": f"{carrier}{article(a)} and {article(b)}"}


def _counting(split: str) -> Iterator[dict]:
    for shape, count, carrier in product(SHAPES, NUMBER_WORDS, CARRIERS):
        yield {
            "tag": "counting",
            "include": [{"class": shape, "count": count}],
            "exclude": [{"class": shape, "count": count + 1}],
            "prompt": f"{carrier}{NUMBER_WORDS[count]} {plural(shape)}",
        }


def _colors(split: str) -> Iterator[dict]:
    for (shape, color), carrier in product(color_pairs(split), CARRIERS):
        include = [{"class": shape, "count": 1, "color": color}]
        yield {"tag": "colors", "include": include, "prompt": carrier + article(f"{color} {shape}")}


def _position(split: str) -> Iterator[dict]:
    for (a, relation), b, carrier in product(relation_pairs(split), SHAPES, CARRIERS):
        if a != b and (split != "train" or _opposite(b, relation) in relation_pairs("train")):
            include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
            yield {"tag": "position", "include": include, "prompt": f"{carrier}{article(a)} {relation} {article(b)}"}


def _color_attr(split: str) -> Iterator[dict]:
    allowed = set(color_pairs("train")) | set(color_pairs(split))
    held_out = set(color_pairs(split))
    for (a, ca), (b, cb) in product(sorted(allowed), sorted(allowed)):
        if a == b or ca == cb or not held_out & {(a, ca), (b, cb)}:
            continue
        include = [{"class": a, "count": 1, "color": ca}, {"class": b, "count": 1, "color": cb}]
        for carrier in CARRIERS:
            yield {"tag": "color_attr", "include": include, "prompt": f"{carrier}{article(f'{ca} {a}')} and {article(f'{cb} {b}')}"}


_GENERATORS = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}

_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _opposite(shape: str, relation: str) -> tuple[str, str]:
    """What holds of the other object when the first stands in `relation` to it."""
    return shape, _OPPOSITES[relation]
