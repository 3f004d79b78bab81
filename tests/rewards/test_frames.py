"""An image reward over video: which frames, the mean by hand, gradients, in a mix with prompts repeated."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffalign.rewards import Calibration, FrameReward, RewardMix
from diffalign.rewards.frames import frame_indices


class Squares:
    """Mean of the squared red channel, plus the prompt's length; remembers what it was asked."""

    def __init__(self, name: str = "squares", differentiable: bool = True) -> None:
        self.name, self.differentiable = name, differentiable
        self.prepared: list[list[str]] = []
        self.asked: list[list[str]] = []

    def prepare(self, prompts: Sequence[str]) -> None:
        self.prepared.append(list(prompts))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert images.shape[1:] == (3, 2, 2)
        self.asked.append(list(prompts))
        return (images[:, 0] ** 2).mean((1, 2)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def videos() -> Tensor:
    """Two videos of four frames, whose red is 0.1, 0.2, 0.3, 0.4 and 0.5, 0.6, 0.7, 0.8."""
    red = torch.arange(1, 9).view(2, 4, 1, 1, 1) / 10
    return (red * torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)).expand(2, 4, 3, 2, 2).clone()


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (4, None, [0, 1, 2, 3]),
        (4, 9, [0, 1, 2, 3]),
        (4, 4, [0, 1, 2, 3]),
        (4, 2, [1, 3]),  # the middles of 0-1 and 2-3, the later of two
        (5, 1, [2]),
        (81, 1, [40]),
        (81, 3, [13, 40, 67]),
        (1, 3, [0]),
    ],
)
def test_which_frames(length, count, expected):
    assert frame_indices(length, count) == expected


@pytest.mark.parametrize("length", [2, 7, 16, 81])
def test_evenly_spaced_frames_differ_and_lie_in_order(length):
    for count in range(1, length + 1):
        found = frame_indices(length, count)
        assert len(set(found)) == count
        assert found == sorted(found)
        assert found[0] >= 0
        assert found[-1] < length
        assert max(b - a for a, b in zip([-1, *found], [*found, length], strict=True)) <= length / count + 1


def test_the_mean_over_frames_by_hand():
    """Squares of 1 to 4 sum to 30, of 5 to 8 to 174; means 0.075 and 0.435, and the prompts' lengths 1 and 3."""
    scores = FrameReward(Squares())(videos(), ["x", "yyy"])
    torch.testing.assert_close(scores, torch.tensor([1.075, 3.435]))
    two = FrameReward(Squares(), frames=2)(videos(), ["x", "yyy"])
    torch.testing.assert_close(two, torch.tensor([1 + (0.04 + 0.16) / 2, 3 + (0.36 + 0.64) / 2]))


def test_one_frame_is_the_image_reward():
    images = torch.rand(3, 3, 2, 2)
    prompts = ["a", "bb", "ccc"]
    assert torch.equal(FrameReward(Squares())(images[:, None], prompts), Squares()(images, prompts))


def test_the_gradient_reaches_the_scored_frames_and_no_other():
    """d / d pixel of the mean over 4 pixels and n frames of red squared: 2 red / (4 n)."""
    x = videos().requires_grad_(True)
    (gradient,) = torch.autograd.grad(FrameReward(Squares())(x, ["x", "y"]).sum(), x)
    torch.testing.assert_close(gradient, videos() / 8)
    (gradient,) = torch.autograd.grad(FrameReward(Squares(), frames=2)(x, ["x", "y"]).sum(), x)
    assert gradient[:, [0, 2]].abs().max() == 0
    torch.testing.assert_close(gradient[:, [1, 3]], videos()[:, [1, 3]] / 4)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_batches_change_nothing_and_each_frame_has_its_videos_prompt(size):
    reward = Squares()
    scores = FrameReward(reward, batch_size=size)(videos(), ["x", "yyy"])
    torch.testing.assert_close(scores, FrameReward(Squares())(videos(), ["x", "yyy"]))
    assert [prompt for asked in reward.asked for prompt in asked] == ["x"] * 4 + ["yyy"] * 4


def test_in_a_mix_with_prompts_repeated():
    """Two videos of one prompt: the prompt is encoded once for both, parts and watched are those of the frames."""
    member, watched = Squares("a"), Squares("b", differentiable=False)
    calibration = Calibration.identity(["a", "c"])
    mix = RewardMix(
        {"a": (FrameReward(member), 1.0), "c": (FrameReward(Squares("c"), frames=2), 1.0)},
        {"b": FrameReward(watched, frames=1)},
        rule="worst-case",
        calibration=calibration,
    )
    assert mix.differentiable
    prompts = ["x", "x"]
    mix.prepare(prompts)
    assert member.prepared == watched.prepared == [prompts]
    x = videos().requires_grad_(True)
    scores = mix(x, prompts)
    torch.testing.assert_close(scores.parts["a"], torch.tensor([1.075, 1.435]))
    torch.testing.assert_close(scores.parts["c"], torch.tensor([1.1, 1.5]))
    torch.testing.assert_close(scores.total, scores.parts["a"])
    torch.testing.assert_close(scores.watched["b"], torch.tensor([1.09, 1.49]))
    assert torch.autograd.grad(scores.total.sum(), x)[0][:, :, 0].abs().min() > 0


@pytest.mark.parametrize("rule", ["equal", "pcgrad", "mgda"])
def test_gradient_rules_combine_over_all_frames_of_a_video(rule):
    mix = RewardMix({"a": (FrameReward(Squares("a")), 1.0), "c": (FrameReward(Squares("c"), frames=2), 1.0)}, gradient=rule)
    x = videos().requires_grad_(True)
    (gradient,) = torch.autograd.grad(mix(x, ["x", "y"]).total.sum(), x)
    for i in range(2):
        one = videos()[i : i + 1].requires_grad_(True)
        (alone,) = torch.autograd.grad(mix(one, ["x"]).total.sum(), one)
        torch.testing.assert_close(alone[0], gradient[i])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FrameReward(len), TypeError, "reward must be a reward model"),
        (lambda: FrameReward(Squares(), frames=0), ValueError, "frames must be .* at least 1, .*got 0"),
        (lambda: FrameReward(Squares(), frames=2.5), ValueError, "frames must be .*got 2.5"),
        (lambda: FrameReward(Squares(), batch_size=0), ValueError, "batch_size must be"),
        (lambda: FrameReward(Squares())(videos(), ["x"]), ValueError, "one for each of 2 videos, got 1"),
        (lambda: FrameReward(Squares())(videos()[:, :0], ["x", "y"]), ValueError, r"at least one frame, got shape \(2, 0, 3, 2, 2\)"),
    ],
)
def test_what_is_no_video_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
