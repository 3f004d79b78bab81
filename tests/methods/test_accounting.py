"""What a search has cost, counted by hand, and the two budgets: evaluations, or seconds by a clock that the test turns."""

from __future__ import annotations

import pytest
import torch

from diffalign.methods import FIND, BestOfN, FKSteering, Guide, ReNO, SeedPruning, ZeroOrder, build_method, tracking
from tests.methods.test_particles import Mean, problem


@pytest.fixture
def watch(monkeypatch):
    """A clock that stands still but for what the test adds to `watch[0]`."""
    now = [100.0]
    monkeypatch.setattr(tracking, "clock", lambda: now[0])
    return now


TIMED = {
    "best-of-n": lambda reward, **bound: BestOfN(reward, batch_size=3, **bound),
    "zero-order": lambda reward, **bound: ZeroOrder(reward, neighbours=2, starts=1, **bound),
    "find": lambda reward, **bound: FIND(reward, candidates=2, **bound),
    "reno": lambda reward, **bound: ReNO(reward, starts=1, patience=None, **bound),
}


@pytest.mark.parametrize("name", TIMED)
def test_seconds_end_a_search_at_the_first_check_after_them(name, curved, watch):
    """Three samples, a second for every batch of images: best-of-N makes 3 images at once, the others a round of all at once."""
    batches = []

    def generate(noise, rows):
        watch[0] += 1.0
        batches.append(len(rows))
        return curved.generate(noise, rows)

    result = TIMED[name](curved.reward(), seconds=6.5).search(curved.problem([3, 1, 4], generate=generate))
    assert len(batches) == 7, "the seventh second is the first that is over"
    assert sum(cost.evaluations for cost in result.cost) == sum(batches)
    assert [cost.seconds for cost in result.cost] == pytest.approx([7 / 3] * 3)
    assert all(cost.backward_passes == (7 if name == "reno" else 0) for cost in result.cost)


def test_every_sample_has_an_image_however_short_the_time(curved, watch):
    def generate(noise, rows):
        watch[0] += 1.0
        return curved.generate(noise, rows)

    result = BestOfN(curved.reward(), seconds=0.5, batch_size=1).search(curved.problem([3, 1, 4], generate=generate))
    assert [len(totals) for totals in result.trace.rewards["total"]] == [1, 1, 1]
    assert torch.equal(result.images, result.initial_images)


def test_time_finds_what_evaluations_find(curved, watch):
    """A search that is stopped after seven candidates is best-of-7."""

    def generate(noise, rows):
        watch[0] += 1.0
        return curved.generate(noise, rows)

    timed = BestOfN(curved.reward(), seconds=7.0).search(curved.problem([3, 1], generate=generate))
    counted = BestOfN(curved.reward(), budget=7).search(curved.problem([3, 1]))
    assert timed.trace.rewards == counted.trace.rewards
    assert torch.equal(timed.images, counted.images)


def test_the_clock_is_not_asked_where_evaluations_bound(curved, watch):
    def generate(noise, rows):
        watch[0] += 1e9
        return curved.generate(noise, rows)

    result = BestOfN(curved.reward(), budget=5).search(curved.problem([3], generate=generate))
    assert len(result.trace.rewards["total"][0]) == 5


def test_steering_is_charged_for_what_it_looked_at():
    """Four steps. FK: a whole generation and four particles, weighed after all steps but the last. Guide: three pulls."""
    given = problem((0, 1))
    steered = FKSteering(Mean(), budget=5, every=0.25, start=0.0, stop=1.0).search(given)
    assert [(c.evaluations, c.backward_passes, c.reward_calls) for c in steered.cost] == [(5.0, 0, 5 + 3 * 4)] * 2
    guided = Guide(Mean(), budget=2, stop=0.75).search(given)
    assert [(c.evaluations, c.backward_passes, c.reward_calls) for c in guided.cost] == [(2.0, 3, 2 + 3)] * 2


def test_pruning_is_charged_for_trajectories_as_far_as_they_went():
    """Cuts after steps 1 and 2 of 4: of N trajectories all make one step, half of them a second, a quarter the last two."""
    given, method = problem((0, 1)), SeedPruning(Mean(), budget=8)
    count, kept = method.plan(4)
    result = method.search(given)
    spent = 1 + (count + kept[0] + 2 * kept[1]) / 4
    assert [cost.evaluations for cost in result.cost] == pytest.approx([spent] * 2)
    assert spent <= 8
    assert given.loop.spent + 0 == pytest.approx(2 * spent * 4), "the toy's own count of its network's evaluations"
    assert [cost.reward_calls for cost in result.cost] == [1 + count + kept[0] + kept[1]] * 2


def test_memory_is_that_of_the_process(curved):
    (cost,) = BestOfN(curved.reward(), budget=2).search(curved.problem([3])).cost
    assert cost.peak_memory_mb is None or cost.peak_memory_mb > 50  # a process with torch in it
    assert tracking.peak_memory_mb(torch.device("meta")) is None


def test_by_name_either_budget(curved):
    assert build_method("best-of-n", curved.reward(), 7, seconds=2.0).seconds == 2.0
    assert build_method("random-walk", curved.reward(), 7, seconds=2.0).walk
    assert build_method("best-of-n", curved.reward(), 7).seconds is None
    with pytest.raises(ValueError, match="prune makes what its budget says in one go"):
        build_method("prune", curved.reward(), 7, seconds=2.0)
    with pytest.raises(ValueError, match="seconds must be a finite number above 0"):
        BestOfN(curved.reward(), seconds=0.0)
