"""Prompts of the shapes world in GenEval's six tasks and schema, and the splits that keep composition honest.

Two kinds of combination are held out of training altogether: object-colour pairs (no training scene contains such a thing) and
object-relation pairs (in no training scene does such an object stand in that relation to another kind of object). Validation and
test hold out different ones, and no prompt of one describes the image of a prompt of the other. Every prompt of validation and test
asks for a held-out pair of its split but those of `single_object`, which have none to hold out: there only the noise is new.
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
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
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
PROMPTS_PER_TASK = 150


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

    The same split and seed always give the same rows, and a larger `per_task` more besides. The grammar has fewer of some tasks:
    in test 32 of `single_object`, 40 of `colors`, 112 of `position` and 120 of `counting`. Raises ValueError for an unknown split.
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
    """Training: "a circle and a ring". Held out: "an orange circle and a ring", or "a ring and an orange circle"."""
    for first, second in _object_pairs(split):
        include = [_clause(*first), _clause(*second)]
        for carrier in CARRIERS:
            yield {"tag": "two_object", "include": include, "prompt": f"{carrier}{article(_name(*first))} and {article(_name(*second))}"}


def _object_pairs(split: str) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    if split == "train":
        yield from (((a, ""), (b, "")) for a, b in product(SHAPES, SHAPES) if a != b)
        return
    for colored, plain in product(color_pairs(split), SHAPES):
        if colored[0] != plain:
            yield colored, (plain, "")
            yield (plain, ""), colored


def _counting(split: str) -> Iterator[dict]:
    """Training: "three circles". Held out: "three orange circles"."""
    kinds = [(shape, "") for shape in SHAPES] if split == "train" else color_pairs(split)
    for (shape, color), count, carrier in product(kinds, NUMBER_WORDS, CARRIERS):
        yield {
            "tag": "counting",
            "include": [_clause(shape, color, count)],
            "exclude": [{"class": shape, "count": count + 1}],
            "prompt": f"{carrier}{NUMBER_WORDS[count]} {_name(plural(shape), color)}",
        }


def _clause(shape: str, color: str, count: int = 1) -> dict:
    return {"class": shape, "count": count} | ({"color": color} if color else {})


def _name(shape: str, color: str) -> str:
    return f"{color} {shape}" if color else shape


def _colors(split: str) -> Iterator[dict]:
    for (shape, color), carrier in product(color_pairs(split), CARRIERS):
        include = [{"class": shape, "count": 1, "color": color}]
        yield {"tag": "colors", "include": include, "prompt": carrier + article(f"{color} {shape}")}


def _position(split: str) -> Iterator[dict]:
    """Both readings count: "a ring left of a circle" is an image of the test pair (circle, right of) and no prompt of validation."""
    others = {"train": ("train",), "validation": ("train", "validation"), "test": SPLITS}[split]
    readings = {pair for other in others for pair in relation_pairs(other)}
    for (a, relation), b, carrier in product(relation_pairs(split), SHAPES, CARRIERS):
        if a != b and _opposite(b, relation) in readings:
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


def _opposite(shape: str, relation: str) -> tuple[str, str]:
    """What holds of the other object when the first stands in `relation` to it."""
    return shape, OPPOSITES[relation]
