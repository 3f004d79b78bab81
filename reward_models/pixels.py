"""Differentiable preprocessing: what an image processor does to a PIL image, done to a float tensor, with gradients.

Resizing is bicubic with antialiasing; the geometries are those of open_clip, transformers and LLaVA. Pillow resizes across,
stores whole bytes cut to 0..255, resizes down, and stores bytes again. Those two rounds are part of what the models were
trained on and are repeated here:

    forward     y = floor(255 x + 1/2) / 255, cut to [0, 1], after each pass
    backward    the gradient of y = x: straight through

Rounding has no useful gradient, and that of cutting would be zero all over a white ground, where bicubic overshoots.
Straight through, a gradient is that of the resizing without bytes, taken at the pixels with them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from diffalign.types import Images

Resized = Float[Tensor, "b 3 height width"]
Square = Float[Tensor, "b 3 size size"]
Channels = Float[Tensor, "3 1 1"]

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, LAION's, BLIP's
GEOMETRIES = ("shortest+crop", "longest+pad", "squash", "square+mean")
ONE = 1 << 22  # Pillow's weights are whole numbers, of which this many make one


@dataclass(frozen=True)
class Preprocess:
    """From images "b 3 h w" in [0, 1] to normalised "b 3 size size", in float32 or better."""

    size: int
    """Side of the result, in pixels."""
    mean: tuple[float, float, float]
    """Subtracted from each channel."""
    std: tuple[float, float, float]
    """Each channel is divided by it then."""
    geometry: str = "shortest+crop"
    """"shortest+crop" scales the shorter side to `size` and crops the centre; "longest+pad" scales the longer side and pads
    with black, before normalisation; "squash" scales both sides; "square+mean" first pads to a square with `mean` in whole
    8-bit levels, half of it (rounded down) before and half after."""
    round_crop: bool = False
    """An odd crop margin is rounded half to even (torchvision, open_clip) rather than down (transformers)."""
    bytes_between: bool = True
    """Resize as Pillow does, see `resize`. False: floats throughout, as torchvision resizes a tensor (HPS). That is also the
    smooth function whose gradient True gives: switch it off, with dataclasses.replace, to compare with finite differences."""

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}; got {self.geometry!r}")
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"size must be positive, mean and std three numbers, std positive; got {self.size}, {self.mean}, {self.std}")

    def __call__(self, images: Images) -> Square:
        return normalise(self.shape(images.to(torch.promote_types(images.dtype, torch.float32))), self.mean, self.std)

    def shape(self, images: Images) -> Square:
        """The geometry alone: "b 3 size size", in [0, 1] where there are bytes between."""
        height, width = images.shape[-2:]
        n = self.size
        if self.geometry == "square+mean":
            images = self._square(images)
        if self.geometry in ("squash", "square+mean"):
            return resize(images, n, n, self.bytes_between)
        if self.geometry == "shortest+crop":
            short, long = min(height, width), max(height, width)
            longer = int(n * long / short)  # truncated, as torchvision and transformers do
            images = resize(images, *((n, longer) if height <= width else (longer, n)), self.bytes_between)
            top, left = (self._margin(side) for side in images.shape[-2:])
            return images[..., top : top + n, left : left + n]
        scale = n / max(height, width)
        images = resize(images, max(round(height * scale), 1), max(round(width * scale), 1), self.bytes_between)
        below, right = (n - side for side in images.shape[-2:])
        return F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))

    def _square(self, images: Images) -> Square:
        height, width = images.shape[-2:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        ground = constant(tuple(int(255 * value) / 255 for value in self.mean), images.device, images.dtype)
        canvas = ground.expand(len(images), 3, side, side).clone()
        canvas[..., top : top + height, left : left + width] = images
        return canvas

    def _margin(self, side: int) -> int:
        return round((side - self.size) / 2) if self.round_crop else (side - self.size) // 2


def normalise(images: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
    """(images - mean) / std, channel by channel."""
    mean, std = (constant(tuple(values), images.device, images.dtype) for values in (mean, std))
    return (images - mean) / std


@functools.lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Channels:
    """Three numbers as a tensor, made once: copying them to a graphics card in every call would make every call wait for it."""
    with torch.inference_mode(False):  # autograd later refuses tensors made in inference mode
        return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1)


def resize(images: Images, height: int, width: int, bytes_between: bool = True) -> Resized:
    """Bicubic with antialiasing. bytes_between: across, whole bytes, down, whole bytes, as Pillow; else floats, in one pass.

    With bytes the result is in [0, 1], and Pillow's own for images of whole bytes (on Apple's graphics, which know no
    float64, but for a level here and there); without, bicubic overshoots. A side that has its length already is left alone.
    """
    if images.shape[-2:] == (height, width):
        return images
    if not bytes_between:
        return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    levels = images * 255
    if images.shape[-1] != width:
        levels = _ToBytes.apply(levels, weights(images.shape[-1], width, images.device))
    if images.shape[-2] != height:
        levels = _ToBytes.apply(levels.mT, weights(images.shape[-2], height, images.device)).mT
    return levels / 255


class _ToBytes(torch.autograd.Function):
    """A pass of Pillow over the last side of levels in 0..255: weighted sums, to the nearest level, half up, cut to 0..255.

    Sums are exact in float64; in float32 half a level, which regular patterns hit often, would be rounded by chance.
    The gradient is that of the sums alone.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, levels: Float[Tensor, "b 3 n m"], fixed: Float[Tensor, "k m"]) -> Float[Tensor, "b 3 n k"]:
        ctx.save_for_backward(fixed)
        with torch.autocast(levels.device.type, enabled=False):
            sums = levels.to(fixed.dtype) @ fixed.mT
        return ((sums + ONE / 2) / ONE).floor().clamp(0, 255).to(levels.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Float[Tensor, "b 3 n k"]) -> tuple[Float[Tensor, "b 3 n m"], None]:
        (fixed,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ (fixed / ONE).to(gradient.dtype), None


@functools.lru_cache(maxsize=64)
def weights(before: int, after: int, device: torch.device) -> Float[Tensor, "after before"]:
    """What each pixel of a side weighs in each pixel of the resized one: Keys' cubic with a = -1/2, widened where it shrinks.

    In units of 1 / ONE, whole numbers as Pillow has them: a row may miss ONE by a few units, which decides ties.
    """
    scale = before / after
    wide = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale
    first = np.maximum((centres - 2 * wide + 0.5).astype(int), 0)[:, None]  # Pillow's bounds, truncated toward 0
    end = np.minimum((centres + 2 * wide + 0.5).astype(int), before)[:, None]
    place = np.arange(before)
    x = np.abs((place - centres[:, None] + 0.5) / wide)
    cubic = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, -0.5 * (((x - 5) * x + 8) * x - 4), 0.0))
    cubic[(place < first) | (place >= end)] = 0.0
    fixed = cubic / cubic.sum(axis=1, keepdims=True) * ONE
    fixed = np.trunc(fixed + np.copysign(0.5, fixed))
    with torch.inference_mode(False):
        return torch.tensor(fixed, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
