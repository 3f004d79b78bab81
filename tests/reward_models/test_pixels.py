"""Differentiable preprocessing against the real processors on PIL images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.reward_models.pixels import Preprocess, normalise, resize

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(64, 64), (300, 300), (399, 224), (224, 399), (133, 190), (97, 31), (20, 30)]
EXACT = 1e-4  # of a level: what normalisation in float32 leaves


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An 8-bit picture with the falling spectrum of natural ones and hard edges, "h w 3"."""
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    planes = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) * falling).real for _ in range(3)]
    picture = np.stack([(p - p.mean()) / p.std() for p in planes], axis=2) * 45 + 128
    picture[height // 3 : height // 2, width // 3 : width // 2] = (250, 20, 20)
    return picture.clip(0, 255).astype(np.uint8)


def tensor_of(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1).float().unsqueeze(0) / 255


def levels(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Differences in 8-bit levels of normalised images."""
    return ((ours - theirs).abs() * torch.tensor(STD).view(3, 1, 1) * 255).flatten()


class Copies(TorchDispatchMode):
    """Counts tensors made of Python numbers, each of which a graphics card would wait for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.lift_fresh
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mode", "geometry"), [("shortest", "shortest+crop"), ("longest", "longest+pad"), ("squash", "squash")])
def test_equals_open_clip_on_pil_images(size, mode, geometry):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    picture = photo(*size)
    config = PreprocessCfg(size=56, mean=MEAN, std=STD, interpolation="bicubic", resize_mode=mode)
    theirs = image_transform_v2(config, is_train=False)(Image.fromarray(picture)).unsqueeze(0)
    ours = Preprocess(56, MEAN, STD, geometry, round_crop=True)(tensor_of(picture))
    assert ours.shape == theirs.shape
    assert levels(ours, theirs).max() < EXACT


@pytest.mark.parametrize("size", [*SIZES, (64, 68)])  # 68 scales to 59: a margin of 1.5, where rounding matters
def test_equals_transformers_on_pil_images(size):
    from transformers import CLIPImageProcessor

    picture = photo(*size)
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    theirs = torch.as_tensor(np.asarray(processor(Image.fromarray(picture))["pixel_values"]))
    difference = levels(Preprocess(56, MEAN, STD)(tensor_of(picture)), theirs)
    assert difference.mean() < 1e-2
    assert difference.max() < 1 + EXACT  # torchvision's resizing of bytes, where it is used, has coarser weights than Pillow's


def test_the_two_ways_to_crop_an_odd_margin():
    ramp = torch.arange(59.0).div(59).expand(1, 3, 56, 59)
    down, even = (Preprocess(56, (0.0,) * 3, (1.0,) * 3, round_crop=rounded)(ramp) for rounded in (False, True))
    assert torch.equal(down, ramp[..., 1:57])
    assert torch.equal(even, ramp[..., 2:58])  # 1.5 rounds to the even 2


def test_the_border_is_black_before_normalisation():
    out = Preprocess(8, MEAN, STD, "longest+pad")(torch.ones(1, 3, 4, 9))
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(out[0, :, 0, 0], black)
    torch.testing.assert_close(out[0, :, -1, -1], black)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(out[0, :, 4, 4], white)
    assert [bool((out[0, 0, row] > 0).all()) for row in range(8)] == [False, False, True, True, True, True, False, False]


@pytest.mark.parametrize("size", SIZES)
def test_a_square_of_the_mean_is_llavas_on_pil_images(size):
    from transformers import CLIPImageProcessor

    picture = Image.fromarray(photo(*size))
    square = Image.new("RGB", (max(size), max(size)), tuple(int(255 * value) for value in MEAN))
    square.paste(picture, ((max(size) - picture.width) // 2, (max(size) - picture.height) // 2))
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    theirs = torch.as_tensor(np.asarray(processor(square)["pixel_values"]))
    difference = levels(Preprocess(56, MEAN, STD, "square+mean")(tensor_of(photo(*size))), theirs)
    assert difference.mean() < 1e-2
    assert difference.max() < 1 + EXACT


@pytest.mark.parametrize("geometry", ["shortest+crop", "longest+pad", "squash", "square+mean"])
def test_the_gradient_is_the_finite_difference(geometry):
    x = (0.3 + 0.4 * torch.rand(1, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    smooth = Preprocess(4, MEAN, STD, geometry, bytes_between=False)  # bytes are constant but for jumps
    assert torch.autograd.gradcheck(smooth, (x,))
    weights = torch.rand(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with_bytes, without = (
        torch.autograd.grad((pixels(x) * weights).sum(), x)[0] for pixels in (Preprocess(4, MEAN, STD, geometry), smooth)
    )
    torch.testing.assert_close(with_bytes, without, rtol=1e-5, atol=1e-6)  # the gradient is that of the smooth function


def test_equal_size_is_left_alone_and_half_precision_computed_in_float32():
    x = 1.2 * torch.rand(1, 3, 6, 6) - 0.1
    assert resize(x, 6, 6) is resize(x, 6, 6, bytes_between=False) is x
    out = Preprocess(6, (0.0,) * 3, (1.0,) * 3)(x.bfloat16())
    assert out.dtype == torch.float32
    assert torch.equal(out, x.bfloat16().float())


def test_what_overshoots_is_cut_where_there_are_bytes():
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1.0
    out = resize(edge, 24, 24)
    assert out.min() == 0
    assert out.max() == 1
    assert torch.equal(out * 255, (out * 255).round())
    floats = resize(edge, 24, 24, bytes_between=False)
    assert floats.min() < 0
    assert floats.max() > 1


def test_the_numbers_of_normalisation_are_made_once_and_have_gradients_after_inference_mode():
    pixels, x = Preprocess(6, MEAN, STD), torch.rand(1, 3, 9, 6)
    with torch.inference_mode():
        pixels(x)
    with Copies() as copies:
        pixels(x.requires_grad_(True)).sum().backward()
    assert copies.count == 0
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close(normalise(x, MEAN, STD), (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"geometry": "crop"}, "geometry must be one of"), ({"size": 0}, "size must be positive"), ({"std": (1.0, 0.0, 1.0)}, "std positive")],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**({"size": 8, "mean": MEAN, "std": STD} | change))
