"""What the reward trainings know of a scene: what its captions claim, which claims hold, and near copies that differ in one respect.

Everything here is exact, so negatives that happen to be true are never taught as false, and the simulated annotator knows the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffalign.rules import RELATIONS
from diffalign.shapes.captions import WRONGS, relations, wrong_caption
from diffalign.shapes.prompts import CARRIERS, NUMBER_WORDS, color_pairs, plural, relation_pairs
from diffalign.shapes.scenes import COLORS, GAP, MARGIN, RADIUS_RANGES, REACH, SHAPES, SIZE, Scene, Thing

COLOR_NAMES = tuple(COLORS)
MOST_THINGS = 4
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_NUMBERS = {word: number for number, word in NUMBER_WORDS.items()}
_SINGULAR = {plural(shape): shape for shape in SHAPES}

Kind = tuple[str, str | None]  # shape, colour (None where the caption names none)


@dataclass(frozen=True)
class Claim:
    """What a short caption asserts: `count` things of the `first` kind, perhaps one of a `second` kind, perhaps in a relation to it."""

    first: Kind
    count: int = 1
    second: Kind | None = None
    relation: str | None = None

    def encode(self) -> list[int]:
        """(shape, colour, count, second shape, second colour, relation) as indices, -1 for what is not said."""
        shape, color = self.first
        second, second_color = self.second or (None, None)
        return [
            SHAPES.index(shape),
            COLOR_NAMES.index(color) if color else -1,
            self.count,
            SHAPES.index(second) if second else -1,
            COLOR_NAMES.index(second_color) if second_color else -1,
            RELATIONS.index(self.relation) if self.relation else -1,
        ]


UNKNOWN = [-2, -1, 1, -1, -1, -1]  # the encoding of a caption that claims more than a Claim can hold: it holds of no scene here


def split_carrier(caption: str) -> tuple[str, str]:
    """A caption's carrier ("a photo of ", or "") and body."""
    carrier = next((c for c in CARRIERS if c and caption.startswith(c)), "")
    return carrier, caption[len(carrier) :]


def read_claim(caption: str) -> Claim:
    """The claim of a short or wrong caption. Raises ValueError for anything else."""
    body = split_carrier(caption)[1]
    try:
        words = body.split()
        if words[0] in _NUMBERS:
            return Claim((_SINGULAR[words[-1]], words[1] if len(words) == 3 else None), _NUMBERS[words[0]])
        for joint in (*RELATIONS, "and"):
            if f" {joint} " in body:
                first, second = body.split(f" {joint} ")
                return Claim(_read_kind(first), 1, _read_kind(second), None if joint == "and" else joint)
        return Claim(_read_kind(body))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{caption!r} is not a short caption of the shapes world") from error


def _read_kind(phrase: str) -> Kind:
    _, *color, shape = phrase.split()
    if shape not in SHAPES or len(color) > 1 or (color and color[0] not in COLORS):
        raise ValueError(phrase)
    return shape, color[0] if color else None


@cache
def _train_pairs() -> tuple[frozenset, frozenset]:
    return frozenset(color_pairs("train")), frozenset(relation_pairs("train"))


def claim_allowed(claim: Claim) -> bool:
    """Whether training scenes can make the claim true.

    Wrong captions that name a held-out pair are dropped: they would be false whenever seen, and the text alone would give that away.
    """
    colors, sides = _train_pairs()
    kinds = [claim.first] + ([claim.second] if claim.second else [])
    if any(color and (shape, color) not in colors for shape, color in kinds):
        return False
    if claim.relation is None:
        return True
    return (claim.first[0], claim.relation) in sides and (claim.second[0], _OPPOSITE[claim.relation]) in sides


def scene_allowed(scene: Scene) -> bool:
    """Whether a scene belongs to the training split: no held-out colour of a thing, no held-out relation of it."""
    colors, sides = _train_pairs()
    if any((t.shape, t.color) not in colors for t in scene.things):
        return False
    return all((a.shape, r) in sides for a in scene.things for b in scene.things if a.shape != b.shape for r in relations(a, b))


def wrong_captions(rng: np.random.Generator, scene: Scene, count: int, train_only: bool = True) -> list[str]:
    """`count` wrong captions of a scene, different ones as far as there are; see `claim_allowed` for `train_only`."""
    found: dict[str, None] = {}
    for _ in range(50):
        caption = wrong_caption(rng, scene)[0]
        if not train_only or claim_allowed(read_claim(caption)):
            found[caption] = None
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"no wrong caption with train pairs alone was found for {scene}")
    captions = list(found)
    return [captions[i % len(captions)] for i in range(count)]


def twin(rng: np.random.Generator, scene: Scene, kind: str | None = None, train_only: bool = True) -> tuple[Scene, str] | None:
    """A scene that differs in one respect, and which (of WRONGS; `kind` asks for one); None where none of that kind was found."""
    things = scene.things
    pair = len(things) == 2 and things[0].shape != things[1].shape
    kinds = [kind] if kind else list(rng.permutation(WRONGS if pair else ("color", "shape", "count")))
    for name in kinds:
        for _ in range(8):
            other = _altered(rng, things, name, pair)
            if other is not None and (not train_only or scene_allowed(other)):
                return other, str(name)
    return None


def _altered(rng: np.random.Generator, things: Sequence[Thing], kind: str, pair: bool) -> Scene | None:
    if kind == "swapped_colors":
        if not pair or things[0].color == things[1].color:
            return None
        return Scene((replace(things[0], color=things[1].color), replace(things[1], color=things[0].color)))
    if kind == "swapped_relation":
        if not pair or not relations(*things):
            return None
        a, b = things
        return Scene((replace(a, x=b.x, y=b.y, radius=b.radius), replace(b, x=a.x, y=a.y, radius=a.radius)))
    if kind == "count":
        if len(things) > 1 and (pair or len(things) == MOST_THINGS or rng.random() < 0.5):
            gone = rng.integers(len(things))
            return Scene(tuple(t for i, t in enumerate(things) if i != gone))
        return _with_copy(rng, things)
    values = COLOR_NAMES if kind == "color" else SHAPES
    value = values[rng.integers(len(values))]
    if value in {getattr(t, kind) for t in things}:
        return None
    chosen = int(rng.integers(len(things)))
    # Several things of one shape keep one shape, or no caption of ours could name them; of their colours one may differ.
    every = not pair and (kind == "shape" or rng.random() < 0.5)
    return Scene(tuple(replace(t, **{kind: value}) if every or i == chosen else t for i, t in enumerate(things)))


def _with_copy(rng: np.random.Generator, things: Sequence[Thing]) -> Scene | None:
    model = things[rng.integers(len(things))]
    for _ in range(30):
        radius = rng.uniform(*RADIUS_RANGES[len(things) + 1])
        reach = REACH * radius + MARGIN
        x, y = rng.uniform(reach, SIZE - reach, size=2)
        if all(np.hypot(x - t.x, y - t.y) > REACH * (radius + t.radius) + GAP for t in things):
            return Scene((*things, Thing(model.shape, model.color, float(x), float(y), float(radius))))
    return None


FACTS = len(SHAPES) * len(COLOR_NAMES) + len(SHAPES) * len(RELATIONS) + MOST_THINGS


@dataclass
class Tables:
    """Scenes as tensors: per thing the shape and colour index (-1 where there is none) and centre and radius, per scene its facts."""

    shapes: Int[Tensor, "n 4"]
    colors: Int[Tensor, "n 4"]
    places: Float[Tensor, "n 4 3"]
    facts: Bool[Tensor, "n facts"]

    def rows(self, index: Tensor) -> Tables:
        return Tables(self.shapes[index], self.colors[index], self.places[index], self.facts[index])


def tabulate(scenes: Sequence[Scene]) -> Tables:
    """Facts: which (shape, colour) pairs are present, which shape stands in which relation to another one, how many things there are."""
    shapes = torch.full((len(scenes), MOST_THINGS), -1)
    colors = torch.full((len(scenes), MOST_THINGS), -1)
    places = torch.full((len(scenes), MOST_THINGS, 3), -1e3)
    facts = torch.zeros(len(scenes), FACTS, dtype=torch.bool)
    first_relation = len(SHAPES) * len(COLOR_NAMES)
    for i, scene in enumerate(scenes):
        facts[i, FACTS - MOST_THINGS + len(scene.things) - 1] = True
        for j, t in enumerate(scene.things):
            shapes[i, j], colors[i, j] = SHAPES.index(t.shape), COLOR_NAMES.index(t.color)
            places[i, j] = torch.tensor((t.x, t.y, t.radius))
            facts[i, shapes[i, j] * len(COLOR_NAMES) + colors[i, j]] = True
            for other in scene.things:
                if other.shape != t.shape:
                    for relation in relations(t, other):
                        facts[i, first_relation + shapes[i, j] * len(RELATIONS) + RELATIONS.index(relation)] = True
    return Tables(shapes, colors, places, facts)


@cache
def taught_facts() -> Bool[Tensor, " facts"]:
    """The facts that training scenes can have; the others are never asked, or "never" is what would be learnt of them."""
    colors, sides = _train_pairs()
    pairs = [(s, c) in colors for s in SHAPES for c in COLOR_NAMES]
    return torch.tensor(pairs + [(s, r) in sides for s in SHAPES for r in RELATIONS] + [True] * MOST_THINGS)


def holds(tables: Tables, claims: Int[Tensor, "m 6"]) -> Bool[Tensor, "n m"]:
    """Which claims are true of which scenes, by GenEval's rules: a number must be met exactly, a thing named once may occur more often.

    Where it does occur more often, any of them may have the colour named (GenEval asks the most confident detection alone).
    """
    shape, color, count, second, second_color, relation = claims.unsqueeze(1).unbind(-1)  # each "m 1", against things "n 1 4"
    shapes, colors = tables.shapes.unsqueeze(1), tables.colors.unsqueeze(1)
    first_shape = shapes == shape
    first = first_shape & ((color < 0) | (colors == color))
    other = (shapes == second) & ((second_color < 0) | (colors == second_color))
    found, of_shape = first.sum(-1), first_shape.sum(-1)
    numbered = (count > 1).squeeze(-1)
    right_number = torch.where(numbered, (found == count.squeeze(-1)) & (of_shape == found), found >= 1)
    right_second = (second < 0).squeeze(-1) | other.any(-1)
    start = len(SHAPES) * len(COLOR_NAMES)
    stands = tables.facts[:, start : start + len(SHAPES) * len(RELATIONS)]
    asked = (shape * len(RELATIONS) + relation).clamp(min=0).squeeze(-1)
    right_relation = (relation < 0).squeeze(-1) | stands[:, asked]
    return right_number & right_second & right_relation
