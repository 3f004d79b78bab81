"""GDPO's worked numbers, the noise floor, CaPO's win rates by hand, groups apart."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.rewards import advantages
from diffalign.rewards.advantages import gdpo, group_advantages, whiten, win_rates

# Group 0: two samples that differ in the first reward alone. Group 1: two that differ in both.
TWO_GROUPS = torch.tensor([[0.0, 3.0], [1.0, 3.0], [0.0, 0.0], [1.0, 1.0]])
GROUPS = torch.tensor([0, 0, 1, 1])


def test_gdpo_worked():
    """A of each differing reward is +-0.5 / 0.7071 = +-0.7071; sums +-0.7071 and +-1.4142, whose spread is sqrt(5 / 3) = 1.2910.

    GRPO, which normalises the sum of rewards, gives both groups +-0.7071.
    """
    each = group_advantages(TWO_GROUPS, GROUPS, noise_floor=0)
    s = math.sqrt(0.5)
    torch.testing.assert_close(each, torch.tensor([[-s, 0], [s, 0], [-s, -s], [s, s]]), atol=2e-4, rtol=0)
    torch.testing.assert_close(
        gdpo(TWO_GROUPS, torch.ones(2), GROUPS, noise_floor=0), torch.tensor([-0.548, 0.548, -1.095, 1.095]), atol=6e-4, rtol=0
    )
    grpo = group_advantages(TWO_GROUPS.sum(1, keepdim=True), GROUPS, noise_floor=0).squeeze(1)
    torch.testing.assert_close(grpo, torch.tensor([-s, s, -s, s]), atol=2e-4, rtol=0)


def test_gdpo_is_the_papers_unless_a_floor_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    scores, groups = torch.randn(32, 2, generator=generator), torch.arange(4).repeat_interleave(8)
    assert torch.equal(gdpo(scores, torch.ones(2), groups), gdpo(scores, torch.ones(2), groups, noise_floor=0))
    each = (scores.view(4, 8, 2) - scores.view(4, 8, 2).mean(1, keepdim=True)) / scores.view(4, 8, 2).std(1, keepdim=True)
    torch.testing.assert_close(gdpo(scores, torch.ones(2), groups), whiten(each.sum(2).flatten()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("between", [0.0, 1.0, 3.0, 5.0])
def test_how_far_prompts_lie_apart_changes_no_advantage(between):
    """Two rewards alike within prompts, one of which also differs between them by `between` times as much.

    Each keeps 1 / sqrt(1 + 0.2^2) = 0.981. With the deviation over the batch the second kept 0.98, 0.96, 0.85 and 0.70.
    """
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(50).repeat_interleave(16)
    within = torch.randn(50, 16, generator=generator)
    within = ((within - within.mean(1, keepdim=True)) / within.std(1, keepdim=True)).flatten()
    prompts = between * torch.randn(50, generator=generator).repeat_interleave(16)
    scores = torch.stack([within, within + prompts], dim=1)
    floored, free = (group_advantages(scores, groups, noise_floor=floor) for floor in (0.2, 0.0))
    torch.testing.assert_close(floored, free / math.sqrt(1 + 0.2**2), atol=1e-4, rtol=1e-4)


def test_the_spread_is_pooled_within_prompts_by_hand():
    """Groups 0, 2 and 10, 13, 16: squares about their means 2 and 18, freedom 1 + 2, so s^2 = 20 / 3; std_g^2 is 2 and 9."""
    scores, groups = torch.tensor([[0.0], [2.0], [10.0], [13.0], [16.0]]), torch.tensor([0, 0, 1, 1, 1])
    found = group_advantages(scores, groups, noise_floor=1.0).squeeze(1)
    a, b = 1 / math.sqrt(2 + 20 / 3), 3 / math.sqrt(9 + 20 / 3)
    torch.testing.assert_close(found, torch.tensor([-a, a, -b, 0, b]), atol=1e-4, rtol=0)


def test_rewards_that_sum_to_a_constant_cancel():
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert gdpo(scores, torch.ones(2), torch.zeros(2, dtype=torch.long), noise_floor=0).abs().max() < 1e-6


def test_the_floor_silences_a_reward_that_is_nearly_constant_in_a_group():
    """24 samples, an informative reward and one whose spread here is 1e-3 of its spread elsewhere: pure noise."""
    generator = torch.Generator().manual_seed(0)
    informative, noise = torch.randn(24, generator=generator), 1e-3 * torch.randn(24, generator=generator)
    scores = torch.cat([torch.stack([informative, noise], 1), torch.randn(24, 2, generator=generator)])
    groups = torch.arange(2).repeat_interleave(24)

    def correlation(floor: float, of: torch.Tensor) -> float:
        return torch.corrcoef(torch.stack([gdpo(scores, torch.ones(2), groups, noise_floor=floor)[:24], of]))[0, 1].item()

    assert correlation(0.0, noise) > 0.5
    assert abs(correlation(0.2, noise)) < abs(torch.corrcoef(torch.stack([informative, noise]))[0, 1].item()) + 0.02
    assert correlation(0.2, informative) > 0.99
    healthy = group_advantages(scores, groups, noise_floor=0.2)[24:] / group_advantages(scores, groups, noise_floor=0)[24:]
    assert (healthy - 1).abs().max() < 0.05


def test_a_measured_noise_level_decides_for_a_group_as_a_whole():
    scores = torch.tensor([[0.0, 0.0], [1e-3, 1.0], [2e-3, 3.0]])
    groups = torch.zeros(3, dtype=torch.long)
    found = group_advantages(scores, groups, noise_floor=0, noise=torch.tensor([0.01, 0.01]))
    assert found[:, 0].tolist() == [0, 0, 0]
    torch.testing.assert_close(found[:, 1].std(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_the_spread_may_come_from_a_calibration():
    scores, groups = torch.tensor([[0.0], [1.0]]), torch.zeros(2, dtype=torch.long)
    found = group_advantages(scores, groups, noise_floor=0.5, spread=torch.tensor([4.0]))
    assert found[1].item() == pytest.approx(0.5 / (math.sqrt(0.5 + 4.0) + 1e-4))


def test_capo_by_hand():
    """Scores 0, 1, 3: the first loses to both, (sigmoid(-1) + sigmoid(-3)) / 2, and so on; rates sum to N / 2."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    rates = win_rates(torch.tensor([[0.0], [1.0], [3.0]]), torch.zeros(3, dtype=torch.long)).squeeze(1)
    expected = [(sigmoid(-1) + sigmoid(-3)) / 2, (sigmoid(1) + sigmoid(-2)) / 2, (sigmoid(3) + sigmoid(2)) / 2]
    torch.testing.assert_close(rates, torch.tensor(expected))
    assert rates.sum().item() == pytest.approx(1.5)
    sharper = win_rates(torch.tensor([[0.0], [1.0], [3.0]]), torch.zeros(3, dtype=torch.long), temperature=0.5).squeeze(1)
    assert sharper[1].item() == pytest.approx((sigmoid(2) + sigmoid(-4)) / 2)


@pytest.mark.parametrize("function", [lambda s, g: group_advantages(s, g, spread=torch.ones(3)), win_rates])
def test_groups_are_compared_apart_and_order_does_not_matter(function):
    scores = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([5, 2, 2, 9] * 3)
    together = function(scores, groups)
    for group in (5, 2, 9):
        own = groups == group
        torch.testing.assert_close(function(scores[own], groups[own]), together[own])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(function(scores[order], groups[order]), together[order])


def test_nobody_to_be_compared_with():
    scores, alone = torch.tensor([[1.0, 2.0], [5.0, 6.0]]), torch.tensor([0, 1])
    assert group_advantages(scores, alone).tolist() == [[0, 0], [0, 0]]
    assert gdpo(scores, torch.ones(2), alone).tolist() == [0, 0]
    assert win_rates(scores, alone).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert whiten(torch.tensor([3.0])).tolist() == [0]
    assert group_advantages(scores[:1], alone[:1]).tolist() == [[0, 0]]
    same = torch.ones(4, 2)
    assert gdpo(same, torch.ones(2), torch.zeros(4, dtype=torch.long)).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gdpo(torch.tensor([[0.0], [math.inf]]), torch.ones(1), torch.zeros(2).long()), r"scores\[1, 0\] is inf"),
        # shapes in annotations are checked by the tests' hook before our own words could be, so the check itself is called
        (lambda: advantages._checked(torch.zeros(2, 1), torch.zeros(3).long()), "one group number per row"),
        (lambda: advantages._checked(torch.zeros(2), torch.zeros(2).long()), "scores must be 'n k'"),
        (lambda: group_advantages(torch.zeros(2, 1), torch.zeros(2).long(), noise_floor=-1), "noise_floor must be at least 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
