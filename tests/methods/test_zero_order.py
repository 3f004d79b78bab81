"""Zero-order search: neighbours on the sphere, moves only to better noises, its control that does not look at the reward."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.methods.zero_order import ZeroOrder
from diffalign.noise import sample_dot, sample_norm, seeded_noise
from tests.methods.test_find import D, Linear, problem


def test_neighbours_lie_on_the_sphere_at_the_angle():
    pivot = seeded_noise((4, 8, 8), [0, 1], 0) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    angle = torch.tensor([math.acos(0.95), 1.0])
    found = ZeroOrder.neighbour(pivot, angle, [3, 4], 7)
    torch.testing.assert_close(sample_norm(found), sample_norm(pivot))
    cosines = sample_dot(found, pivot) / (sample_norm(found) * sample_norm(pivot))
    torch.testing.assert_close(cosines, angle.cos())
    assert not torch.equal(found, ZeroOrder.neighbour(pivot, angle, [3, 4], 8))


def test_following_the_reward_beats_the_walk_at_the_same_cost():
    gains = []
    for make in (ZeroOrder, ZeroOrder.random_walk):
        totals = []
        for seed in range(12):
            reward = Linear(seed)
            out = make(reward, budget=60).search(problem(seed))
            assert reward.scored == len(out.trace.rewards["total"][0]) == 60
            totals.append(max(out.trace.rewards["total"][0]))
            assert out.noise.norm().item() == pytest.approx(math.sqrt(D), rel=0.15)
        gains.append(sum(totals) / 12)
    assert gains[0] > gains[1] + 0.3


def test_the_pivot_moves_only_to_what_is_better_and_narrows_where_nothing_is():
    class Flat(Linear):
        def __call__(self, images, prompts):
            scores = super().__call__(images, prompts)
            scores.total[:] = 0.0
            return scores

    out = ZeroOrder(Flat(), budget=13, starts=1, narrowing=0.5).search(problem(0))
    angles = out.trace.diagnostics["angle"][0]
    assert angles[0] == pytest.approx(math.acos(0.95), rel=1e-5)
    assert [round(angles[4 * k] / angles[0], 5) for k in range(3)] == [1.0, 0.5, 0.25]
    assert torch.equal(out.noise, problem(0).noise)


def test_samples_are_their_own():
    together = ZeroOrder(Linear(), budget=30).search(problem(5, 6))
    for i, seed in enumerate((5, 6)):
        torch.testing.assert_close(ZeroOrder(Linear(), budget=30, batch_size=3).search(problem(seed)).noise[0], together.noise[i])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0}, "budget must be an integer of at least 1"),
        ({"cosine": 1.0}, "cosine must be a finite number"),
        ({"narrowing": 0.0}, "narrowing must be a finite number above 0"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        ZeroOrder(Linear(), **settings)
