"""Dominance, fronts and crowding against brute force, with ties, groups and epsilon."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.rewards import pareto
from diffalign.rewards.pareto import crowding_distance, dominates, front_ranks, kept_fraction, pareto_mask


def brute_mask(scores: list[list[float]]) -> list[bool]:
    return [not any(beats(b, a) for b in scores) for a in scores]


def beats(a: list[float], b: list[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def brute_ranks(scores: list[list[float]]) -> list[int]:
    ranks: dict[int, int] = {}
    rank = 0
    while len(ranks) < len(scores):
        left = [i for i in range(len(scores)) if i not in ranks]
        front = [i for i in left if not any(beats(scores[j], scores[i]) for j in left)]
        ranks.update(dict.fromkeys(front, rank))
        rank += 1
    return [ranks[i] for i in range(len(scores))]


def whole_numbers(n: int, k: int, seed: int) -> torch.Tensor:
    """Scores from few values, so that ties and duplicates abound."""
    return torch.randint(0, 4, (n, k), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_mask_and_ranks_against_brute_force_with_ties(k, seed):
    scores = whole_numbers(24, k, seed)
    assert pareto_mask(scores).tolist() == brute_mask(scores.tolist())
    assert front_ranks(scores).tolist() == brute_ranks(scores.tolist())


def test_by_hand():
    scores = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [2.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
    assert pareto_mask(scores).tolist() == [True, True, True, False, False, True]  # the two that tie both stay
    assert front_ranks(scores).tolist() == [0, 0, 0, 1, 2, 0]
    assert dominates(scores)[2].tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_groups_are_compared_apart(epsilon):
    scores = torch.rand(30, 3, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([7, -1, 0] * 10)
    mask, ranks = pareto_mask(scores, epsilon, groups), front_ranks(scores, epsilon, groups)
    distances = crowding_distance(scores, ranks, groups)
    for group in (7, -1, 0):
        own = groups == group
        assert torch.equal(mask[own], pareto_mask(scores[own], epsilon))
        assert torch.equal(ranks[own], front_ranks(scores[own], epsilon))
        torch.testing.assert_close(distances[own], crowding_distance(scores[own], ranks[own]))


@pytest.mark.parametrize("seed", range(4))
def test_epsilon_against_brute_force_on_boxes(seed):
    """Box numbers counted from the best score; between boxes plain dominance of boxes, inside one that of scores."""
    scores = torch.rand(30, 3, generator=torch.Generator().manual_seed(seed))
    scores[5] = scores[6]
    epsilon = torch.tensor([0.2, 0.0, 0.35])
    rows = scores.tolist()
    top = [max(row[k] for row in rows) for k in range(3)]

    def box(row: list[float]) -> list[float]:
        return [row[k] if epsilon[k] == 0 else -math.floor((top[k] - row[k]) / epsilon[k].item()) for k in range(3)]

    expected = [not any(beats(b, a) if box(a) == box(b) else beats(box(b), box(a)) for b in rows) for a in rows]
    assert pareto_mask(scores, epsilon).tolist() == expected
    assert sum(expected) < pareto_mask(scores).sum()


def test_epsilon_prunes_more_but_never_all_and_does_not_mind_offsets():
    scores = torch.randn(64, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masks = [pareto_mask(scores, epsilon) for epsilon in (0.0, 0.5, 1.0, 2.0, 100.0)]
    assert all((masks[0] | ~mask).all() for mask in masks)  # a subset of the plain front
    assert masks[0].sum() > masks[2].sum() > masks[3].sum()
    assert all(mask.any() for mask in masks)
    assert torch.equal(pareto_mask(scores + 37.25, 1.0), masks[2])
    assert torch.equal(masks[4], masks[0])  # one box for all is the plain front


def test_a_circle_of_three_does_not_remove_itself():
    """Under "no worse than epsilon = 1, and better by more in one", each of these would remove the next."""
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 2.0]])
    assert pareto_mask(scores, 1.0).all()


def test_order_does_not_matter():
    scores = whole_numbers(20, 3, 9)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for function in (pareto_mask, front_ranks, lambda s: crowding_distance(s, front_ranks(s)), lambda s: pareto_mask(s, 1.5)):
        assert torch.equal(function(scores)[order], function(scores[order]))


def test_crowding_by_hand():
    """A front with x = 0, 1, 4 and y = 8, 4, 0: the middle has (4 - 0) / 4 + (8 - 0) / 8 = 2; its ends are alone."""
    scores = torch.tensor([[0.0, 8.0], [1.0, 4.0], [4.0, 0.0], [0.0, 0.0]])
    ranks = front_ranks(scores)
    assert ranks.tolist() == [0, 0, 0, 1]
    assert crowding_distance(scores, ranks).tolist() == [math.inf, 2.0, math.inf, math.inf]
    crowd = torch.tensor([[0.0, 8.0], [1.0, 4.0], [1.0, 4.0], [4.0, 0.0]])
    assert crowding_distance(crowd, front_ranks(crowd)).tolist() == [math.inf, 0.0, 0.0, math.inf]
    flat = torch.tensor([[0.0, 5.0], [1.0, 5.0], [3.0, 5.0]])  # on one front by decree: y says nothing
    assert crowding_distance(flat, torch.zeros(3, dtype=torch.long)).tolist() == [math.inf, 1.0, math.inf]


@pytest.mark.parametrize(("k", "expected"), [(2, 0.17), (3, 0.30), (4, 0.52), (5, 0.67)])
def test_the_share_of_gaussian_samples_that_nobody_dominates(k, expected):
    """Groups of 24: the figures in pareto.py, from an independent simulation."""
    groups = torch.arange(40).repeat_interleave(24)
    scores = torch.randn(len(groups), k, generator=torch.Generator().manual_seed(k))
    assert kept_fraction(pareto_mask(scores, groups=groups), groups) == pytest.approx(expected, abs=0.04)


def test_one_sample_and_none():
    assert pareto_mask(torch.zeros(1, 3)).tolist() == [True]
    assert front_ranks(torch.zeros(0, 3)).tolist() == []
    assert pareto_mask(torch.zeros(0, 3), 0.5).tolist() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pareto_mask(torch.tensor([[0.0, 1.0], [math.nan, 2.0]])), r"scores\[1, 0\] is nan"),
        # shapes in annotations are checked by the tests' hook before our own words could be, so the check itself is called
        (lambda: pareto._check(torch.zeros(3), None), "scores must be 'n k'"),
        (lambda: pareto._check(torch.zeros(3, 2), torch.zeros(2)), r"got \(3, 2\) and \(2,\)"),
        (lambda: pareto_mask(torch.zeros(3, 2), -0.1), "epsilon must be at least 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
