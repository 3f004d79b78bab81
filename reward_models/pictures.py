"""Pictures as people hold them, in a list: Pillow's, or tensors "3 h w" in [0, 1], each of its own size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffalign.images import from_pillow
from diffalign.types import Images

Picture = Image.Image | Float[Tensor, "3 h w"]
Pictures = Sequence[Picture]


def by_size(name: str, pictures: Pictures, device: torch.device) -> Iterator[tuple[list[int], Images]]:
    """Batches of one size each, on `device` and in float32 or better, with the places of their pictures in the list.

    A picture of Pillow is read as `diffalign.images.read_image` reads its file: upright, and what is transparent on white.
    name: of the reward, for errors. Raises ValueError for a picture that cannot be read, naming its place in the list.
    """
    tensors = [_tensor(name, place, picture).to(device) for place, picture in enumerate(pictures)]
    places: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.shape, []).append(place)
    for same in places.values():
        yield same, torch.stack([tensors[place] for place in same])


def check_pictures(name: str, pictures: Pictures) -> None:
    """Raises TypeError for anything but pictures of Pillow and float tensors "3 h w", ValueError for one that is not RGB or is empty."""
    for place, picture in enumerate(pictures):
        if isinstance(picture, Image.Image):
            continue
        if not isinstance(picture, Tensor) or picture.ndim != 3:
            got = f"of shape {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
            raise TypeError(
                f"reward {name!r}: images must be a tensor 'b 3 h w' in [0, 1], or a list of pictures of PIL and tensors '3 h w'; "
                f"images[{place}] is {got}"
            )
        if not picture.is_floating_point():
            raise TypeError(f"reward {name!r}: images[{place}] must be floats in [0, 1], got {picture.dtype}; divide 8-bit values by 255")
        if picture.shape[0] != 3 or 0 in picture.shape:
            raise ValueError(f"reward {name!r}: images[{place}] must have shape (3, h, w), got {tuple(picture.shape)}")


def _tensor(name: str, place: int, picture: Picture) -> Float[Tensor, "3 h w"]:
    if isinstance(picture, Tensor):
        return picture.to(torch.promote_types(picture.dtype, torch.float32))
    try:
        return from_pillow(picture).tensor()
    except ValueError as error:
        raise ValueError(f"reward {name!r}: images[{place}] is {error}") from error
