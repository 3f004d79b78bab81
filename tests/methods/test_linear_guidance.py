"""LinearAG on exact predictions: the regression by hand, collinearity, held-out samples, storage, and refusal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from diffalign.methods.guidance_rivals import DeltaReuse, FixedFraction
from diffalign.methods.linear_guidance import DESCRIPTION, LinearCoefficients, LinearGuidance, LinearSettings, Sums, features
from diffalign.methods.linear_guidance_fit import LinearFit
from tests.methods.guidance_toy import Toy, relative_error


def fitted(toy, settings=None, samples=100, batches=2):
    fit = LinearFit(settings)
    for seed in range(batches):
        toy.run(fit, samples=samples // batches, seed=100 + seed)
    return fit.solve()


# --- the regression -----------------------------------------------------------------------------------------------------------------


def test_features_span_past_predictions():
    c, c1, d1, c2, d2 = torch.arange(10.0).view(5, 1, 2)
    columns = features(c, [(c1, d1), (c2, d2)])
    torch.testing.assert_close(columns, torch.stack([d1, d2, c - c1, c1 - c2, c]))


def test_sums_solve_least_squares():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(3, 5, 40, generator=generator)
    truth = torch.tensor([2.0, -1.0, 0.5])
    d = torch.tensordot(truth, columns, dims=1) + 0.1 * torch.randn(5, 40, generator=generator)
    sums = Sums.zeros(3)
    for row in range(5):
        sums.add(columns[:, row : row + 1], d[row : row + 1])
    found = sums.solve(ridge=0.0)
    expected = torch.linalg.lstsq(columns.flatten(1).T.double(), d.flatten()[:, None].double()).solution[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    residual = (d.flatten().double() - expected @ columns.flatten(1).double()).norm() / d.double().norm()
    assert sums.residual(found) == pytest.approx(float(residual), rel=1e-5)


def test_ridge_by_hand():
    """One column f = d = (3, 4): RMS scaling makes both unit, so b = 1 / (1 + lambda)."""
    sums = Sums.zeros(1)
    sums.add(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[3.0, 4.0]]))
    assert float(sums.solve(ridge=0.0)) == pytest.approx(1.0)
    assert float(sums.solve(ridge=1.0)) == pytest.approx(0.5)
    assert sums.residual(torch.tensor([0.5], dtype=torch.float64)) == pytest.approx(0.5)


def test_collinear_columns_get_small_coefficients():
    """f2 = f1 + 1e-4 n and d = f1 + 1e-3 n: least squares answers -9 and 10, ridge shares the weight."""
    base, noise = torch.randn(2, 1, 1000, generator=torch.Generator().manual_seed(0))
    columns, d = torch.stack([base, base + 1e-4 * noise]), base + 1e-3 * noise
    sums = Sums.zeros(2)
    sums.add(columns, d)
    assert sums.solve(ridge=0.0).tolist() == pytest.approx([-9.0, 10.0], abs=0.1)
    assert sums.solve(ridge=1e-5).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    dead = Sums.zeros(2)
    dead.add(torch.stack([base, torch.zeros_like(base)]), d)
    assert dead.solve(ridge=1e-5)[1] == 0.0


# --- the plan -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "evaluations"), [(20, 25), (50, 63), (8, 10)])
def test_the_plan_of_the_paper(steps, evaluations):
    branches = LinearSettings().branches(steps)
    assert sum(2 if branch == "both" else 1 for branch in branches) == evaluations
    assert branches[0] == "both"
    assert LinearSettings().predicted(8) == [1, 3]
    assert LinearSettings(tail="estimate").predicted(8) == [1, 3, 4, 5, 6, 7]


def test_saves_a_third_and_beats_the_rivals_at_equal_cost():
    toy = Toy()
    full, cost, _ = toy.run(None, samples=64)
    linear, evaluations, _ = toy.run(LinearGuidance(fitted(toy)), samples=64)
    assert sum(evaluations) / sum(cost) == 25 / 40
    error = relative_error(linear, full)
    for rival in (FixedFraction(fraction=0.25), DeltaReuse(fraction=0.25)):
        theirs, same, _ = toy.run(rival, samples=64)
        assert same == evaluations
        assert error < 0.5 * relative_error(theirs, full)
    assert error < 0.05


def test_coefficients_do_not_depend_on_batches():
    toy = Toy(steps=8)
    ends = []
    for batches in (1, 4):
        fit = LinearFit()
        for batch in range(batches):
            toy.run(fit, samples=40, seed=5, rows=list(range(batch * 40 // batches, (batch + 1) * 40 // batches)))
        ends.append(fit.solve())
    one, four = ends
    assert (one.samples, one.held_out) == (four.samples, four.held_out) == (32, 8)
    for step in one.by_step:
        torch.testing.assert_close(one.by_step[step], four.by_step[step], rtol=1e-3, atol=1e-4)


def test_recording_changes_nothing():
    toy = Toy(steps=8)
    assert torch.equal(toy.run(LinearFit())[0], toy.run(None)[0])


def test_a_step_that_cannot_be_predicted_is_evaluated(caplog):
    toy = Toy(steps=8)
    strict = fitted(toy, LinearSettings(limit=1e-6))
    assert strict.branches[:4] == ("both",) * 4
    assert "misses step 1" in caplog.text
    assert not strict.by_step
    toy.run(LinearGuidance(strict))
    loose = fitted(toy, LinearSettings(limit=10.0))
    assert set(loose.by_step) == {1, 3}
    assert all(0 < value < 1 for value in loose.residuals.values())


def test_an_evaluated_step_does_not_shift_the_window_of_later_ones():
    toy = Toy(steps=8)
    loose = fitted(toy, LinearSettings(limit=10.0))
    partly = replace(loose, branches=("both", "both", *loose.branches[2:]), by_step={3: loose.by_step[3]})
    seen = []
    policy_run = toy.run(LinearGuidance(partly))
    policy = policy_run[2]
    seen = policy.past
    assert len(seen) == 2
    assert sum(policy_run[1]) == 8 * (8 + 3)


def test_tail_by_estimate_uses_coefficients_to_the_end():
    toy = Toy(steps=8)
    coefficients = fitted(toy, LinearSettings(tail="estimate", limit=10.0))
    assert set(coefficients.by_step) == {1, 3, 4, 5, 6, 7}
    assert toy.run(LinearGuidance(coefficients))[1] == [10] * 8


# --- storage and refusal ------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    toy = Toy(steps=8)
    coefficients = fitted(toy)
    coefficients.save(tmp_path / "fit")
    loaded = LinearCoefficients.load(tmp_path / "fit")
    assert loaded.settings == coefficients.settings
    assert loaded.branches == coefficients.branches
    assert loaded.residuals == coefficients.residuals
    assert torch.equal(toy.run(LinearGuidance(loaded))[0], toy.run(LinearGuidance(coefficients))[0])
    with pytest.raises(FileNotFoundError, match="holds no LinearAG coefficients; make them with"):
        LinearCoefficients.load(tmp_path)
    description = json.loads((tmp_path / "fit" / DESCRIPTION).read_text())
    del description["branches"]
    (tmp_path / "fit" / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="not a whole LinearAG description"):
        LinearCoefficients.load(tmp_path / "fit")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"steps": 10}, "timesteps: 8 numbers when it was made, 10 numbers now"),
        ({"scale": 3.0}, "guidance_scale: 5.0 when it was made, 3.0 now"),
        ({"network": "tuned"}, "network: toy when it was made, tuned now"),
    ],
)
def test_another_run_is_refused_with_the_reason(other, reason):
    coefficients = fitted(Toy(steps=8))
    with pytest.raises(ValueError, match=reason):
        Toy(**{"steps": 8, **other}).run(LinearGuidance(coefficients))


def test_fitting_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="at least 5 samples"):
        LinearFit().solve()
    fit = LinearFit()
    Toy(steps=8).run(fit)
    with pytest.raises(ValueError, match="what has been collected does not fit this run"):
        Toy(steps=8, scale=3.0).run(fit)
    with pytest.raises(ValueError, match="above 1"):
        Toy(scale=1.0).run(LinearFit())
    with pytest.raises(ValueError, match="belong to one network"):
        Toy(steps=8).run(LinearGuidance(fit.solve()))[2].switch()


@pytest.mark.parametrize("settings", [{"share": 1.2}, {"period": 1}, {"window": 0}, {"ridge": -1.0}, {"limit": 0.0}, {"tail": "none"}])
def test_wrong_settings_get_a_sentence(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        LinearSettings(**settings)
