"""The panel by hand: the image that would be returned, gains in units, the gap, and when it speaks of over-optimisation."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.rewards.calibration import from_scores
from diffalign.rewards.panel import BELOW_START, NO_SIGN, PAST_PEAK, calibrated_scales, panel, scales_of_starts
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
    assert found.verdict == PAST_PEAK
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
    assert found.verdict == NO_SIGN


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
