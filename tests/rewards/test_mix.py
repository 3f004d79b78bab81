"""RewardMix: a weighted sum with parts, watchers that never touch the gradient, and clear errors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffalign.rewards import RewardMix
from diffalign.types import RewardScores

PROMPTS = ["x", "yyy"]


class Channel:
    """The mean of one channel, plus the length of the prompt; remembers what it was asked."""

    def __init__(self, channel: int, differentiable: bool = True) -> None:
        self.name, self.channel, self.differentiable = f"channel-{channel}", channel, differentiable
        self.prepared: list[list[str]] = []
        self.saw_gradient: bool | None = None

    def prepare(self, prompts: Sequence[str]) -> None:
        self.prepared.append(list(prompts))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.saw_gradient = images.requires_grad or torch.is_grad_enabled()
        return images[:, self.channel].mean(dim=(1, 2)) + torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.fixture
def images() -> Tensor:
    """Channel means (0.1, 0.2, 0.3) and (0.4, 0.5, 0.6)."""
    means = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    return means[:, :, None, None].expand(2, 3, 2, 2).clone().requires_grad_(True)


def test_the_total_is_the_weighted_sum_of_the_parts(images):
    mix = RewardMix({"r": (Channel(0), 2.0), "g": (Channel(1), -0.5)}, {"b": Channel(2)})
    scores = mix(images, PROMPTS)
    assert isinstance(scores, RewardScores)
    torch.testing.assert_close(scores.parts["r"], torch.tensor([1.1, 3.4]))
    torch.testing.assert_close(scores.parts["g"], torch.tensor([1.2, 3.5]))
    torch.testing.assert_close(scores.watched["b"], torch.tensor([1.3, 3.6]))
    torch.testing.assert_close(scores.total, torch.tensor([2 * 1.1 - 0.5 * 1.2, 2 * 3.4 - 0.5 * 3.5]))
    assert list(scores.parts) == ["r", "g"]
    assert mix.weights == {"r": 2.0, "g": -0.5}


def test_the_gradient_is_the_weighted_sum_of_the_gradients(images):
    scores = RewardMix({"r": (Channel(0), 2.0), "g": (Channel(1), -0.5)}, {"b": Channel(2)})(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.total.sum(), images, retain_graph=True)
    torch.testing.assert_close(gradient[0, :, 0, 0], torch.tensor([2 / 4, -0.5 / 4, 0.0]))  # four pixels share each mean
    (part,) = torch.autograd.grad(scores.parts["g"].sum(), images)
    torch.testing.assert_close(part[1, :, 1, 1], torch.tensor([0.0, 1 / 4, 0.0]))


def test_watchers_run_without_gradient_and_may_lack_one(images):
    watcher = Channel(2, differentiable=False)
    mix = RewardMix({"r": (Channel(0), 1.0)}, {"b": watcher})
    assert mix.differentiable
    scores = mix(images, PROMPTS)
    assert watcher.saw_gradient is False
    assert not scores.watched["b"].requires_grad
    assert scores.total.requires_grad


def test_one_member_without_gradient_makes_the_mix_have_none():
    assert not RewardMix({"r": (Channel(0), 1.0), "g": (Channel(1, differentiable=False), 1.0)}).differentiable


def test_prepare_reaches_members_and_watchers():
    member, watcher = Channel(0), Channel(1)
    RewardMix({"r": (member, 1.0)}, {"g": watcher}).prepare(PROMPTS)
    assert member.prepared == watcher.prepared == [PROMPTS]


def test_a_mix_keeps_its_own_copy_of_what_it_was_given():
    members = {"r": (Channel(0), 1.0)}
    mix = RewardMix(members)
    members.clear()
    assert list(mix.members) == ["r"]


@pytest.mark.parametrize(
    ("members", "watched", "error", "message"),
    [
        ({}, {}, ValueError, "members is empty"),
        ({}, {"b": Channel(2)}, ValueError, "members is empty"),
        ({"r": (Channel(0), float("nan"))}, {}, ValueError, "weight of reward 'r' must be finite and not zero, got nan"),
        ({"r": (Channel(0), float("inf"))}, {}, ValueError, "weight of reward 'r' must be finite and not zero, got inf"),
        ({"r": (Channel(0), 0)}, {}, ValueError, "not zero, got 0; to report alone use watched"),
        ({"r": (Channel(0), "2")}, {}, TypeError, "weight of reward 'r' must be a number, got '2'"),
        ({"r": (Channel(0), True)}, {}, TypeError, "weight of reward 'r' must be a number, got True"),
        ({"r": Channel(0)}, {}, TypeError, r"members\['r'\] must be a pair"),
        ({"r": (len, 1.0)}, {}, TypeError, "'r' must be a reward model"),
        ({"r": (Channel(0), 1.0)}, {"b": len}, TypeError, "'b' must be a reward model"),
        ({"r": (Channel(0), 1.0)}, {"r": Channel(0)}, ValueError, "watched holds 'r', which is a member already"),
    ],
)
def test_bad_mixes_are_refused(members, watched, error, message):
    with pytest.raises(error, match=message):
        RewardMix(members, watched)


def test_a_member_that_returns_one_number_for_all_is_refused(images):
    class Mean(Channel):
        def __call__(self, images, prompts):
            return images.mean().unsqueeze(0)

    with pytest.raises(ValueError, match=r"reward 'r' must return one score for each of 2 images, got shape \(1,\)"):
        RewardMix({"r": (Mean(0), 1.0)})(images, PROMPTS)


def test_real_rewards_in_a_mix():
    from diffalign import reward_models

    mix = RewardMix({"brightness": (reward_models.load("brightness"), 1.0)}, {"jpeg": reward_models.load("jpeg-compressibility")})
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    mix.prepare(PROMPTS)
    scores = mix(x, PROMPTS)
    scores.total.sum().backward()
    assert x.grad.abs().min() > 0
    assert (scores.watched["jpeg"] < 0).all()
