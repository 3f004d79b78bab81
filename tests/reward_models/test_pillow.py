"""Preprocessing of every reward against Pillow's own bytes on eleven kinds of picture, and where its gradients are zero."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess, resize
from diffalign.reward_models.qwen_pixels import QwenPixels
from tests.reward_models.pictures import drawing, kinds
from tests.reward_models.test_pixels import tensor_of

KINDS = kinds()
SIZES = [(224, 224), (336, 336), (384, 384), (448, 448), (149, 224)]
PILLOW = ["clip-l14", "clip-h14", "clip-bigg14", "pickscore", "laion-aesthetic-v2", "aesthetic-v2.5", "mps", "image-reward", "vqascore"]
LEVEL = 1 / 255


def by_pillow(picture: Image.Image, pixels: Preprocess) -> torch.Tensor:
    """What the original's image processor does, on bytes: "3 size size", not normalised."""
    n, (width, height) = pixels.size, picture.size
    if pixels.geometry == "square+mean":
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in pixels.mean))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square
    if pixels.geometry in ("square+mean", "squash"):
        resized = picture.resize((n, n), Image.Resampling.BICUBIC)
    else:
        longer = int(n * max(width, height) / min(width, height))
        resized = picture.resize((longer, n) if width > height else (n, longer), Image.Resampling.BICUBIC)
        margins = [(side - n) / 2 for side in resized.size]
        left, top = (round(margin) if pixels.round_crop else int(margin) for margin in margins)
        resized = resized.crop((left, top, left + n, top + n))
    return tensor_of(np.array(resized))[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_resizing_is_pillows_to_the_byte(kind, size):
    theirs = tensor_of(np.array(KINDS[kind].resize(size[::-1], Image.Resampling.BICUBIC)))
    difference = (resize(tensor_of(np.array(KINDS[kind])), *size) - theirs).abs()
    assert difference.max() <= 1.001 * LEVEL
    assert difference.mean() < 1e-5  # and 0 where measured; a level here and there would be no harm


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_reward_sees_is_what_its_original_saw(load, name, kind):
    pixels = dataclasses.replace(load_once(load, name).pixels, mean=(0.0,) * 3, std=(1.0,) * 3)
    if pixels.geometry == "square+mean":  # whose mean is a colour, too
        pixels = load_once(load, name).pixels
    ours = pixels(tensor_of(np.array(KINDS[kind])))[0] * torch.tensor(pixels.std).view(3, 1, 1) + torch.tensor(pixels.mean).view(3, 1, 1)
    difference = (ours - by_pillow(KINDS[kind], pixels)).abs()
    assert difference.max() <= 1.001 * LEVEL
    assert difference.mean() < 1e-4


@pytest.mark.parametrize("name", ["hpsv3", "vlm-judge"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_qwen_sees_is_resized_by_pillow(load, name, kind):
    pixels: QwenPixels = load_once(load, name).pixels
    picture = KINDS[kind]
    height, width = pixels.size(picture.height, picture.width)
    theirs = tensor_of(np.array(picture.resize((width, height), Image.Resampling.BICUBIC)))
    as_it_is = dataclasses.replace(pixels, least=1, most=1 << 40)
    difference = (pixels(tensor_of(np.array(picture)))[0] - as_it_is(theirs)[0]).abs() * max(pixels.std)
    assert difference.max() <= 1.001 * LEVEL
    assert difference.mean() < 1e-4


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
@pytest.mark.parametrize("kind", KINDS)
def test_hps_resizes_floats_as_torchvision_does(load, name, kind):
    """Uncut and over both axes at once; the border is black before normalisation."""
    pixels, images = load_once(load, name).pixels, tensor_of(np.array(KINDS[kind]))
    n, scale = pixels.size, pixels.size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    theirs = transforms.resize(images, [height, width], InterpolationMode.BICUBIC, antialias=True)
    below, right = n - height, n - width
    theirs = F.pad(theirs, (right // 2, right - right // 2, below // 2, below - below // 2))
    ours = dataclasses.replace(pixels, mean=(0.0,) * 3, std=(1.0,) * 3)(images)
    assert (ours - theirs).abs().max() <= 1e-6
    ours = pixels(images)
    torch.testing.assert_close(ours, transforms.normalize(theirs, pixels.mean, pixels.std), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("geometry", "cropped"), [("shortest+crop", 0.22), ("squash", 0), ("longest+pad", 0), ("square+mean", 0)])
def test_a_drawing_on_white_has_gradients_wherever_the_network_looks(geometry, cropped):
    """Cutting overshoots the ordinary way leaves most of the white without. What is cropped has none, as a grey picture shows."""
    pixels = Preprocess(224, OPENAI_MEAN, OPENAI_STD, geometry)
    direction = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) + 0.1
    white = tensor_of(drawing()[:, :400])
    ignored, zero = (gradient_of(lambda x: (pixels(x) * direction).sum(), images) == 0 for images in (0.5 * torch.ones_like(white), white))
    assert torch.equal(zero, ignored)
    assert ignored.float().mean() <= cropped


@pytest.mark.parametrize("name", [*PILLOW, "hpsv2"])
def test_black_and_white_pictures_can_be_climbed_from(load, name):
    """Through the whole reward: the pixels without gradient are those the network ignores, as it does where nothing is cut."""
    reward = load_once(load, name)
    for picture in (drawing(128), np.zeros((128, 96, 3), np.uint8), np.full((96, 128, 3), 255, np.uint8)):
        grey = 0.25 + 0.5 * tensor_of(picture)  # far from both ends, where there is nothing to cut
        gradient, unhindered = (gradient_of(lambda x: reward(x, ["a red circle"]).sum(), x) for x in (tensor_of(picture), grey))
        assert gradient.norm() > 1e-3 * unhindered.norm()
        assert (gradient == 0).float().mean() <= (unhindered == 0).float().mean() + 0.01


def gradient_of(function, images: torch.Tensor) -> torch.Tensor:
    x = images.clone().requires_grad_(True)
    return torch.autograd.grad(function(x), x)[0]


def load_once(load, name, kept={}):  # noqa: B006 - a test of many pictures loads a reward once
    if name not in kept:
        kept[name] = load(name)
    return kept[name]
