"""Qwen's preprocessing against transformers' processor and PIL."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD
from diffalign.reward_models.qwen_pixels import QwenPixels, read_qwen_pixels
from tests.reward_models.test_pixels import photo, tensor_of

SIZES = [(56, 56), (112, 84), (100, 333), (333, 100), (500, 500), (20, 30), (1, 1), (13, 200), (9, 1800), (447, 1001)]
BOUNDS = [(56 * 56, 28 * 28 * 1280), (28 * 28 * 64, 28 * 28 * 64), (28 * 28 * 4, 28 * 28 * 9)]


def pixels(least: int = BOUNDS[0][0], most: int = BOUNDS[0][1], patch: int = 14) -> QwenPixels:
    return QwenPixels(patch, 2, 2, OPENAI_MEAN, OPENAI_STD, least, most)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("least", "most"), BOUNDS)
def test_sizes_are_those_of_transformers(size, least, most):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    ours = pixels(least, most).size(*size)
    assert ours == smart_resize(*size, factor=28, min_pixels=least, max_pixels=most)
    assert ours[0] % 28 == ours[1] % 28 == 0


@pytest.mark.parametrize("patch", [14, 16])
def test_patches_are_those_of_transformers_where_nothing_is_resized(patch):
    from transformers import Qwen2VLImageProcessor

    pictures = [photo(6 * patch, 8 * patch, seed) for seed in (0, 1)]
    processor = Qwen2VLImageProcessor(patch_size=patch)
    theirs = processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    ours, grid = pixels(patch=patch)(torch.cat([tensor_of(picture) for picture in pictures]))
    assert theirs["image_grid_thw"].tolist() == [[1, *grid]] * 2
    torch.testing.assert_close(ours.flatten(0, 1), theirs["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(300, 300), (200, 450), (61, 40)])
def test_resizing_is_pils(size):
    picture = photo(*size)
    settings, unbounded = pixels(28 * 28 * 64, 28 * 28 * 64), pixels(1, 10**9)
    height, width = settings.size(*size)
    resized = np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    difference = (settings(tensor_of(picture))[0] - unbounded(tensor_of(resized))[0]).abs() * max(OPENAI_STD) * 255
    assert difference.max() < 1e-4


def test_the_gradient_is_the_finite_difference():
    small = QwenPixels(2, 2, 2, OPENAI_MEAN, OPENAI_STD, 16, 32, bytes_between=False)
    x = (0.3 + 0.4 * torch.rand(1, 3, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda images: small(images)[0], (x,))


@pytest.mark.parametrize(
    "bounds",
    [
        {"min_pixels": 3136, "max_pixels": 100352},
        {"min_pixels": 3136, "max_pixels": 100352, "size": {"min_pixels": 3136, "max_pixels": 100352}},
        {"size": {"min_pixels": 3136, "max_pixels": 100352}},
        {"size": {"shortest_edge": 3136, "longest_edge": 100352}},
    ],
)
def test_every_form_of_the_file_is_read(tmp_path, bounds):
    common = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "image_mean": OPENAI_MEAN, "image_std": OPENAI_STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(common | bounds))
    assert read_qwen_pixels(tmp_path / "preprocessor_config.json") == pixels(3136, 100352)


def test_too_thin_an_image_is_refused():
    with pytest.raises(ValueError, match="an image of 2x401 is too thin: the longer side may be 200 times the shorter at most"):
        pixels().size(2, 401)
