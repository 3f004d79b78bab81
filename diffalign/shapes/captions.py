"""What can be said of a scene: short, long and wrong captions, and the training scenes they are drawn for.

A caption is a carrier ("a photo of ", ..., or nothing) and a body. Every caption but a wrong one is true of its scene by GenEval's
rules; a wrong caption differs from a true one in exactly one respect, which it names.
"""

from __future__ import annotations

import numpy as np

from diffalign.rules import relative_position
from diffalign.shapes.prompts import (
    CARRIERS,
    NUMBER_WORDS,
    OPPOSITES,
    article,
    color_pairs,
    plural,
    relation_pairs,
)
from diffalign.shapes.scenes import COLORS, SHAPES, SIZE, Scene, Thing, place

WRONGS = ("color", "shape", "swapped_colors", "swapped_relation", "count")
LARGE_RADIUS = 11.5  # pixels; a thing at least this large is called large, otherwise small


def draw_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """A random scene: one thing, two kinds of thing, or two to four of one kind.

    The three forms are drawn 2 : 5 : 3 and crowded draws often find no place and are drawn anew, so that of training scenes about 35 %
    hold one thing, 39 % two kinds and 26 % several of one kind (four of a kind: 3 %).

    For split="train" no held-out pair ever appears; for the others every combination may.
    """
    pairs = color_pairs("train") if split == "train" else color_pairs("train") + color_pairs("validation") + color_pairs("test")
    while True:
        scene = place(rng, _draw_kinds(rng, pairs))
        if scene is not None and (split != "train" or _relations_allowed(scene)):
            return scene


def _draw_kinds(rng: np.random.Generator, pairs: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    form = rng.choice(3, p=(0.2, 0.5, 0.3))
    first = pairs[rng.integers(len(pairs))]
    if form == 0:
        return [first]
    if form == 1:
        others = [p for p in pairs if p[0] != first[0]]
        return [first, others[rng.integers(len(others))]]
    count = int(rng.integers(2, 5))
    if rng.random() < 0.7:
        return [first] * count
    same = [p for p in pairs if p[0] == first[0]]
    return [same[rng.integers(len(same))] for _ in range(count)]


def relations(a: Thing, b: Thing) -> tuple[str, ...]:
    """The relations of a to b by GenEval's rule, from the true boxes."""
    return relative_position(a.box, b.box)


def _relations_allowed(scene: Scene) -> bool:
    allowed = set(relation_pairs("train"))
    return all((a.shape, r) in allowed for a in scene.things for b in scene.things if a.shape != b.shape for r in relations(a, b))


def short_caption(rng: np.random.Generator, scene: Scene) -> str:
    """A caption in the words of the benchmark's prompts, with a carrier: "a photo of a red circle left of a square"."""
    return _carrier(rng) + _short_body(rng, scene)


def _short_body(rng: np.random.Generator, scene: Scene) -> str:
    things = scene.things
    if len(things) == 1:
        return article(_name(things[0], rng.random() < 0.7))
    if things[0].shape == things[1].shape:
        one_color = len({t.color for t in things}) == 1
        color = f"{things[0].color} " if one_color and rng.random() < 0.4 else ""
        return f"{NUMBER_WORDS[len(things)]} {color}{plural(things[0].shape)}"
    a, b = things if rng.random() < 0.5 else things[::-1]
    colored = rng.random() < 0.6
    held = relations(a, b)
    joint = held[rng.integers(len(held))] if held and rng.random() < 0.6 else "and"
    return f"{article(_name(a, colored))} {joint} {article(_name(b, colored))}"


def long_caption(rng: np.random.Generator, scene: Scene) -> str:
    """A caption that says each thing's size, colour and place: "a photo of a large red circle at the top left and ..."."""
    described = []
    for thing in scene.things:
        size = "large" if thing.radius >= LARGE_RADIUS else "small"
        described.append(f"{article(f'{size} {_name(thing, True)}')} at the {_place_words(thing)}")
    return _carrier(rng) + " and ".join(described)


def wrong_caption(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """A caption false in one respect, and which (one of WRONGS). Colours and relations are swapped where the scene allows it."""
    things = scene.things
    if len(things) > 1 and things[0].shape == things[1].shape:
        other = rng.choice([n for n in NUMBER_WORDS if n != len(things)])
        return f"{_carrier(rng)}{NUMBER_WORDS[int(other)]} {plural(things[0].shape)}", "count"
    if len(things) == 1:
        kind = ("color", "shape")[rng.integers(2)]
        return _carrier(rng) + article(_name(_altered(rng, things[0], kind), True)), kind
    a, b = things if rng.random() < 0.5 else things[::-1]
    kinds = ["color", "shape"]
    if a.color != b.color:
        kinds += ["swapped_colors"] * 2
    held = relations(a, b)
    if held:
        kinds += ["swapped_relation"] * 2
    kind = kinds[rng.integers(len(kinds))]
    joint = held[rng.integers(len(held))] if held and rng.random() < 0.5 else "and"
    if kind == "swapped_colors":
        names = article(f"{b.color} {a.shape}"), article(f"{a.color} {b.shape}")
    elif kind == "swapped_relation":
        joint = OPPOSITES[held[rng.integers(len(held))]]
        colored = rng.random() < 0.6
        names = article(_name(a, colored)), article(_name(b, colored))
    else:
        taken = {t.shape for t in things}
        names = article(_name(_altered(rng, a, kind, taken), True)), article(_name(b, True))
    return f"{_carrier(rng)}{names[0]} {joint} {names[1]}", kind


def _altered(rng: np.random.Generator, thing: Thing, kind: str, taken: set[str] = frozenset()) -> Thing:
    if kind == "color":
        choices = [c for c in COLORS if c != thing.color]
        return Thing(thing.shape, choices[rng.integers(len(choices))], thing.x, thing.y, thing.radius)
    choices = [s for s in SHAPES if s != thing.shape and s not in taken]
    return Thing(choices[rng.integers(len(choices))], thing.color, thing.x, thing.y, thing.radius)


def _carrier(rng: np.random.Generator) -> str:
    return CARRIERS[rng.integers(len(CARRIERS))]


def _name(thing: Thing, colored: bool) -> str:
    return f"{thing.color} {thing.shape}" if colored else thing.shape


def _place_words(thing: Thing) -> str:
    row = ("top", "middle", "bottom")[min(int(3 * thing.y / SIZE), 2)]
    column = ("left", "center", "right")[min(int(3 * thing.x / SIZE), 2)]
    return f"{row} {column}"
