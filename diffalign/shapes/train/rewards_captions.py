"""What the captioner behind `shapes-reward` is taught on: scenes with near copies, and captions true of one and mostly false of the other.

A generator draws things that no caption mentions, and GenEval's rules forgive most of them. So scenes here are richer than those the
generators learn (up to four things of any kinds), and a caption may name a part of its scene, as far as the rules call it true.

Held-out combinations must not be *taught as false*. No training caption says "a circle right of", so a plain softmax would learn that
"right" never follows "circle", whatever the picture shows. At such places the held-out words are left out of the softmax (`blocked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from diffalign.rules import RELATIONS
from diffalign.shapes.captions import draw_scene, long_caption, relations
from diffalign.shapes.prompts import CARRIERS, NUMBER_WORDS, article, color_pairs, plural, relation_pairs
from diffalign.shapes.scenes import COLORS, SHAPES, Scene, Thing, place, render
from diffalign.shapes.train import rewards_scenes as worlds

MIXED = 0.35  # share of scenes with two to four things of any kinds; the rest are the generators' own scenes
LONG = 0.1  # share of captions that say each thing's size and place, of scenes with one or two things
CAPTIONS = 4  # kept of each scene
TRIES = 10  # drawn for these; those that are false of the near copy come first
_COLORS = tuple(COLORS)
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def draw_rich_scene(rng: np.random.Generator) -> Scene:
    """A training scene: one of the generators', or two to four things of any kinds. Never a held-out pair."""
    if rng.random() >= MIXED:
        return draw_scene(rng)
    pairs = color_pairs("train")
    while True:
        kinds = [pairs[i] for i in rng.integers(len(pairs), size=rng.integers(2, 5))]
        scene = place(rng, kinds)
        if scene is not None and worlds.scene_allowed(scene):
            return scene


def true_caption(rng: np.random.Generator, scene: Scene) -> str:
    """A short caption that holds of the scene by GenEval's rules; it may be silent on a part of it."""
    by_shape: dict[str, list[Thing]] = {}
    for thing in scene.things:
        by_shape.setdefault(thing.shape, []).append(thing)
    several = [shape for shape, things in by_shape.items() if len(things) > 1]
    form = rng.random()
    if several and form < 0.6:
        body = _count_body(rng, by_shape[several[rng.integers(len(several))]])
    elif len(by_shape) > 1 and form < 0.85:
        body = _pair_body(rng, by_shape)
    else:
        body = article(_name(rng, list(by_shape.values())[rng.integers(len(by_shape))], 0.7))
    return CARRIERS[rng.integers(len(CARRIERS))] + body


def _count_body(rng: np.random.Generator, things: Sequence[Thing]) -> str:
    color = f"{things[0].color} " if len({t.color for t in things}) == 1 and rng.random() < 0.35 else ""
    return f"{NUMBER_WORDS[len(things)]} {color}{plural(things[0].shape)}"


def _pair_body(rng: np.random.Generator, by_shape: dict[str, list[Thing]]) -> str:
    shapes = list(by_shape)
    first, second = (by_shape[shapes[i]] for i in rng.permutation(len(shapes))[:2])
    colored = 0.85 if rng.random() < 0.5 else 0.15  # mostly both or neither
    joint = "and"
    if len(first) == len(second) == 1 and rng.random() < 0.65:
        held = relations(first[0], second[0])
        joint = held[rng.integers(len(held))] if held else "and"
    return f"{article(_name(rng, first, colored))} {joint} {article(_name(rng, second, colored))}"


def _name(rng: np.random.Generator, things: Sequence[Thing], colored: float) -> str:
    """A thing of one shape; its colour is said only where all of that shape share it, since the rules ask the clearest one alone."""
    named = len({t.color for t in things}) == 1 and rng.random() < colored
    return f"{things[0].color} {things[0].shape}" if named else things[0].shape


@dataclass
class CaptionPool:
    """Scenes 0..n-1 and their near copies n..2n-1, and of each CAPTIONS captions that hold of it."""

    images: UInt8[Tensor, "m h w 3"]
    ids: Int[Tensor, "m k l"]
    blocked: UInt8[Tensor, "m k l"]  # row of `blocked_words` at each predicted token
    differs: Bool[Tensor, "m k"]  # whether the caption is false of the other one of the two

    @property
    def other(self) -> Int[Tensor, " m"]:
        """Index of each scene's near copy."""
        return torch.arange(len(self.images)).roll(len(self.images) // 2)


def draw_pool(count: int, seed: int, tokenizer: CLIPTokenizer) -> CaptionPool:
    """`count` training scenes and a near copy of each. The same seed gives the same pool."""
    rng = np.random.default_rng([seed, 11])
    scenes, copies = [], []
    for _ in tqdm(range(count), desc="drawing scenes and near copies", mininterval=5):
        found = None
        while found is None:
            scene = draw_rich_scene(rng)
            found = worlds.twin(rng, scene)
        scenes.append(scene)
        copies.append(found[0])
    both = scenes + copies
    captions, differs = [], []
    for i, scene in enumerate(tqdm(both, desc="captions", mininterval=5)):
        texts, wrong = captions_against(rng, scene, both[(i + count) % (2 * count)])
        captions.append(texts)
        differs.append(wrong)
    images = torch.from_numpy(np.stack([render(scene) for scene in tqdm(both, desc="drawing", mininterval=5)]))
    ids = tokenizer([t for texts in captions for t in texts], padding="max_length", truncation=True, return_tensors="pt").input_ids
    length = ids.shape[1]
    rows = torch.tensor([blocked_rows(t, length - 1) for texts in captions for t in texts], dtype=torch.uint8)
    return CaptionPool(images, ids.view(2 * count, CAPTIONS, length), rows.view(2 * count, CAPTIONS, length - 1), torch.tensor(differs))


def captions_against(rng: np.random.Generator, scene: Scene, other: Scene) -> tuple[list[str], list[bool]]:
    """CAPTIONS captions of a scene, those false of `other` first, and which are; in the last place a long one at times."""
    drawn = [true_caption(rng, scene) for _ in range(TRIES)]
    claims = torch.tensor([worlds.read_claim(caption).encode() for caption in drawn])
    differs = ~worlds.holds(worlds.tabulate([other]), claims)[0]
    order = sorted(range(TRIES), key=lambda k: not differs[k])
    keep = [*order[: CAPTIONS - 1], order[-1]]  # the last is one that tells them not apart, where there is one
    texts, wrong = [drawn[k] for k in keep], [bool(differs[k]) for k in keep]
    if len(scene.things) <= 2 and rng.random() < LONG * CAPTIONS:
        texts[-1] = long_caption(rng, scene)
        wrong[-1] = len(other.things) <= 2 and not _described(rng, scene) <= _described(rng, other)
    return texts, wrong


def _described(rng: np.random.Generator, scene: Scene) -> set[str]:
    return set(worlds.split_carrier(long_caption(rng, scene))[1].split(" and "))


# Rows of `blocked_words`: 0 blocks nothing; then one a subject's shape (which relations), then one a colour and relation (which nouns).
_AFTER_SUBJECT = 1
_NOUN = _AFTER_SUBJECT + len(SHAPES)


def blocked_rows(caption: str, length: int) -> list[int]:
    """The row of `blocked_words` for each predicted token of a caption: word w is predicted at place w, then the end token."""
    words = caption.split()
    rows = [0] * length
    nouns = {*SHAPES, *(plural(s) for s in SHAPES)}
    relation, first = "", True
    for w, word in enumerate(words):
        if word in nouns:
            color = words[w - 1] if words[w - 1] in COLORS else ""
            rows[w] = _noun_row(color, relation)
            if first and word in SHAPES and w + 1 < length:
                rows[w + 1] = _AFTER_SUBJECT + SHAPES.index(word)
            first = False
        elif not first and not relation:
            relation = next((r for r in RELATIONS if r.split()[0] == word and words[w - 1] in SHAPES), "")
    return rows


def _noun_row(color: str, relation: str) -> int:
    c = _COLORS.index(color) + 1 if color else 0
    r = RELATIONS.index(relation) + 1 if relation else 0
    return _NOUN + c * (len(RELATIONS) + 1) + r


def blocked_words(tokenizer: CLIPTokenizer) -> Bool[Tensor, "rows vocabulary"]:
    """Which continuations would make a held-out pair at a place of each kind."""
    table = torch.zeros(_NOUN + (len(COLORS) + 1) * (len(RELATIONS) + 1), len(tokenizer), dtype=torch.bool)
    colors, sides = _held_out()
    for s, shape in enumerate(SHAPES):
        for relation in RELATIONS:
            if (shape, relation) in sides:
                table[_AFTER_SUBJECT + s, _token(tokenizer, relation.split()[0])] = True
    for color in ("", *COLORS):
        for relation in ("", *RELATIONS):
            for shape in SHAPES:
                if (shape, color) in colors or (relation and (shape, _OPPOSITE[relation]) in sides):
                    for noun in (shape, plural(shape)):
                        table[_noun_row(color, relation), _token(tokenizer, noun)] = True
    return table


@cache
def _held_out() -> tuple[frozenset, frozenset]:
    splits = ("validation", "test")
    return frozenset(p for s in splits for p in color_pairs(s)), frozenset(p for s in splits for p in relation_pairs(s))


def _token(tokenizer: CLIPTokenizer, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens of this tokenizer; the captioner needs the world's own, one token a word")
    return ids[0]
