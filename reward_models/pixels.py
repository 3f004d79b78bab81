"""Differentiable preprocessing: what an image processor does to a PIL image, done to a float tensor, with gradients.

Resizing is bicubic with antialiasing, as PIL's; the geometries are those of open_clip, transformers and LLaVA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffalign.types import Images

Resized = Float[Tensor, "b 3 height width"]
Square = Float[Tensor, "b 3 size size"]

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, LAION's, BLIP's
GEOMETRIES = ("shortest+crop", "longest+pad", "squash", "square+mean")


@dataclass(frozen=True)
class Preprocess:
    """From images "b 3 h w" in [0, 1] to normalised "b 3 size size", in float32 or better.

    geometry: "shortest+crop" scales the shorter side to `size` and crops the centre; "longest+pad" scales the longer side and pads with
    black, before normalisation; "squash" scales both sides; "square+mean" first pads to a square with `mean` in whole 8-bit levels, half
    of it (rounded down) before and half after. round_crop: an odd crop margin is rounded half to even (torchvision, open_clip) rather than
    down (transformers).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    geometry: str = "shortest+crop"
    round_crop: bool = False

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}; got {self.geometry!r}")
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"size must be positive, mean and std three numbers, std positive; got {self.size}, {self.mean}, {self.std}")

    def __call__(self, images: Images) -> Square:
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        images = self.shape(images)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def shape(self, images: Images) -> Square:
        """The geometry alone: "b 3 size size" in [0, 1]."""
        height, width = images.shape[-2:]
        n = self.size
        if self.geometry == "square+mean":
            images = self._square(images)
        if self.geometry in ("squash", "square+mean"):
            return resize(images, n, n)
        if self.geometry == "shortest+crop":
            short, long = min(height, width), max(height, width)
            longer = int(n * long / short)  # truncated, as torchvision and transformers do
            images = resize(images, *((n, longer) if height <= width else (longer, n)))
            top, left = (self._margin(side) for side in images.shape[-2:])
            return images[..., top : top + n, left : left + n]
        scale = n / max(height, width)
        images = resize(images, max(round(height * scale), 1), max(round(width * scale), 1))
        below, right = (n - side for side in images.shape[-2:])
        return F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))

    def _square(self, images: Images) -> Square:
        height, width = images.shape[-2:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        ground = images.new_tensor([int(255 * value) / 255 for value in self.mean])
        canvas = ground.view(3, 1, 1).expand(len(images), 3, side, side).clone()
        canvas[..., top : top + height, left : left + width] = images
        return canvas

    def _margin(self, side: int) -> int:
        return round((side - self.size) / 2) if self.round_crop else (side - self.size) // 2


def resize(images: Images, height: int, width: int) -> Resized:
    """Bicubic with antialiasing, across and then down, cut to [0, 1] after each: bicubic overshoots, and PIL stores bytes in between.

    A side that has its length already is left alone.
    """
    if images.shape[-1] != width:
        images = _bicubic(images, images.shape[-2], width)
    if images.shape[-2] != height:
        images = _bicubic(images, height, width)
    return images


def _bicubic(images: Images, height: int, width: int) -> Resized:
    return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
