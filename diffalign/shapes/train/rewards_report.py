"""Held-out accuracy of a trained reward: does it prefer the true caption to a wrong one, and the right image to its near copy?"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffalign.shapes.captions import WRONGS, draw_scene, relations, short_caption, wrong_caption
from diffalign.shapes.prompts import color_pairs, relation_pairs
from diffalign.shapes.scenes import Scene, render
from diffalign.shapes.train import rewards_scenes as worlds
from diffalign.shapes.train.card import interval

Score = Callable[[UInt8[Tensor, "b h w 3"], list[str]], Float[Tensor, " b"]]
SPLITS = ("train", "validation", "test")
RETRIEVAL_NOTE = (
    "Figures: how often the true caption scores above a wrong one (captions), and how often the right image scores above its twin, a scene"
    " that differs in one respect (images). Validation and test scenes each hold a colour or a relation never seen in training; train"
    " scenes are new scenes of seen combinations."
)
EVALUATION_SEED = 1_000_000  # added to the training seed, so that "train" scenes are new ones too


def held_out_scene(rng: np.random.Generator, split: str) -> Scene:
    """A scene of the split; for validation and test one that holds a colour pair or a relation belonging to that split."""
    while True:
        scene = draw_scene(rng, split)
        if split == "train" or _belongs(scene, split):
            return scene


@cache
def _held_out(split: str) -> tuple[frozenset, frozenset]:
    return frozenset(color_pairs(split)), frozenset(relation_pairs(split))


def _belongs(scene: Scene, split: str) -> bool:
    colors, sides = _held_out(split)
    things = scene.things
    if any((t.shape, t.color) in colors for t in things):
        return True
    return any((a.shape, r) in sides for a in things for b in things if a.shape != b.shape for r in relations(a, b))


def caption_cases(rng: np.random.Generator, split: str, kind: str, count: int) -> tuple[Tensor, list[str], list[str]]:
    """`count` images, each with a true caption and one wrong in respect `kind`, both with the same carrier."""
    images, true, wrong = [], [], []
    while len(images) < count:
        scene = held_out_scene(rng, split)
        for _ in range(6):
            caption, found = wrong_caption(rng, scene)
            if found == kind:
                carrier = worlds.split_carrier(caption)[0]
                images.append(render(scene))
                true.append(carrier + worlds.split_carrier(short_caption(rng, scene))[1])
                wrong.append(caption)
                break
    return torch.from_numpy(np.stack(images)), true, wrong


def image_cases(rng: np.random.Generator, split: str, kind: str, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """`count` images, as many twins that differ in respect `kind`, and captions true of the first and false of the second."""
    images, twins, captions = [], [], []
    while len(images) < count:
        scene = held_out_scene(rng, split)
        other = worlds.twin(rng, scene, kind, train_only=split == "train")
        if other is None:
            continue
        for _ in range(6):
            caption = short_caption(rng, scene)
            claim = torch.tensor([worlds.read_claim(caption).encode()])
            if not worlds.holds(worlds.tabulate([other[0]]), claim).item():
                images.append(render(scene))
                twins.append(render(other[0]))
                captions.append(caption)
                break
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(twins)), captions


def retrieval(score: Score, split: str, seed: int, per_kind: int) -> dict[str, dict]:
    """{"captions": {kind: interval, "all": ...}, "images": {...}} over `per_kind` cases of each kind of wrong; ties count as errors."""
    rng = np.random.default_rng([seed + EVALUATION_SEED, SPLITS.index(split)])
    right: dict[str, dict[str, int]] = {"captions": {}, "images": {}}
    for kind in WRONGS:
        images, true, wrong = caption_cases(rng, split, kind, per_kind)
        right["captions"][kind] = int((score(images, true) > score(images, wrong)).sum())
        images, twins, captions = image_cases(rng, split, kind, per_kind)
        right["images"][kind] = int((score(images, captions) > score(twins, captions)).sum())
    return {
        side: {kind: interval(n, per_kind) for kind, n in counts.items()} | {"all": interval(sum(counts.values()), per_kind * len(WRONGS))}
        for side, counts in right.items()
    }
