"""Adaptive Guidance on exact predictions: the cosine in every space, the latch, the batch, and the trap of epsilon space."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.guidance import GuidanceRun
from diffalign.methods.adaptive_guidance import AdaptiveGuidance, calibrate, evaluated_share
from diffalign.methods.guidance import cosine, direction, resolve_space
from tests.methods.guidance_toy import Toy, relative_error


def run_of(samples=1, steps=10, prediction="flow", **more):
    return GuidanceRun(samples=samples, timesteps=tuple(range(steps, 0, -1)), prediction=prediction, **more)


def at_angle(*degrees):
    """Conditional and unconditional predictions "b 2" that many degrees apart."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.tensor([[1.0, 0.0]]).repeat(len(degrees), 1), torch.stack([angles.cos(), angles.sin()], dim=1).float()


# --- spaces -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_directions_are_those_of_x0_and_velocity(prediction):
    """From x0 and eps chosen freely, each kind of output gives both back, up to a positive factor."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 12, generator=generator)
    a, s = (0.6, 0.8) if prediction != "flow" else (0.3, 0.7)
    x = a * x0 + s * eps
    output = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0, "flow": eps - x0}[prediction]
    velocity = eps - x0 if prediction == "flow" else a * eps - s * x0
    for space, expected in (("x0", x0), ("velocity", velocity), ("model_output", output)):
        found = direction(output, x, a, s, prediction, resolve_space(space, prediction))
        torch.testing.assert_close(cosine(found, expected), torch.ones(3), rtol=0, atol=1e-5)


def test_auto_is_x0_for_epsilon_only():
    assert resolve_space("auto", "epsilon") == "x0"
    assert {resolve_space("auto", p) for p in ("v_prediction", "flow", "sample", "unknown")} == {"model_output"}
    with pytest.raises(ValueError, match="use 'model_output'"):
        resolve_space("x0", "unknown")


def test_cosine_of_half_precision_is_taken_in_float32():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 4096, generator=generator)
    b = a + 0.03 * torch.randn(1, 4096, generator=generator)
    assert float(cosine(a.bfloat16(), b.bfloat16())) == pytest.approx(float(cosine(a, b)), abs=1e-4)
    assert float(cosine(torch.zeros(1, 3), a[:, :3])) == 0.0


def test_epsilon_cosine_is_u_shaped_and_would_stop_at_the_first_step():
    toy = Toy()
    recording = toy.run(AdaptiveGuidance(threshold=math.inf, space="model_output"))[2]
    mean = torch.tensor(recording.diagnostics["cosine"]).mean(0)
    dip = int(mean.argmin())
    assert 1 < dip < 12
    assert mean[0] > 0.991 > mean[dip]
    assert mean[-1] > 0.999
    naive = AdaptiveGuidance(threshold=0.991, space="model_output", warm_up=0.0)
    assert toy.run(naive)[1].count(toy.steps + 1) >= 6  # most of the eight samples are guided for a single step
    rising = torch.tensor(toy.run(AdaptiveGuidance(threshold=math.inf))[2].diagnostics["cosine"]).mean(0)
    assert rising[0] < 0.5
    assert (rising.diff() > -0.01).all()
    evaluations = toy.run(AdaptiveGuidance(threshold=0.991, warm_up=0.0))[1]
    assert min(evaluations) >= toy.steps + 5


# --- the latch ----------------------------------------------------------------------------------------------------------------------


def test_one_way_and_the_crossing_step_is_still_guided():
    policy = AdaptiveGuidance(threshold=math.cos(math.radians(10)), warm_up=0.0).begin(run_of())
    x = torch.zeros(1, 2)
    plans = []
    for step, angle in enumerate([60, 20, 5, 60, 60]):
        plans.append(list(policy.plan(step)))
        c, u = at_angle(angle)
        evaluated = u if plans[-1] == ["both"] else u[:0]
        new_c, new_u = policy.complete(step, x, c, evaluated)
        assert new_c is c
        assert new_u is (evaluated if plans[-1] == ["both"] else c)
    assert plans == [["both"]] * 3 + [["conditional"]] * 2
    assert policy.diagnostics["cosine"][0] == pytest.approx([math.cos(math.radians(a)) for a in (60, 20, 5)], abs=1e-6)
    assert policy.diagnostics["settled_after"] == [[3]]


@pytest.mark.parametrize(("warm_up", "patience", "guided"), [(0.0, 1, 1), (0.3, 1, 3), (0.3, 2, 3), (0.0, 4, 4), (1.0, 1, 10)])
def test_warm_up_and_patience(warm_up, patience, guided):
    policy = AdaptiveGuidance(threshold=0.5, warm_up=warm_up, patience=patience).begin(run_of())
    c, u = at_angle(0)
    plans = []
    for step in range(10):
        plans.append(policy.plan(step)[0])
        policy.complete(step, torch.zeros(1, 2), c, u if plans[-1] == "both" else u[:0])
    assert plans == ["both"] * guided + ["conditional"] * (10 - guided)


def test_a_change_of_network_breaks_a_streak_but_not_a_latch():
    policy = AdaptiveGuidance(threshold=0.5, warm_up=0.0, patience=2).begin(run_of(2))
    c, u = at_angle(0, 0)
    policy.complete(0, c, c, u)
    policy.network_changed()
    policy.complete(1, c, c, u)
    assert policy.plan(2) == ["both", "both"]
    policy.complete(2, c, c, u)
    policy.network_changed()
    assert policy.plan(3) == ["conditional", "conditional"]


def test_per_sample_and_all():
    c, u = at_angle(0, 90, 0)
    alone = AdaptiveGuidance(threshold=0.9, warm_up=0.0).begin(run_of(3))
    together = AdaptiveGuidance(threshold=0.9, warm_up=0.0, decision="all").begin(run_of(3))
    for policy in (alone, together):
        policy.complete(0, c, c, u)
    assert alone.plan(1) == ["conditional", "both", "conditional"]
    assert together.plan(1) == ["both"] * 3
    new_c, new_u = alone.complete(1, c, c, u[1:2])
    assert new_c is c
    assert torch.equal(new_u, torch.stack([c[0], u[1], c[2]]))
    settled = at_angle(0, 0, 0)
    together.complete(1, c, *settled)
    assert together.plan(2) == ["conditional"] * 3


def test_a_stopped_sample_keeps_its_difference_and_refreshes_it():
    """Samples 0 and 2 reach the threshold at step 0 and sample 1 at step 1; every third step of each evaluates both branches again."""
    policy = AdaptiveGuidance(threshold=0.9, warm_up=0.0, refresh=3).begin(run_of(3))
    angles = {0: (0, 90, 20), 1: (20,), 3: (40, 50), 4: (60,), 6: (10, 70), 7: (80,)}
    kept = torch.zeros(3, 2)
    for step in range(8):
        rows = [row for row, branch in enumerate(policy.plan(step)) if branch == "both"]
        assert rows == {0: [0, 1, 2], 1: [1], 3: [0, 2], 4: [1], 6: [0, 2], 7: [1]}.get(step, [])
        c = torch.tensor([[1.0, 0.0]]).repeat(3, 1) * (step + 1)
        u = at_angle(*angles[step])[1] if rows else torch.zeros(0, 2)
        new_c, new_u = policy.complete(step, torch.zeros(3, 2), c, u)
        assert new_c is c
        if rows:
            kept[rows] = c[rows] - u
        torch.testing.assert_close(new_u, c - kept)
    assert [len(series) for series in policy.diagnostics["cosine"]] == [3, 4, 3]
    assert policy.diagnostics["settled_after"] == [[1], [2], [1]]


def test_a_change_of_network_makes_the_difference_old():
    policy = AdaptiveGuidance(threshold=0.5, warm_up=0.0, refresh=5).begin(run_of(2))
    c, u = at_angle(0, 0)
    policy.complete(0, c, c, u)
    assert policy.plan(1) == ["conditional"] * 2
    policy.network_changed()
    assert policy.plan(1) == ["both"] * 2
    policy.complete(1, c, c, u)
    assert policy.plan(2) == ["conditional"] * 2


@pytest.mark.parametrize("method", [AdaptiveGuidance(threshold=0.99), AdaptiveGuidance(threshold=0.9, refresh=3)])
def test_a_batch_is_its_samples_alone(method):
    toy = Toy()
    together, evaluations, _ = toy.run(method, samples=6)
    assert len(set(evaluations)) > 1  # they stop at different steps
    for row in range(6):
        alone, own, _ = toy.run(method, samples=6, rows=[row])
        assert own == evaluations[row : row + 1]
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_saves_evaluations_at_little_difference(prediction):
    toy = Toy(prediction=prediction)
    full, cost, _ = toy.run(None, samples=64)
    space = "x0"
    found, evaluations, _ = toy.run(AdaptiveGuidance(threshold=0.991, space=space), samples=64)
    saved = 1 - sum(evaluations) / sum(cost)
    assert saved > 0.15
    assert relative_error(found, full) < 0.05


# --- thresholds ---------------------------------------------------------------------------------------------------------------------


def test_calibration_meets_the_share():
    toy = Toy()
    cosines = toy.run(AdaptiveGuidance(threshold=math.inf), samples=40)[2].diagnostics["cosine"]
    threshold = calibrate(cosines, share=0.5)
    evaluations = toy.run(AdaptiveGuidance(threshold=threshold), samples=40)[1]
    # guidance that stops changes what follows, not what led there, so the recorded share is the share
    assert 0.5 <= sum(e - toy.steps for e in evaluations) / (40 * toy.steps) < 0.52


def test_calibration_by_hand():
    cosines = [[0.1, 0.5, 0.9, 1.0], [0.2, 0.8, 0.95, 1.0]]
    assert calibrate(cosines, share=0.5, warm_up=0.25) == 0.5
    assert evaluated_share(cosines, 0.5, 0) == 0.5
    assert evaluated_share(cosines, 0.5, 0, refresh=2) == 0.75
    assert calibrate(cosines, share=0.75, warm_up=0.25, refresh=2) == 0.5
    assert calibrate([[0.5] * 20] * 7, share=0.4, refresh=4) == 0.5  # the least there is: 4 of the warm-up and 4 of the other 16
    assert calibrate(cosines, share=0.51, warm_up=0.25) == 0.8
    assert calibrate(cosines, share=1.0, warm_up=0.25) == 1.0
    assert calibrate([[0.1, 0.2, 0.1, 0.1]], share=1.0) == math.inf
    with pytest.raises(ValueError, match="warm-up"):
        calibrate(cosines, share=0.2, warm_up=0.5)
    with pytest.raises(ValueError, match="equal length"):
        calibrate([[0.1], [0.1, 0.2]])


def test_the_threshold_comes_from_the_caller_then_the_model_then_a_warned_fallback(caplog):
    assert AdaptiveGuidance(threshold=0.7).begin(run_of(cosine_threshold=0.8)).threshold == 0.7
    assert AdaptiveGuidance().begin(run_of(cosine_threshold=0.8)).threshold == 0.8
    assert not caplog.records
    assert AdaptiveGuidance().begin(run_of()).threshold == 0.995
    assert "no threshold is calibrated" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1.0}, "threshold must be a finite number above -1"),
        ({"threshold": math.nan}, "threshold must be a finite number"),
        ({"space": "eps"}, "space must be one of auto, x0, velocity, model_output, got 'eps'"),
        ({"warm_up": 1.5}, "warm_up must be"),
        ({"patience": 0}, "patience must be"),
        ({"decision": "mean"}, "decision must be"),
        ({"refresh": 1}, "refresh must be 0 or at least 2, got 1"),
        ({"refresh": -2}, "refresh must be an integer of at least 0"),
    ],
)
def test_wrong_settings_get_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveGuidance(**settings)


def test_a_stock_pipeline_is_pointed_to_guided():
    with pytest.raises(TypeError, match=r"object takes no plugins; write `with diffalign.guided"):
        AdaptiveGuidance().attach(object())
