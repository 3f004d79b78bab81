"""The panel by hand: the image that would be returned, gains in units, the gap, and when it speaks of over-optimisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffalign.rewards.calibration import from_scores
from diffalign.rewards.panel import (
    BELOW_START,
    NO_SIGN,
    PAST_PEAK,
    TOO_FEW,
    calibrated_scales,
    chances_of_falls,
    panel,
    scales_of_starts,
)
from diffalign.types import Trace


def sample(total, **rewards) -> dict:
    return {"rewards": {"total": total, **rewards}}


def test_by_hand():
    """The total falls at evaluation 1, so the start stays the image returned; then 2 and 3 are. Units 2 and 0.5."""
    one = sample([1, 0, 3, 4], a=[10, 99, 12, 16], b=[1, 99, 2, 1.5])
    found = panel([one], {"a": 1.0}, ["b"], {"a": 2.0, "b": 0.5})
    assert found.optimised == [0, 0, 1, 3]
    assert found.watched == {"b": [0, 0, 2, 1]}
    assert found.gap == [0, 0, -1, 2]
    assert (found.samples, found.peak, found.fall) == (1, 2, 1)
    assert (found.chance, found.verdict) == (None, TOO_FEW)
    assert found.to_json()["watched"]["b"] == [0, 0, 2, 1]


def test_weights_orient_and_share():
    one = sample([0, 1], a=[0, 2], b=[0, -4], c=[0, 1], d=[0, 3])
    found = panel([one], {"a": 3.0, "b": -1.0}, ["c", "d"], dict.fromkeys("abcd", 1.0))
    assert found.optimised == [0, 0.75 * 2 + 0.25 * 4]
    assert found.gap[-1] == 2.5 - 2


def test_the_mean_over_samples_one_of_which_stopped_early():
    samples = [sample([0, 1, 2], a=[0, 1, 2], b=[0, 1, 1]), sample([0, 4], a=[0, 4], b=[0, 3])]
    found = panel(samples, {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0})
    assert found.optimised == [0, 2.5, 3]
    assert found.watched["b"] == [0, 2, 2]


def test_a_trace_of_a_search_is_what_it_reads():
    trace = Trace("reno", {"total": [[0.0, 1.0], [0.0, 2.0]], "a": [[0.0, 1.0], [0.0, 2.0]], "b": [[5.0, 5.0], [6.0, 7.0]]}, [1, 1])
    found = panel([trace.sample(0), trace.sample(1)], {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0})
    assert found.watched["b"] == [0, 0.5]


@pytest.mark.parametrize(
    ("end", "noise", "expected"),
    [
        (-1.0, 0.1, BELOW_START),
        (0.5, 0.1, PAST_PEAK),  # from 1.0 at the peak
        (1.0, 0.1, NO_SIGN),
        (-1.0, 20.0, NO_SIGN),  # lost among the samples
        (-0.05, 0.0, PAST_PEAK),  # too little below the start to speak of, but far below the peak
    ],
)
def test_when_it_speaks(end, noise, expected):
    offsets = noise * torch.randn(50, generator=torch.Generator().manual_seed(0))
    samples = [sample([0, 1, 2], a=[0, 1, 2], b=[0, 1 + o, end + 2 * o]) for o in (offsets - offsets.mean()).tolist()]
    assert panel(samples, {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0}).verdict == expected


def test_chances_by_hand():
    """Curves that end at 0. d(0) = 3, 1, 1: z = 5 / sqrt(11) = 1.51; d(1) = 1, -1, 0: z = 0; d(2) = 0.

    The peaks of the eight sign patterns: +++ 1.51; ++- 0.90; +-+ 1.41 (t = 1: 2 / sqrt(2)); +-- 1.41; and 0.00 or more for
    the others, whose best is -++ 0, -+- 0, --+ 0 and --- 0. One of eight reaches 1.51, all reach 0.
    """
    found = chances_of_falls(np.array([[3.0, 1.0, 0.0], [1.0, -1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert found.tolist() == [1 / 8, 1, 1]


def test_five_samples_that_all_fall_are_enough_and_four_are_not():
    five = [sample([0, 1, 2], a=[0, 1, 2], b=[0, 1 + i, 0.1 * i]) for i in range(5)]
    found = panel(five, {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0})
    assert (found.chance, found.verdict) == (1 / 32, PAST_PEAK)
    assert panel(five[1:], {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0}).verdict == TOO_FEW
    one_disagrees = [*five[:4], sample([0, 1, 2], a=[0, 1, 2], b=[0, 1, 9])]
    assert panel(one_disagrees, {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0}).verdict == NO_SIGN


def searched(rng: np.random.Generator, n: int, length: int, watched: np.ndarray) -> str:
    """The verdict on n searches whose totals climb through noise, with these watched scores "n length"."""
    totals = rng.normal(size=(n, length)) + 0.15 * np.arange(length)
    samples = [sample(t, a=t, b=w) for t, w in zip(totals.tolist(), watched.tolist(), strict=True)]
    return panel(samples, {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0}).verdict


INDEPENDENT = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape),
    "walk": lambda rng, shape: 1.5 / math.sqrt(shape[1]) * rng.normal(size=shape).cumsum(1),  # neighbouring images are alike
}


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_false_alarms_where_the_watched_scores_know_nothing_of_the_search(kind):
    """At most 5 % of runs, for 5 to 40 samples and 10 to 50 evaluations (fewer samples never speak).

    Two standard errors at the peak spoke in 20, 18 and 10 % of normal, skewed and wandering scores. 540 runs of each kind
    here, so the bound is 5 % and two standard errors of that; 60 runs of one cell exceed 9 once in 1500 times.
    """
    rng, runs = np.random.default_rng(0), 60
    alarms = []
    for n in (5, 12, 40):
        for length in (10, 25, 50):
            verdicts = [searched(rng, n, length, INDEPENDENT[kind](rng, (n, length))) for _ in range(runs)]
            alarms.append(sum(verdict in (BELOW_START, PAST_PEAK) for verdict in verdicts))
    assert max(alarms) <= 9
    assert sum(alarms) / (runs * len(alarms)) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / (runs * len(alarms)))
    assert sum(alarms) > 0


@pytest.mark.parametrize(
    ("rise", "end", "n", "least"),
    [
        (0.3, -0.4, 20, 0.55),  # an early peak, then below the start
        (0.3, -0.4, 40, 0.85),
        (0.3, -0.4, 144, 1.0),
        (0.7, 0.0, 40, 0.5),  # a late peak, and back to the start: half of the evaluations lie before it
        (0.7, 0.0, 144, 0.95),
        (0.0, -0.7, 40, 0.75),  # downhill from the start
    ],
)
def test_a_true_fall_is_found(rise, end, n, least):
    """The mean rises to 0.8 at `rise` of 50 evaluations and falls to `end`; each score has noise of 1, far more than the fall."""
    rng, runs = np.random.default_rng(1), 30
    t = np.linspace(0, 1, 50)
    mean = np.interp(t, [0, rise, 1], [0, 0.8, end]) if rise else end * t
    found = [searched(rng, n, 50, rng.normal(size=(n, 50)) + mean) for _ in range(runs)]
    assert sum(verdict in (BELOW_START, PAST_PEAK) for verdict in found) / runs >= least


def test_a_search_that_raised_nothing_is_not_over_optimised():
    samples = [sample([0, 1], a=[0, 0], b=[0, -3])] * 5
    assert panel(samples, {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0}).verdict == NO_SIGN


def test_broken_scores():
    samples = [
        sample([0, None, 2], a=[0, None, 1], b=[0, None, 1]),  # the broken evaluation is never returned: harmless
        sample([None, 1, 2], a=[None, 1, 2], b=[0, 1, 2]),  # the start cannot be compared with
        sample([0, 1, 2], a=[0, 1, 2], b=[0, 1, math.nan]),
    ]
    found = panel(samples, {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0})
    assert found.samples == 1
    assert found.optimised == [0, 0, 1]


@pytest.mark.parametrize("scales", [{}, {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 0.0}])
def test_nothing_to_say(scales):
    assert panel([sample([0, 1], a=[0, 1], b=[0, 1])], {"a": 1.0}, ["b"], scales) is None
    assert panel([], {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0}) is None
    assert panel([sample([0], b=[0])], {"a": 1.0}, ["b"], {"a": 1.0, "b": 1.0}) is None


def test_units():
    samples = [sample([0], a=[1.0], b=[None]), sample([0], a=[3.0], b=[2.0])]
    assert scales_of_starts(samples, ["a", "b", "c"]) == {"a": pytest.approx(math.sqrt(2))}
    calibration = from_scores({"a": [1.0, 5.0], "p": [0.2, 0.8]}, ["x", "y"], transforms={"p": "logit"})
    assert calibrated_scales(calibration, ["a", "p", "c"]) == {"a": pytest.approx(math.sqrt(8))}
