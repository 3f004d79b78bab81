"""Image files as people have them, to what a reward wants: "3 h w" floats in [0, 1], RGB, upright.

Levels are divided by the largest of their depth: 255, or 65535 where Pillow keeps 16 bits (grey alone; of 16-bit colour it gives the high
byte). Transparent pixels are laid on white, as a page shows them: dropping alpha would show colours that nobody sees. Of an animation the
first frame counts. EXIF says which way is up. ICC profiles are not applied: the rewards' own code does not either.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
ON_WHITE = "transparent parts laid on white"
FIRST_FRAME = "animated or of several pages; the first counts"
NO_EXIF = "damaged EXIF data, left aside"

_told: set[str] = set()


@dataclass(frozen=True)
class Picture:
    """levels: "h w 3", uint8 as long as nothing is lost by it (a quarter of the memory), else floats in [0, 1].

    notes: what was decided on the way, from the constants above.
    """

    levels: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def pixels(self) -> Float[np.ndarray, "h w 3"]:
        """In [0, 1]."""
        return self.levels.astype(np.float32) / 255 if self.levels.dtype == np.uint8 else self.levels

    @property
    def bytes(self) -> UInt8[np.ndarray, "h w 3"]:
        """Rounded to 8 bits."""
        return self.levels if self.levels.dtype == np.uint8 else (self.levels * 255).round().astype(np.uint8)

    def tensor(self) -> Float[Tensor, "3 h w"]:
        import torch

        return torch.from_numpy(self.pixels).permute(2, 0, 1).contiguous()


def read_image(path: str | Path) -> Float[Tensor, "3 h w"]:
    """An image file as floats in [0, 1]. What had to be decided is logged, each kind once.

    Raises ValueError naming the file where it is empty, cut short, no image or too large, OSError where it cannot be read at all.
    """
    try:
        picture = decode(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for note in picture.notes:
        if note not in _told:
            _told.add(note)
            logger.warning("%s: %s (said once)", path, note)
    return picture.tensor()


def read_pixels(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """An image file in 8 bits. Raises ValueError naming the file where it is cut short or no image, OSError where it cannot be read."""
    try:
        return decode(path.read_bytes()).bytes
    except ValueError as error:
        raise ValueError(f"{path} is {error}; delete it and run again") from error


def decode(data: bytes) -> Picture:
    """The bytes of an image file. Raises ValueError with the reason, which does not know the file's name."""
    if not data:
        raise ValueError("not a whole image (the file is empty)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            _require_reasonable(image)
            return _picture(image)
    except UnidentifiedImageError as error:
        raise ValueError("not a whole image (of no known format)") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large an image ({error})") from error
    except _Refused as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # decoders raise whatever comes: OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"not a whole image ({' '.join(str(error).split()) or type(error).__name__})") from error


def from_pillow(image: Image.Image) -> Picture:
    """A picture that Pillow holds, read as its file would be. Raises ValueError with the reason where it cannot be."""
    try:
        return _picture(image)
    except _Refused as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # pictures are loaded when first used, and their files may be cut short
        raise ValueError(f"not a whole image ({' '.join(str(error).split()) or type(error).__name__})") from error


class _Refused(Exception):
    """A whole image that we do not take, with the sentence to say."""


def _require_reasonable(image: Image.Image) -> None:
    """Pillow warns from here on and refuses from twice as much; a small file that unpacks to gigabytes should stop nothing."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise _Refused(f"too large an image ({image.width} x {image.height} pixels; at most {most} are read)")


def _picture(image: Image.Image) -> Picture:
    notes = [FIRST_FRAME] if getattr(image, "is_animated", False) else []
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # older Pillow opened 16-bit PNG as "I"
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # viewers show such a file as it lies, and so do we
        notes.append(NO_EXIF)
    if sixteen:
        grey = np.asarray(image).astype(np.float32) / 65535
        levels = np.repeat(grey[..., None], 3, axis=2)
    elif image.mode in ("I", "F"):
        raise _Refused(f"an image with 32-bit pixels (mode {image.mode}), whose range nothing tells; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        levels, alpha = rgba[..., :3], rgba[..., 3:].astype(np.float32) / 255
        if alpha.min() < 1:
            notes.append(ON_WHITE)
            levels = (levels * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)  # whole levels, as a page shows
    else:
        levels = np.asarray(image.convert("RGB"))
    return Picture(np.ascontiguousarray(levels), tuple(notes))


def is_image_name(name: str) -> bool:
    """Whether the name says that the file is an image. What is inside decides the format."""
    return name.lower().endswith(SUFFIXES)
