"""Kinds of picture on which resizing goes wrong in different ways, as Pillow images of mode RGB, and what is asked of them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.reward_models.test_pixels import photo


def _gradient(side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    return np.stack([x * 255 // (side - 1), y * 255 // (side - 1), (x + y) * 255 // (2 * side - 2)], axis=2).astype(np.uint8)


def _edges(height: int, width: int) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    picture[::37] = 255
    picture[:, ::23] = (255, 0, 0)
    picture[height // 4 : height // 2, width // 3 : 2 * width // 3] = (0, 0, 255)
    return picture


def _checkerboard(side: int) -> np.ndarray:
    """Of single pixels: shrunk, it is half a level everywhere, where the last bit decides."""
    return np.repeat(((np.indices((side, side)).sum(axis=0) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2)


def fading(side: int = 300) -> Image.Image:
    """RGBA, opaque in the middle."""
    y, x = np.mgrid[:side, :side]
    alpha = (255 - 2 * np.hypot(y - side / 2, x - side / 2)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([photo(side, side, 3), alpha]), "RGBA")


def on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    return white.convert("RGB")


def drawing(side: int = 512) -> np.ndarray:
    """Shapes with hard edges, most of it white."""
    picture = np.full((side, side, 3), 255, np.uint8)
    picture[side // 3 : side // 2, side // 5 : 4 * side // 5] = (200, 30, 30)
    picture[side // 8 : side // 5, side // 8 : side // 5] = 0
    return picture


def kinds() -> dict[str, Image.Image]:
    """Eleven of them."""
    arrays = {
        "photo": photo(512, 512),
        "wide": photo(427, 640),
        "tall": photo(900, 300),
        "noise": np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8),
        "gradient": _gradient(512),
        "edges": _edges(401, 299),
        "enlarged": photo(75, 100),
        "checkerboard": _checkerboard(512),
        "white": np.full((512, 512, 3), 255, np.uint8),
        "grey": np.repeat(photo(512, 512, 1)[..., :1], 3, axis=2),
    }
    return {name: Image.fromarray(array) for name, array in arrays.items()} | {"transparent": on_white(fading())}
