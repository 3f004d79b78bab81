"""The hard tier: what stays difficult when the six tasks of `prompts.py` are solved. For measuring alone: nothing is chosen or tuned on it.

three_kinds       "a circle, a ring and a star": each three of the eight shapes once. Judged by GenEval's rules.
negation          "a circle that is not red". GenEval has no such rule; the clause says `not_color`, which `detector.py` knows.
relation_colors   "a red circle left of a blue square", by GenEval's rules. In one half the relation is held out (of test's) and the colours
                  are trained, in the other one colour is held out and the relation trained.

No model of the shapes world has read a list of three or a negation, so these two tasks are zero-shot.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import TypeVar

import numpy as np

from diffalign.shapes.prompts import CARRIERS, OPPOSITES, article, color_pairs, relation_pairs
from diffalign.shapes.scenes import COLORS, SHAPES

TIER = "hard"
TASKS = ("three_kinds", "negation", "relation_colors")
NEGATIONS = 60
HALF = 30  # of `relation_colors`
Kind = tuple[str, str]  # shape and colour
Side = tuple[str, str, str]  # subject's shape, relation, target's shape
T = TypeVar("T")


def metadata(seed: int = 43) -> list[dict]:
    """176 rows in GenEval's metadata schema, all distinct, ordered by TASKS. The same seed always gives the same rows."""
    rng = np.random.default_rng([seed, 3])  # the splits have 0 to 2
    related = [*_held_out_relations(rng), *_held_out_colors(rng)]
    return [*_three_kinds(rng), *_negations(rng), *(_related(rng, *each) for each in related)]


def _three_kinds(rng: np.random.Generator) -> Iterator[dict]:
    for kinds in combinations(SHAPES, 3):
        a, b, c = (kinds[i] for i in rng.permutation(3))
        include = [{"class": shape, "count": 1} for shape in (a, b, c)]
        yield {"tag": "three_kinds", "include": include, "prompt": f"{_carrier(rng)}{article(a)}, {article(b)} and {article(c)}"}


def _negations(rng: np.random.Generator) -> Iterator[dict]:
    kinds = list(product(SHAPES, COLORS))
    for i in sorted(rng.permutation(len(kinds))[:NEGATIONS]):
        shape, color = kinds[i]
        include = [{"class": shape, "count": 1, "not_color": color}]
        yield {"tag": "negation", "include": include, "prompt": f"{_carrier(rng)}{article(shape)} that is not {color}"}


def _related(rng: np.random.Generator, subject: Kind, relation: str, target: Kind) -> dict:
    (a, ca), (b, cb) = subject, target
    include = [{"class": b, "count": 1, "color": cb}, {"class": a, "count": 1, "color": ca, "position": [relation, 0]}]
    prompt = f"{_carrier(rng)}{article(f'{ca} {a}')} {relation} {article(f'{cb} {b}')}"
    return {"tag": "relation_colors", "include": include, "prompt": prompt}


def _held_out_relations(rng: np.random.Generator) -> Iterator[tuple[Kind, str, Kind]]:
    """Trained colours in relations of the test split, each of these before any comes again."""
    sides = _sides("test", excluding=relation_pairs("validation"))
    for a, relation, b in _cycled(rng, sides):
        ca = _drawn(rng, _colors(a))
        yield (a, ca), relation, (b, _drawn(rng, [c for c in _colors(b) if c != ca]))


def _held_out_colors(rng: np.random.Generator) -> Iterator[tuple[Kind, str, Kind]]:
    """Trained relations of two things, one of them in a colour of the test split, each of these three times."""
    sides = _sides("train", excluding=(*relation_pairs("validation"), *relation_pairs("test")))
    for shape, color in _cycled(rng, color_pairs("test")):
        first = rng.random() < 0.5
        a, relation, b = _drawn(rng, [side for side in sides if shape == (side[0] if first else side[2])])
        other = b if first else a
        mate = other, _drawn(rng, [c for c in _colors(other) if c != color])
        yield ((shape, color), relation, mate) if first else (mate, relation, (shape, color))


def _sides(split: str, excluding: tuple[tuple[str, str], ...]) -> list[Side]:
    """Relations whose subject belongs to a split; the target's reading of them must not be among `excluding`."""
    pairs = product(relation_pairs(split), SHAPES)
    return [(a, relation, b) for (a, relation), b in pairs if a != b and (b, OPPOSITES[relation]) not in excluding]


def _colors(shape: str) -> list[str]:
    """Those that training shows it in."""
    return [color for owner, color in color_pairs("train") if owner == shape]


def _cycled(rng: np.random.Generator, choices: list | tuple) -> list:
    """HALF of the choices in random order, each as often as another or once more."""
    rounds = -(-HALF // len(choices))
    return [choices[i] for _ in range(rounds) for i in rng.permutation(len(choices))][:HALF]


def _drawn(rng: np.random.Generator, choices: list[T]) -> T:
    return choices[rng.integers(len(choices))]


def _carrier(rng: np.random.Generator) -> str:
    return CARRIERS[rng.integers(len(CARRIERS))]
