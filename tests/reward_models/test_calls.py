"""How rewards are called: a search never makes a graphics card wait, and lists of pictures of all sizes are taken too."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign import reward_models
from diffalign.images import decode
from diffalign.reward_models import base
from tests.reward_models.conftest import PROMPTS
from tests.reward_models.pictures import fading, on_white
from tests.reward_models.test_contract import Counting
from tests.reward_models.test_pixels import photo, tensor_of

DIFFERENTIABLE = [name for name, spec in reward_models.SPECS.items() if spec.differentiable]
READING = {  # in every call, and why
    "hpsv3": "transformers' own code reads the grid of patches",
    "hpsv3++": "as hpsv3",
    "vlm-judge": "as hpsv3",
    "shapes-reward": "the captioner reads how long the longest prompt is",
}
NAN = float("nan")


class Waits(TorchDispatchMode):
    """Notes what makes a graphics card wait: reading a number, sizes that depend on values, and copies of Python numbers to it."""

    names = ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "masked_select", "unique_dim", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.names:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_search_waits_for_nothing_after_its_first_call(load, images, name):
    reward = load(name)
    reward(images, PROMPTS)
    with Waits() as waits:
        x = images.clone().requires_grad_(True)
        reward(x, PROMPTS).sum().backward()
        with torch.no_grad():
            reward(images.flip(0), PROMPTS)
    assert bool(waits.seen) is (name in READING), waits.seen


def test_the_first_call_with_a_list_of_prompts_reads_the_images(load, images):
    reward = load("brightness")
    for prompts, read in ((PROMPTS, True), (PROMPTS, False), (PROMPTS[::-1], True), (PROMPTS, False), (PROMPTS[:2], True)):
        with Waits() as waits:
            reward(images[: len(prompts)], prompts)
        assert bool(waits.seen) is read


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@torch.no_grad()
def test_later_an_image_that_is_not_finite_has_such_a_score_and_its_mates_their_own(load, images, name):
    reward = load(name)
    whole = reward(images, PROMPTS)
    broken = images.clone()
    broken[1, 2, 3, 4] = NAN
    scores = reward(broken, PROMPTS)
    assert scores.isfinite().tolist() == [True, False, True]
    torch.testing.assert_close(scores[::2], whole[::2], atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match=r"images\[1\] has values that are not finite"):
        reward(broken, PROMPTS[::-1])


def test_rewards_without_a_gradient_look_at_every_image(load, images):
    reward = load("jpeg-compressibility")
    reward(images, PROMPTS)
    with pytest.raises(ValueError, match=r"images\[0\] has values that are not finite"):
        reward(images * NAN, PROMPTS)


def test_texts_are_put_together_once_for_a_list_of_prompts(monkeypatch):
    monkeypatch.setattr(base, "KEPT_BATCHES", 2)
    reward, collated = Counting(), []
    monkeypatch.setattr(reward, "collate", lambda texts: collated.append(len(texts)) or torch.stack(texts))
    images = torch.rand(2, 3, 4, 4)
    with torch.inference_mode():
        reward(images, ["a", "bb"])
    assert not reward._embed(["a", "bb"], images.device).is_inference()  # autograd refuses what inference mode made
    for prompts in (["a", "bb"], ["bb", "a"], ["a", "bb"], ["c", "bb"], ["bb", "a"]):
        assert reward(images, prompts).tolist() == [len(prompt) for prompt in prompts]
    assert collated == [2, 2, 2, 2]  # the last list had been dropped
    reward.to("cpu")
    reward(images, ["bb", "a"])
    assert len(collated) == 5


# ---- lists -----------------------------------------------------------------------------------------------------------------------


def pictures() -> list[Image.Image | torch.Tensor]:
    """Of five sizes and several kinds, sizes mixed."""
    grey = Image.fromarray(photo(50, 70, 1)[..., 0])
    wide, small = Image.fromarray(photo(50, 70)), tensor_of(photo(64, 64))[0]
    return [wide, small, fading(90), grey, tensor_of(photo(40, 31))[0], Image.fromarray(photo(64, 64, 2))]


def as_batch(picture: Image.Image | torch.Tensor) -> torch.Tensor:
    if isinstance(picture, torch.Tensor):
        return picture[None]
    picture = on_white(picture) if picture.mode == "RGBA" else picture.convert("RGB")
    return tensor_of(np.array(picture))


@pytest.mark.parametrize("name", reward_models.NAMES)
@torch.no_grad()
def test_a_list_is_scored_in_its_order_as_its_pictures_are_alone(load, name):
    reward, prompts = load(name), [*PROMPTS, *PROMPTS[::-1]]
    expected = torch.cat([reward(as_batch(picture), [prompt]) for picture, prompt in zip(pictures(), prompts, strict=True)])
    scores = reward(pictures(), prompts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reward(tuple(pictures()[::-1]), prompts[::-1]), scores.flip(0), atol=1e-4, rtol=1e-5)


def test_one_batch_for_each_size(load, monkeypatch):
    reward, sizes = load("brightness"), []
    monkeypatch.setattr(reward, "score", lambda images, texts: sizes.append(tuple(images.shape)) or images.mean(dim=(1, 2, 3)))
    reward(pictures(), [""] * 6)
    assert sizes == [(2, 3, 50, 70), (2, 3, 64, 64), (1, 3, 90, 90), (1, 3, 40, 31)]


def test_gradients_reach_the_tensors_of_a_list(load):
    tensors = [torch.rand(3, 20, 30, requires_grad=True), torch.rand(3, 16, 16, requires_grad=True)]
    load("clip-l14")(tensors, PROMPTS[:2]).sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in tensors)


def test_a_picture_scores_as_its_file(load):
    buffer = io.BytesIO()
    picture = Image.fromarray(photo(40, 60))
    picture.getexif()[0x0112] = 6  # lies on its side
    picture.save(buffer, "PNG", exif=picture.getexif())
    reward = load("clip-l14")
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        (score,) = reward([opened], PROMPTS[:1])
    (expected,) = reward(decode(buffer.getvalue()).tensor()[None], PROMPTS[:1])
    assert score == expected
    assert reward([picture.transpose(Image.Transpose.ROTATE_270)], PROMPTS[:1]) == expected


def test_bad_lists_say_which_picture_is_wrong(load):
    reward, good = load("brightness"), torch.rand(3, 4, 4)
    cases = [
        (["a.png"], [""], TypeError, r"images must be a tensor 'b 3 h w'.*list of pictures of PIL.*images\[0\] is str"),
        ([good, good[None]], ["", ""], TypeError, r"images\[1\] is of shape \(1, 3, 4, 4\)"),
        ([good, good[:1]], ["", ""], ValueError, r"images\[1\] must have shape \(3, h, w\), got \(1, 4, 4\)"),
        ([good, good.byte()], ["", ""], TypeError, r"images\[1\] must be floats in .0, 1., got torch.uint8"),
        ([good, good], [""], ValueError, "got 2 images and 1 prompts"),
        ([good, good[:, :2], good * NAN], ["", "", ""], ValueError, r"images\[2\] has values that are not finite"),
        ([good, Image.new("F", (4, 4))], ["", ""], ValueError, r"images\[1\] is an image with 32-bit pixels"),
        ([], [], ValueError, "prompts is empty"),
    ]
    for pictures, prompts, error, message in cases:
        with pytest.raises(error, match=message):
            reward(pictures, prompts)


def test_a_picture_off_the_range_is_warned_of_in_a_list_too(load, caplog):
    with caplog.at_level(logging.WARNING):
        load("brightness")([torch.rand(3, 4, 4), 3 * torch.ones(3, 5, 5)], ["", ""])
    assert "should lie in [0, 1]" in caplog.text
