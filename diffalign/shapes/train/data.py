"""Training data of the shapes world: scenes drawn from a seed, their images, captions and token ids. Nothing is stored on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from diffalign.shapes.captions import draw_scene, long_caption, short_caption
from diffalign.shapes.scenes import Scene, render

CAPTIONS_PER_SCENE = 4  # three short, one long


@dataclass
class ShapesData:
    """Scenes with their images ("n h w 3" uint8) and captions (n lists of CAPTIONS_PER_SCENE strings)."""

    scenes: list[Scene]
    images: UInt8[Tensor, "n h w 3"]
    captions: list[list[str]]


def draw(count: int, seed: int, split: str = "train") -> ShapesData:
    """`count` scenes of a split; the same seed gives the same data."""
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    scenes, images, captions = [], [], []
    for _ in tqdm(range(count), desc=f"drawing {split} scenes", mininterval=5):
        scene = draw_scene(rng, split)
        scenes.append(scene)
        images.append(render(scene))
        captions.append([short_caption(rng, scene) for _ in range(CAPTIONS_PER_SCENE - 1)] + [long_caption(rng, scene)])
    return ShapesData(scenes, torch.from_numpy(np.stack(images)), captions)


def to_model_range(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """8-bit images to floats in [-1, 1], channels first."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize(tokenizer: Callable, captions: list[list[str]]) -> Int[Tensor, "n k l"]:
    """Token ids of every caption, padded to the tokenizer's length."""
    flat = [caption for group in captions for caption in group]
    ids = tokenizer(flat, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    return ids.view(len(captions), -1, ids.shape[-1])
