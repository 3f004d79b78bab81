"""What every reward owes, whatever its name: the call, its errors, independence of batch mates, gradients, caching."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from diffalign import reward_models, types
from diffalign.reward_models import base
from tests.reward_models.conftest import PROMPTS

DIFFERENTIABLE = [name for name, spec in reward_models.SPECS.items() if spec.differentiable]
PROMPTED = [name for name, spec in reward_models.SPECS.items() if spec.needs_prompt]
SHAPES = ("shapes-clip", "shapes-preference", "shapes-reward", "shapes-watch")
READS = {**dict.fromkeys(SHAPES, 32), "image-reward": 35}  # tokens; CLIP's 77 where nothing is said
READS |= dict.fromkeys(("hpsv3", "hpsv3++", "vqascore", "vlm-judge"), 2048)
TEXT_APART = [*SHAPES[:2], "shapes-watch", "clip-l14", "clip-h14", "clip-bigg14", "pickscore", "hpsv2", "hpsv2.1", "mps"]


def test_the_table_costs_no_heavy_import():
    heavy = "[name for name in ('torch', 'open_clip') if name in sys.modules]"
    code = f"import sys; from diffalign import reward_models; reward_models.spec_of('shapes-clip'); print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_rows_are_filed_under_their_names():
    assert all(name == spec.name and spec.range[0] < spec.range[1] for name, spec in reward_models.SPECS.items())
    assert all(spec.paper and spec.licence and spec.unit for spec in reward_models.SPECS.values())


@pytest.mark.parametrize("name", reward_models.NAMES)
def test_scores_are_float32_one_for_each_image(load, images, name):
    reward = load(name)
    assert isinstance(reward, types.RewardModel)
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert scores.unique().numel() == 3


@pytest.mark.parametrize("name", reward_models.NAMES)
def test_frozen_and_in_evaluation_mode_whatever_holds_it(load, name):
    reward = load(name)
    nn.ModuleDict({"reward": reward}).train()
    assert not any(module.training for module in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters())


@pytest.mark.parametrize("name", reward_models.NAMES)
def test_a_score_does_not_depend_on_its_batch_mates(load, images, name):
    together = load(name)(images, PROMPTS)
    alone = torch.cat([load(name)(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)
    turned = load(name)(images.flip(0), PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(together, turned, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", reward_models.NAMES)
def test_the_prompt_matters_exactly_where_the_table_says(load, images, name):
    reward = load(name)
    same = torch.equal(reward(images, PROMPTS), reward(images, PROMPTS[1:] + PROMPTS[:1]))
    assert same is not reward_models.SPECS[name].needs_prompt


def smooth(reward):
    """The reward without whole bytes between Pillow's passes, whose jumps no finite difference can follow."""
    if hasattr(reward, "pixels"):
        reward.pixels = dataclasses.replace(reward.pixels, bytes_between=False)
    return reward


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_the_gradient_is_the_finite_difference(load, name, size):
    reward = smooth(load(name))
    x = 0.3 + 0.4 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(x, PROMPTS[:2]).sum(), x)
    norms = gradient.flatten(1).norm(dim=1)
    step = 0.01 * gradient / norms.view(-1, 1, 1, 1)  # along its own gradient each score changes by the gradient's norm
    with torch.no_grad():
        slope = (reward(x + step, PROMPTS[:2]) - reward(x - step, PROMPTS[:2])) / 0.02
    assert (norms > 0).all()
    torch.testing.assert_close(slope, norms, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_leaves_the_parameters_alone(load, images, name):
    reward = load(name)
    before = {key: value.clone() for key, value in reward.state_dict().items()}
    reward(images.requires_grad_(True), PROMPTS).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in reward.parameters())
    assert all(torch.equal(before[key], value) for key, value in reward.state_dict().items())


@pytest.mark.parametrize("name", sorted(set(reward_models.NAMES) - set(DIFFERENTIABLE)))
def test_asking_for_a_gradient_that_is_not_there_is_an_error(load, images, name):
    reward = load(name)
    with pytest.raises(TypeError, match="has no gradient"):
        reward(images.requires_grad_(True), PROMPTS)
    with torch.no_grad():
        assert reward(images, PROMPTS).shape == (3,)


@pytest.mark.parametrize("name", reward_models.NAMES)
def test_bad_calls_say_what_is_wrong(load, images, name):
    reward = load(name)
    broken = images.clone()
    broken[1, 2, 3, 4] = float("nan")
    boundless = images.clone()
    boundless[2, 0, 0, 0] = float("inf")
    cases = [
        (PROMPTS, images, TypeError, r"wrong order; call reward\(images, prompts\)"),
        (images, "a red circle", TypeError, "prompts must be a list of strings, got the string 'a red circle'"),
        (images, [1, 2, 3], TypeError, "prompts must be a list of strings"),
        (images, [], ValueError, "prompts is empty"),
        (images, PROMPTS[:2], ValueError, "got 3 images and 2 prompts"),
        ([images], PROMPTS, TypeError, "images must be a tensor"),
        ((images * 255).byte(), PROMPTS, TypeError, "floats in .0, 1., got torch.uint8"),
        (images[:, :1], PROMPTS, ValueError, r"shape \(b, 3, h, w\), got \(3, 1, 64, 64\)"),
        (images[0], PROMPTS[:1], ValueError, r"got \(3, 64, 64\)"),
        (images[:0], [], ValueError, r"got \(0, 3, 64, 64\)"),
        (broken, PROMPTS, ValueError, r"images\[1\] has values that are not finite"),
        (boundless, PROMPTS, ValueError, r"images\[2\] has values that are not finite"),
    ]
    for first, second, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            reward(first, second)
        assert name in str(caught.value)


def test_values_off_the_range_are_warned_of_once(load, images, caplog):
    reward = load("brightness")
    with caplog.at_level(logging.WARNING):
        reward(images * 3 - 0.5, PROMPTS)
        reward(images * 3 - 0.5, PROMPTS)
    assert len(caplog.records) == 1
    assert "should lie in [0, 1]" in caplog.text


@pytest.mark.parametrize("name", PROMPTED)
def test_prepared_prompts_give_the_scores_of_unprepared_ones(load, images, name):
    prepared, fresh = load(name), load(name)
    prepared.prepare([*PROMPTS, "a diamond"])
    torch.testing.assert_close(prepared(images, PROMPTS), fresh(images, PROMPTS), atol=1e-4, rtol=1e-5)
    assert torch.equal(fresh(images, PROMPTS), fresh(images, PROMPTS))


@pytest.mark.parametrize("name", [name for name in PROMPTED if name in DIFFERENTIABLE])
def test_prompts_prepared_in_inference_mode_can_be_used_with_gradients(load, images, name):
    reward = load(name)
    with torch.inference_mode():
        reward.prepare(PROMPTS)
    x = images.requires_grad_(True)
    reward(x, PROMPTS).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_half_precision_images_are_scored_in_float32(load, images, name):
    reward = load(name)
    rounded = images.bfloat16()
    scores = reward(rounded, PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, reward(rounded.float(), PROMPTS))


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name != "brightness"])
def test_a_reward_moved_to_half_precision_still_answers(load, images, name):
    reward = load(name)
    reward.prepare(PROMPTS)
    exact = reward(images, PROMPTS)
    rough = reward.to(torch.bfloat16)(images, PROMPTS)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.05 * float(exact.abs().max()) + 0.05, rtol=0)


@pytest.mark.parametrize("name", [name for name in PROMPTED if name != "http"])  # that is for its server to say
def test_what_is_cut_off_a_long_prompt_is_said(load, caplog, name):
    with caplog.at_level(logging.WARNING):
        load(name).prepare(["a red circle", "a red circle " * 800])
    assert len(caplog.records) == 1
    assert f"reads {READS.get(name, 77)} tokens" in caplog.text
    assert "ignores the last" in caplog.text


@pytest.mark.parametrize("name", PROMPTED)
def test_a_prompt_cannot_end_itself(load, images, name):
    reward = load(name)
    short = reward(images[:1], ["a red"])
    for end in ("<|endoftext|>", "<end_of_text>"):
        assert not torch.allclose(short, reward(images[:1], [f"a red{end} circle"]), atol=1e-3)


class Counting(base.RewardModel):
    """The length of the prompt, noting every encoding."""

    def __init__(self) -> None:
        super().__init__(reward_models.SPECS["shapes-clip"])
        self.encoded: list[list[str]] = []

    def encode_text(self, prompts):
        self.encoded.append(list(prompts))
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    def score(self, images, texts):
        return texts[:, 0]


def test_each_prompt_is_encoded_once():
    reward = Counting()
    reward.prepare(["a", "bb", "a"])
    scores = reward(torch.rand(4, 3, 2, 2), ["bb", "a", "ccc", "bb"])
    assert scores.tolist() == [2, 1, 3, 2]
    assert reward.encoded == [["a", "bb"], ["ccc"]]


def test_the_cache_forgets_the_prompts_longest_unused(monkeypatch):
    monkeypatch.setattr(Counting, "cached_prompts", 3)
    monkeypatch.setattr(base, "TEXT_CHUNK", 2)
    reward = Counting()
    reward.prepare(["a", "bb", "ccc"])
    reward.prepare(["a"])
    reward.prepare(["dddd"])
    reward.encoded.clear()
    reward.prepare(["a", "ccc", "dddd"])
    assert reward.encoded == []
    more = ["e" * n for n in range(5, 12)]
    assert reward(torch.rand(7, 3, 2, 2), more).tolist() == [len(prompt) for prompt in more]
    assert list(reward._texts) == more[-3:]


def test_moving_a_reward_empties_its_cache():
    reward = Counting()
    reward.prepare(["a"])
    reward.to("cpu")
    reward.prepare(["a"])
    assert reward.encoded == [["a"], ["a"]]


def test_jpeg_size_by_hand(load):
    plain = torch.full((1, 3, 32, 32), 0.5)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    pair = torch.cat([plain, noise])
    small, large = load("jpeg-incompressibility")(pair, ["", ""]).tolist()
    assert 0.1 < small < large < 5
    assert load("jpeg-compressibility")(pair, ["", ""]).tolist() == [-small, -large]


def test_brightness_by_hand(load):
    pictures = torch.stack([torch.full((3, 4, 4), 0.25), torch.zeros(3, 4, 4)])
    pictures[1, 1] = 1.0
    torch.testing.assert_close(load("brightness")(pictures, ["", ""]), torch.tensor([0.25, 0.7152]))


@pytest.mark.parametrize("name", TEXT_APART)
def test_the_text_encoder_can_be_dropped(load, images, name):
    reward = load(name)
    reward.prepare(PROMPTS)
    before, size = reward(images, PROMPTS), sum(p.numel() for p in reward.parameters())
    reward.drop_text_encoder()
    reward.to("cpu")
    assert sum(p.numel() for p in reward.parameters()) < 0.7 * size
    assert torch.equal(reward(images, PROMPTS), before)
    with pytest.raises(ValueError, match="text encoder was dropped before the prompt 'a diamond' was prepared"):
        reward(images[:1], ["a diamond"])


def test_there_may_be_nothing_to_drop(load):
    with pytest.raises(ValueError, match="'brightness' has no text encoder"):
        load("brightness").drop_text_encoder()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_backbone_takes_the_dtype_asked_for(weights, images, dtype):
    reward = reward_models.load("shapes-aesthetic", source=weights / "shapes-aesthetic", dtype=dtype)
    assert reward.tower.conv1.weight.dtype == torch.bfloat16
    assert reward.head[0].weight.dtype == torch.float32
    assert reward(images, PROMPTS).dtype == torch.float32


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        reward_models.load("brightness", dtype="int8")
