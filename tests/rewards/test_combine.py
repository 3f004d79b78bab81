"""The rules on scores: hand-worked numbers, gradients against autograd of the plain formula, limits, samples apart."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from diffalign import rewards
from diffalign.rewards import combine, gradients, names
from diffalign.rewards.combine import (
    Constrained,
    Geometric,
    Rule,
    SoftMin,
    UncertaintyWeighted,
    WeightedSum,
    WorstCase,
    check_rule,
    constrained,
    find_rule,
    geometric,
    oriented,
    soft_clip,
    soft_min,
    uncertainty_weighted,
    weighted_sum,
    worst_case,
)

RULES = [WeightedSum(), WorstCase(), SoftMin(0.4), UncertaintyWeighted(0.7), Geometric(), Constrained((("b", 0.2),))]
NAMES = ["a", "b", "c"]


def one(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_worked_by_hand():
    """Scores 1, 2, 6 of equal weight: mean 3, minimum 1, population variance (4 + 1 + 9) / 3 = 14/3."""
    scores, weights = one(1, 2, 6), one(1, 1, 1)
    assert weighted_sum(scores, weights).item() == 9
    assert worst_case(scores, weights).item() == 1
    assert uncertainty_weighted(scores, weights, 0.5).item() == pytest.approx(3 - 7 / 3)
    assert soft_min(scores, weights, 2.0).item() == pytest.approx(-2 * math.log((math.exp(-0.5) + math.exp(-1) + math.exp(-3)) / 3))
    logs = sum(math.log(1 / (1 + math.exp(-z))) for z in (1, 2, 6)) / 3
    assert geometric(scores, weights).item() == pytest.approx(logs)
    assert constrained(scores, weights, torch.tensor([-math.inf, 3.5, 2.0])).item() == 1 + (2 - 3.5)  # c is above its floor: no fine


def test_weights_by_hand():
    """Weights 3 and -1: the second score is to be lowered, z = (2, -4), p = (3/4, 1/4), mean 1/2, variance 3/4 2.25 + 1/4 20.25 = 6.75."""
    scores, weights = one(2, 4), one(3, -1)
    z, p = oriented(scores, weights)
    assert z.tolist() == [[2, -4]]
    assert p.tolist() == [[0.75, 0.25]]
    assert weighted_sum(scores, weights).item() == 2
    assert worst_case(scores, weights).item() == -4
    assert uncertainty_weighted(scores, weights, 1.0).item() == pytest.approx(0.5 - 6.75)
    assert constrained(scores, weights, torch.tensor([-math.inf, -3.0])).item() == 6 - 1  # a floor under -score is a ceiling


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_member_of_weight_zero_takes_no_part(rule):
    scores, weights = torch.tensor([[0.3, -1.2, -9.0], [2.0, 0.1, 50.0]]), torch.tensor([[2.0, 2.0, 0.0]] * 2)
    torch.testing.assert_close(rule(scores, weights, NAMES), rule(scores[:, :2], weights[:, :2], NAMES[:2]))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_batch_equals_its_samples(rule):
    scores, weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.ones(5, 3)
    together = rule(scores, weights, NAMES)
    assert together.shape == (5,)
    for i in range(5):
        assert rule(scores[i : i + 1], weights[:1], NAMES).item() == together[i].item()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_gradients_match_finite_differences(rule):
    scores = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.float64).expand(4, 3)
    assert torch.autograd.gradcheck(lambda s: rule(s, weights, NAMES), scores)


def test_the_gradient_of_uncertainty_is_the_published_one_and_pushes_the_optimist_down():
    """p_k (1 - 2 lambda (z_k - mu)): of 0, 0, 6 with lambda 1/2 the third exceeds the mean 2 by 4 > 1 / (2 lambda) = 1."""
    scores, weights = one(0, 0, 6).requires_grad_(True), one(1, 1, 1)
    (gradient,) = torch.autograd.grad(uncertainty_weighted(scores, weights, 0.5).sum(), scores)
    expected = (1 - 2 * 0.5 * (scores.detach() - 2)) / 3
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(gradient, one(1, 1, -1))


def test_the_gradient_of_the_worst_case_goes_to_the_least_member():
    scores, weights = one(3, -1, 2).requires_grad_(True), one(1, 1, 1)
    (gradient,) = torch.autograd.grad(worst_case(scores, weights).sum(), scores)
    assert gradient.tolist() == [[0, 1, 0]]
    tied = one(3, -1, -1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(worst_case(tied, weights).sum(), tied)
    assert gradient.tolist() == [[0, 0.5, 0.5]]


def test_the_soft_minimum_has_its_limits():
    scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).expand(64, 4)
    torch.testing.assert_close(soft_min(scores, weights, 1e-3), worst_case(scores, weights), atol=3e-3, rtol=0)  # beta ln(1 / p)
    torch.testing.assert_close(soft_min(scores, weights, 1e4), weighted_sum(scores, weights), atol=1e-3, rtol=0)
    values = torch.stack([soft_min(scores, weights, beta) for beta in (0.01, 0.1, 1.0, 10.0)])
    assert (values.diff(dim=0) > 0).all()


def test_the_soft_minimum_is_uncertainty_weighting_to_second_order():
    scores = 0.001 * torch.randn(32, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = torch.ones(32, 3, dtype=torch.float64)
    beta = 0.5
    torch.testing.assert_close(soft_min(scores, weights, beta), uncertainty_weighted(scores, weights, 1 / (2 * beta)), atol=1e-8, rtol=0)
    mean = weighted_sum(scores, weights) / 3
    assert (soft_min(scores, weights, beta) - mean).abs().max() > 5e-7  # so the second order is what the line above has tested


def test_soft_clip():
    x = torch.tensor([-50.0, -3.0, -1.0, 0.0, 2.9, 3.0, 3.5, 50.0], requires_grad=True)
    y = soft_clip(x, 3.0)
    expected = [-4.0, -3.0, -1.0, 0.0, 2.9, 3.0, 3 + math.tanh(0.5), 4.0]
    torch.testing.assert_close(y, torch.tensor(expected))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope[1:6].tolist() == [1] * 5
    assert slope[6].item() == pytest.approx(1 - math.tanh(0.5) ** 2)


# ---- names and settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_settings_make_the_rule_again(rule):
    import json

    assert find_rule(json.loads(json.dumps(names.settings(rule)))) == rule
    assert find_rule(rule) is rule


def test_names_and_parameters():
    assert find_rule("weighted") == WeightedSum()
    assert find_rule("worst-case") == WorstCase()
    assert find_rule("soft-min=0.1") == SoftMin(0.1)
    assert find_rule("uncertainty") == UncertaintyWeighted(0.5)
    assert find_rule("constrained=b:0.2, shapes-clip:-1e-1") == Constrained((("b", 0.2), ("shapes-clip", -0.1)))


def test_what_a_help_text_says():
    expected = "weighted, worst-case, soft-min=0.3, uncertainty=0.5, geometric, constrained=REWARD:FLOOR,..."
    assert names.forms(names.RULES) == expected
    assert names.forms(names.GRADIENT_RULES) == "equal, pcgrad, mgda"


@pytest.mark.parametrize("name", names.RULES)
def test_the_table_is_what_the_classes_and_the_package_read(name):
    row = names.RULES[name]
    rule = find_rule(f"{name}=b:0" if row.floors else name)
    assert (rule.name, rule.calibrated) == (name, row.calibrated)
    assert row.target == f"{type(rule).__module__.rpartition('.')[2]}:{type(rule).__name__}"
    assert getattr(rewards, type(rule).__name__) is type(rule)
    assert isinstance(rule, Rule)
    if row.default is not None:
        assert getattr(rule, row.parameter) == row.default


def test_every_rule_has_a_row():
    """A class that acts as a rule and is in no table could not be reached by name."""
    for module, table in ((combine, names.RULES), (gradients, names.GRADIENT_RULES)):
        found = {
            f"{module.__name__.rpartition('.')[2]}:{cls.__name__}"
            for cls in vars(module).values()
            if isinstance(cls, type) and cls.__module__ == module.__name__ and dataclasses.is_dataclass(cls)
        }
        assert found == {row.target for row in table.values()}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("worst", ValueError, "unknown rule 'worst'; did you mean 'worst-case'"),
        ("zzz", ValueError, "unknown rule 'zzz'; known: weighted, worst-case"),
        ("worst-case=2", ValueError, "rule worst-case takes no parameter"),
        ("soft-min=0", ValueError, "beta of rule soft-min must be a finite number above 0"),
        ("constrained", ValueError, "rule constrained needs floors, as in constrained=shapes-aesthetic:0"),
        ("constrained=", ValueError, "needs floors"),
        ("constrained=a", ValueError, "floor of rule constrained must be NAME:NUMBER, .*; got 'a'"),
        ("constrained=a:0,b:high", ValueError, "got 'b:high'"),
        ("constrained=a:0,:1", ValueError, "got ':1'"),
        ("constrained=a:nan", ValueError, "got 'a:nan'"),
        ("constrained=a:0,a:1", ValueError, "two floors for 'a'"),
        ("weighted=a:0", ValueError, "takes no parameter"),
        ("soft-min=x", ValueError, "as in soft-min=0.3; got 'x'"),
        ({"name": "soft-min", "gamma": 1}, ValueError, "is no rule that we know"),
        ({"name": "constrained"}, TypeError, "floors"),
        ({"name": "sum"}, ValueError, "is no rule that we know"),
        (SoftMin, TypeError, "rule must be a name"),
        (3, TypeError, "rule must be a name"),
    ],
)
def test_bad_rules_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        find_rule(given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftMin(0.0), "beta must be a finite number above 0, got 0.0"),
        (lambda: UncertaintyWeighted(math.inf), "lam must be a finite number above 0, got inf"),
        (lambda: Constrained(()), "floors must give at least one member"),
        (lambda: Constrained({"b": math.nan}), "finite floor"),
        (lambda: check_rule(WorstCase(), {"a": 1.0, "b": 2.0}), "reads only the signs of weights"),
        (lambda: check_rule(Constrained({"z": 1}), {"a": 1.0, "b": 2.0}), "floors names 'z', which is no member; members are a, b"),
        (lambda: check_rule(Constrained({"a": 1}), {"a": 1.0}), "every member has a floor"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    check_rule(WorstCase(), {"a": 1.0, "b": -1.0})
