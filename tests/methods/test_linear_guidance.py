"""LinearAG on exact predictions: the regression by hand, collinearity, held-out samples, storage, and refusal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from diffalign.methods.guidance_rivals import DeltaReuse, FixedFraction
from diffalign.methods.linear_guidance import DESCRIPTION, LinearCoefficients, LinearGuidance, LinearSettings, features
from diffalign.methods.linear_guidance_fit import LinearFit, Products, Sums, influence
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


def sums_of(columns, d):
    """columns "m n", d "n", in float32."""
    columns, d = columns.double(), d.double()
    return Sums(columns @ columns.T, columns @ d, float(d @ d), d.numel())


def test_sums_solve_least_squares():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(3, 200, generator=generator)
    d = torch.tensor([2.0, -1.0, 0.5]) @ columns + 0.1 * torch.randn(200, generator=generator)
    sums = sums_of(columns, d)
    found = sums.solve(ridge=0.0)
    expected = torch.linalg.lstsq(columns.T.double(), d[:, None].double()).solution[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    missed = (d.double() - expected @ columns.double()).square().mean().sqrt()
    assert sums.residual(found) == pytest.approx(float(missed), rel=1e-5)


def test_ridge_by_hand():
    """One column f = d = (3, 4): RMS scaling makes both unit, so b = 1 / (1 + lambda), and half of an RMS of 5 / sqrt(2) is missed."""
    sums = sums_of(torch.tensor([[3.0, 4.0]]), torch.tensor([3.0, 4.0]))
    assert float(sums.solve(ridge=0.0)) == pytest.approx(1.0)
    assert float(sums.solve(ridge=1.0)) == pytest.approx(0.5)
    assert sums.residual(torch.tensor([0.5], dtype=torch.float64)) == pytest.approx(2.5 / 2**0.5)


def test_collinear_columns_get_small_coefficients():
    """f2 = f1 + 1e-4 n and d = f1 + 1e-3 n: least squares answers -9 and 10, ridge shares the weight."""
    base, noise = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    columns, d = torch.stack([base, base + 1e-4 * noise]), base + 1e-3 * noise
    assert sums_of(columns, d).solve(ridge=0.0).tolist() == pytest.approx([-9.0, 10.0], abs=0.1)
    assert sums_of(columns, d).solve(ridge=1e-5).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert sums_of(torch.stack([base, torch.zeros_like(base)]), d).solve(ridge=1e-5)[1] == 0.0


def test_products_hold_every_regression():
    """The sums for any step and any past are those of the features themselves."""
    generator = torch.Generator().manual_seed(0)
    c, d = torch.randn(2, 6, 3, 40, generator=generator)  # 6 steps, 3 samples
    c[5], d[4] = c[4] + 1e-3 * c[5], 1e-4 * d[4]
    products = Products.zeros(6)
    for sample in range(3):
        products.add(torch.cat([c[:, sample], d[:, sample]]))
    for step, past in ((5, (4, 1)), (4, (3,)), (3, (2, 1, 0))):
        columns = features(c[step], [(c[each], d[each]) for each in past]).flatten(1)
        expected, found = sums_of(columns, d[step].flatten()), products.sums(step, past)
        torch.testing.assert_close(found.gram, expected.gram, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found.right, expected.right, rtol=1e-5, atol=1e-9)
        assert (found.target, found.entries) == (pytest.approx(expected.target), 120)
        assert products.rms(step) == pytest.approx(float(d[step].square().mean().sqrt()))


# --- the plan -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "evaluations"), [(20, 25), (50, 63), (8, 10)])
def test_the_plan_of_the_paper(steps, evaluations):
    fit = LinearFit(LinearSettings(limit=10.0))
    toy = Toy(steps=steps)
    toy.run(fit)
    for tail, end in (("conditional", steps // 2), ("estimate", steps)):
        coefficients = fit.solve(LinearSettings(limit=10.0, tail=tail))
        evaluated = [step for step, branch in enumerate(coefficients.branches) if branch == "both"]
        assert evaluated == list(range(0, steps // 2, 2))
        assert set(coefficients.residuals) == set(range(end)) - set(evaluated)
        assert toy.run(LinearGuidance(coefficients))[1] == [evaluations] * 8


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


def test_a_step_that_is_evaluated_after_all_serves_the_later_ones():
    """Steps 1 and 3 cannot be predicted within 1e-6 of |d|; step 4 is then predicted from 3 and 2, not from 2 and 0."""
    toy = Toy(steps=8)
    coefficients = fitted(toy, LinearSettings(limit=1e-6, tail="estimate"))
    assert [step for step, branch in enumerate(coefficients.branches) if branch == "both"] == [0, 1, 2, 3]
    policy = toy.run(LinearGuidance(coefficients))[2]
    assert len(policy.past) == 2
    policy.past = []
    c, d = torch.randn(2, 5, 8, 16, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        policy.complete(step, c[step], c[step], c[step] - d[step])
    columns = features(c[4], [(c[3], d[3]), (c[2], d[2])])
    expected = c[4] - torch.tensordot(coefficients.by_step[4].float(), columns, dims=1)
    torch.testing.assert_close(policy.complete(4, c[4], c[4], c[4][:0])[1], expected)


# --- the plan that the fit chooses --------------------------------------------------------------------------------------------------


def test_the_chosen_plan_is_the_best_of_all():
    """Against every plan of 3 evaluated steps of 7, by hand."""
    toy, fit = Toy(steps=7), LinearFit(LinearSettings())
    toy.run(fit, samples=40)
    settings = LinearSettings(budget=10 / 14)

    def error(plan):
        total = 0.0
        for step in set(range(7)) - set(plan):
            past = tuple(sorted((each for each in plan if each < step), reverse=True)[:2])
            total += fit.weights[step] * fit.all.rms(step) * min(1.0, fit._fit(step, past, settings.ridge)[1])
        return total

    best = min(((0, i, j) for i in range(1, 7) for j in range(i + 1, 7)), key=error)
    coefficients = fit.solve(settings)
    assert tuple(step for step, branch in enumerate(coefficients.branches) if branch == "both") == best
    assert set(coefficients.residuals) == set(range(7)) - set(best)
    with pytest.raises(ValueError, match=r"budget must be at least 0.571429, for one guided step of 7, got 0.55"):
        fit.solve(LinearSettings(budget=0.55))


def test_the_chosen_plan_keeps_its_budget_and_is_near():
    toy, fit = Toy(), LinearFit(LinearSettings())
    for seed in (100, 101):
        toy.run(fit, samples=50, seed=seed)
    full, cost, _ = toy.run(None, samples=64)
    errors = []
    for budget in (0.55, 0.65, 0.8):
        linear, evaluations, _ = toy.run(LinearGuidance(fit.solve(LinearSettings(budget=budget))), samples=64)
        assert sum(evaluations) / sum(cost) == budget
        errors.append(relative_error(linear, full))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.01
    fixed = toy.run(FixedFraction(fraction=0.3), samples=64)[0]
    assert errors[1] < 0.2 * relative_error(fixed, full)


def test_influence_is_what_an_error_moves():
    """One step's output off by a little, the others as they were: how far x ends, as a share of what all steps move it by."""
    for prediction in ("epsilon", "v_prediction", "sample"):
        toy = Toy(steps=6, prediction=prediction)
        run = LinearFit().begin(toy_run(toy)).run
        outputs = torch.randn(6, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def end(changed=None, toy=toy, outputs=outputs):
            x = torch.zeros(1, 16, dtype=torch.float64)
            for step in range(6):  # in epsilon, as the other outputs say x0 and epsilon only together with x
                a, s = toy.signal[step], toy.noise[step]
                output = outputs[step] + (1e-3 if step == changed else 0.0)
                eps = {"epsilon": output, "v_prediction": a * output, "sample": -a / s * output}[toy.prediction]
                x0 = (x - s * eps) / a
                later = (toy.signal[step + 1], toy.noise[step + 1]) if step < 5 else (1.0, 0.0)
                x = later[0] * x0 + later[1] * eps
            return x

        moved = torch.stack([(end(step) - end()).norm() for step in range(6)])
        found = torch.tensor(influence(run), dtype=torch.float64)
        torch.testing.assert_close(found / found.sum(), moved / moved.sum(), rtol=1e-6, atol=1e-9)
    assert influence(replace(run, prediction="unknown")) == [1.0] * 6
    assert influence(replace(run, noise=())) == [1.0] * 6
    flow = replace(run, prediction="flow", noise=(1.0, 0.8, 0.5, 0.4, 0.2, 0.1))
    assert influence(flow) == pytest.approx([0.2, 0.3, 0.1, 0.2, 0.1, 0.1])


def toy_run(toy):
    recording = FixedFraction()
    return toy.run(recording, samples=1)[2].run


# --- what cannot be predicted -------------------------------------------------------------------------------------------------------


def test_a_tail_step_that_prediction_would_harm_is_not_guided(caplog):
    """And costs what was planned. At the last steps of this toy guidance is nothing but rounding, which nothing predicts."""
    toy, fit = Toy(steps=8), LinearFit(LinearSettings(tail="estimate", limit=10.0))
    toy.run(fit, samples=40)
    fit.held_out.matrix[8 + 5, :] = fit.held_out.matrix[:, 8 + 5] = 0.0  # those held out have guidance at step 5 unlike the others'
    fit.held_out.matrix[8 + 5, 8 + 5] = 2.0 * fit.held_out.entries * fit.all.rms(5) ** 2
    coefficients = fit.solve()
    assert coefficients.residuals[5] > 1
    assert "misses step 5" in caplog.text
    assert "not be guided" in caplog.text
    assert 5 not in coefficients.by_step
    assert {1, 3, 4} <= set(coefficients.by_step)
    _, evaluations, policy = toy.run(LinearGuidance(coefficients))
    assert evaluations == [10] * 8
    c = torch.randn(8, 16)
    assert policy.complete(5, c, c, c[:0])[1] is c


def test_residuals_are_in_units_of_all_samples():
    """Of 20 samples those held out have a thousandth of the others' guidance at step 5 of 8, so missing all of it is missing little."""
    toy, fit = Toy(steps=8), LinearFit(LinearSettings(tail="estimate", limit=10.0))
    toy.run(fit, samples=20)
    assert fit.held_out.rms(5) < 1e-3 * fit.fitted.rms(5)
    coefficients, missed = fit._fit(5, (2, 0), 1e-5)
    assert missed == pytest.approx(fit.held_out.sums(5, (2, 0)).residual(coefficients) / fit.all.rms(5))
    assert missed < 1


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
        Toy(steps=8).run(LinearGuidance(fit.solve()))[2].network_changed()


@pytest.mark.parametrize(
    "settings", [{"share": 1.2}, {"period": 1}, {"window": 0}, {"ridge": -1.0}, {"limit": 0.0}, {"tail": "none"}, {"budget": 0.5}]
)
def test_wrong_settings_get_a_sentence(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        LinearSettings(**settings)
