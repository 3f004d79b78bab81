"""The rivals: which steps they guide, and what they remember."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.guidance import GuidanceRun
from diffalign.methods.guidance_rivals import DeltaReuse, FixedFraction, IntervalGuidance
from tests.methods.guidance_toy import Toy, relative_error


def guided_steps(method, steps=10, **more):
    policy = method.begin(GuidanceRun(samples=1, timesteps=tuple(range(steps, 0, -1)), prediction="flow", **more))
    steps_guided = []
    for step in range(steps):
        if policy.plan(step) == ["both"]:
            steps_guided.append(step)
        evaluated = torch.zeros(1, 2) if step in steps_guided else torch.zeros(0, 2)
        policy.complete(step, torch.ones(1, 2), torch.ones(1, 2), evaluated)
    return steps_guided


def test_fixed_fraction():
    assert guided_steps(FixedFraction()) == [0, 1, 2, 3, 4]
    assert guided_steps(FixedFraction(fraction=0.0)) == [0]
    assert guided_steps(FixedFraction(fraction=1.0)) == list(range(10))


def test_interval_is_in_noise_over_signal():
    signal, noise = (0.0, 0.1, 0.5, 0.7, 0.9), (1.0, 0.9, 0.5, 0.3, 0.1)  # levels inf, 9, 1, 0.43, 0.11
    told = {"signal": signal, "noise": noise}
    assert guided_steps(IntervalGuidance(), 5, **told) == [2, 3]
    assert guided_steps(IntervalGuidance(low=0.0, high=math.inf), 5, **told) == [0, 1, 2, 3, 4]
    assert guided_steps(IntervalGuidance(low=0.2, high=1.0), 5, **told) == [2, 3]
    with pytest.raises(ValueError, match="none of the 5 steps has a noise level in"):
        guided_steps(IntervalGuidance(low=20.0, high=30.0), 5, **told)
    with pytest.raises(ValueError, match="does not tell"):
        guided_steps(IntervalGuidance(), 5)


def test_reuse_keeps_the_last_difference():
    policy = DeltaReuse(fraction=0.5).begin(GuidanceRun(samples=2, timesteps=(4.0, 3.0, 2.0, 1.0), prediction="flow"))
    c = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for step in (0, 1):
        assert policy.plan(step) == ["both", "both"]
        policy.complete(step, c, c, c - (step + 1))
    assert policy.plan(2) == ["conditional", "conditional"]
    new_c, new_u = policy.complete(2, c, c + 10, c[:0])
    assert torch.equal(new_c, c + 10)
    assert torch.equal(new_u, c + 10 - 2)
    policy.network_changed()
    assert policy.plan(3) == ["both", "both"]


def test_reuse_refreshes():
    assert guided_steps(DeltaReuse(fraction=0.4, refresh=3)) == [0, 1, 2, 3, 6, 9]
    assert guided_steps(DeltaReuse(fraction=0.4)) == [0, 1, 2, 3]


def test_more_guidance_is_nearer_to_full_guidance():
    toy = Toy()
    full = toy.run(None, samples=64)[0]
    errors = [relative_error(toy.run(FixedFraction(fraction=f), samples=64)[0], full) for f in (0.25, 0.5, 0.75, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0


@pytest.mark.parametrize(
    ("method", "settings"),
    [(FixedFraction, {"fraction": 2}), (IntervalGuidance, {"low": -1}), (IntervalGuidance, {"high": 0.1}),
     (DeltaReuse, {"fraction": -1}), (DeltaReuse, {"refresh": 1})],
)  # fmt: skip
def test_wrong_settings_get_a_sentence(method, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        method(**settings)
