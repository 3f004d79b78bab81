"""What Qwen's vision towers read: an image resized to whole tiles and cut into rows of pixels, in torch, with gradients.

The numbers are those of transformers' Qwen2VLImageProcessor: sides are multiples of patch x merge, the number of pixels lies between two
bounds, the aspect ratio stays as near as that allows. With equal bounds it is HPSv3's fixed tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.files import read_json
from diffalign.reward_models.pixels import normalise, resize
from diffalign.types import Images

MOST_ASPECT = 200  # the original refuses thinner images


@dataclass(frozen=True)
class QwenPixels:
    """From images "b 3 h w" in [0, 1] to patches "b n d" and their grid (rows, columns), in float32 or better."""

    patch: int
    """Side of a patch, in pixels."""
    merge: int
    """Patches a side that become one token."""
    temporal: int
    """Frames a patch spans; an image is repeated."""
    mean: tuple[float, float, float]
    """Subtracted from each channel."""
    std: tuple[float, float, float]
    """Each channel is divided by it then."""
    least: int
    """Pixels of a resized image, at least."""
    most: int
    """Pixels of a resized image, at most."""
    bytes_between: bool = True
    """Resize as Pillow does; as the field of this name of `Preprocess`."""

    def __call__(self, images: Images) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        height, width = self.size(*images.shape[-2:])
        resized = resize(images, height, width, self.bytes_between)
        patches = self.patchify(normalise(resized, self.mean, self.std))
        return patches, (height // self.patch, width // self.patch)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing. Raises ValueError for an image more than 200 times as long as wide."""
        if max(height, width) > MOST_ASPECT * min(height, width):
            raise ValueError(f"an image of {height}x{width} is too thin: the longer side may be {MOST_ASPECT} times the shorter at most")
        tile = self.patch * self.merge
        high, wide = round(height / tile) * tile, round(width / tile) * tile
        if high * wide > self.most:
            shrink = math.sqrt(height * width / self.most)
            return max(tile, math.floor(height / shrink / tile) * tile), max(tile, math.floor(width / shrink / tile) * tile)
        if high * wide < self.least:
            grow = math.sqrt(self.least / (height * width))
            return math.ceil(height * grow / tile) * tile, math.ceil(width * grow / tile) * tile
        return high, wide

    def patchify(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Patches row by row of merged tiles, the merge x merge patches of a tile together; a patch is (channel, frame, row, column)."""
        b, _, height, width = images.shape
        p, m = self.patch, self.merge
        tiles = images.view(b, 3, height // (m * p), m, p, width // (m * p), m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
        frames = tiles.unsqueeze(6).expand(*tiles.shape[:6], self.temporal, p, p)
        return frames.reshape(b, (height // p) * (width // p), 3 * self.temporal * p * p)


def read_qwen_pixels(path: Path) -> QwenPixels:
    """The preprocessing a Qwen-VL preprocessor_config.json describes, in any of the forms its releases have.

    Raises ValueError, naming the file, where it describes another one.
    """
    config = read_json(path, ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"))
    if config.get("resample", 3) != 3:
        raise ValueError(f"{path}: resample must be 3 (bicubic), got {config['resample']!r}")
    size = config.get("size") or {}
    least = config.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge")
    most = config.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge")
    if not (least and most and least <= most):
        raise ValueError(f"{path} gives no bounds on pixels (min_pixels and max_pixels, or size), got {least} and {most}")
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    return QwenPixels(config["patch_size"], config["merge_size"], config["temporal_patch_size"], mean, std, least, most)
