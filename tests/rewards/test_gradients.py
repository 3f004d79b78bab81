"""The rules on gradients: hand-worked cases in the plane, MGDA against a search of the simplex, equal sizes, samples apart."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.rewards.gradients import (
    MGDA,
    EqualRMS,
    PCGrad,
    check_gradient_rule,
    equalise,
    find_gradient_rule,
    mgda,
    mgda_weights,
    pcgrad,
    rms,
    weighted,
    with_gradient,
)


def plane(*gradients: tuple[float, float]) -> torch.Tensor:
    """One sample's gradients "1 k 2"."""
    return torch.tensor([gradients], dtype=torch.float32)


def ones(gradients: torch.Tensor) -> torch.Tensor:
    return torch.ones(gradients.shape[:2])


def random(b: int, k: int, d: int, seed: int = 0) -> torch.Tensor:
    scales = torch.tensor([10.0**i for i in range(k)])
    return torch.randn(b, k, d, generator=torch.Generator().manual_seed(seed)) * scales.view(1, k, 1)


def test_equalised_gradients_have_one_size_in_each_sample():
    gradients = random(4, 3, 50)
    weights = torch.tensor([1.0, 2.0, -1.0]).expand(4, 3)
    sizes = rms(equalise(gradients, weights))
    torch.testing.assert_close(sizes, ((weights.abs() / 4) * rms(gradients)).sum(1, keepdim=True).expand(4, 3))
    assert sizes[:, 0].std() > 0  # but not one size for all samples


def test_equalising_by_hand():
    """(3, 0) and (0, 1): RMS 3/sqrt2 and 1/sqrt2, mean 2/sqrt2: both get length 2."""
    torch.testing.assert_close(equalise(plane((3, 0), (0, 1)), torch.ones(1, 2)), plane((2, 0), (0, 2)))
    torch.testing.assert_close(EqualRMS()(plane((3, 0), (0, 1)), torch.tensor([[1.0, -1.0]])), torch.tensor([[2.0, -2.0]]))


@pytest.mark.parametrize("rule", [EqualRMS(), PCGrad(), PCGrad(equal=False), MGDA(), MGDA(equal=False)])
def test_one_member_alone_is_changed_in_nothing(rule):
    gradients = random(3, 1, 20)
    torch.testing.assert_close(rule(gradients, torch.ones(3, 1)), gradients[:, 0])


def test_a_gradient_of_zero_stays_zero():
    out = equalise(plane((0, 0), (0, 1)), torch.ones(1, 2))
    torch.testing.assert_close(out, plane((0, 0), (0, 0.5)))
    for rule in (EqualRMS(), PCGrad(), MGDA()):
        assert rule(plane((0, 0), (0, 0)), torch.ones(1, 2)).tolist() == [[0, 0]]


def test_pcgrad_by_hand():
    """g1 = (1, 0), g2 = (-1, 1): <g1, g2> = -1. h1 = g1 + g2 / 2 = (1/2, 1/2), h2 = g2 + g1 = (0, 1); the sum is (1/2, 3/2)."""
    torch.testing.assert_close(pcgrad(plane((1, 0), (-1, 1)), torch.ones(1, 2)), torch.tensor([[0.5, 1.5]]))
    agreeing = plane((1, 0), (1, 1))
    torch.testing.assert_close(pcgrad(agreeing, torch.ones(1, 2)), torch.tensor([[2.0, 1.0]]))
    opposite = plane((1, 0), (-1, 0))
    torch.testing.assert_close(pcgrad(opposite, torch.ones(1, 2)), torch.zeros(1, 2))


def test_pcgrad_takes_the_others_as_they_were():
    """Three members, h1 against g2 then g3; neither projection sees what the others have become."""
    g = random(1, 3, 5, seed=3).double()
    out = torch.zeros(5, dtype=torch.float64)
    for i in range(3):
        h = g[0, i].clone()
        for j in ((i + 1) % 3, (i + 2) % 3):
            dot = h @ g[0, j]
            if dot < 0:
                h = h - dot / (g[0, j] @ g[0, j]) * g[0, j]
        out += h
    torch.testing.assert_close(pcgrad(g, torch.ones(1, 3, dtype=torch.float64))[0], out)


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        (((2, 0), (0, 2)), (1, 1)),  # half of each
        (((1, 0), (3, 0)), (1, 0)),  # the shorter alone: a corner
        (((1, 0), (-3, 0)), (0, 0)),  # opposed: nothing raises both
        (((1, 1), (1, -1), (5, 0)), (1, 0)),  # the third is off the face
        (((1, 1), (-1, 1), (0, 5)), (0, 1)),
        (((2, 1), (2, 1)), (2, 1)),  # the same twice: a degenerate face
        (((1, 0), (-1, 1), (-1, -1)), (0, 0)),  # the hull holds the origin
    ],
)
def test_mgda_by_hand(gradients, expected):
    g = plane(*gradients)
    torch.testing.assert_close(mgda(g, ones(g)), torch.tensor([expected], dtype=torch.float32), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("k", "d"), [(2, 7), (3, 2), (3, 9), (4, 3)])
def test_mgda_against_a_search_of_the_simplex(k, d):
    g = torch.randn(6, k, d, generator=torch.Generator().manual_seed(k * d), dtype=torch.float64) + 0.3
    steps = 24
    grid = [c for c in torch.cartesian_prod(*[torch.arange(steps + 1)] * k) if c.sum() == steps]
    grid = torch.stack(grid).double() / steps
    hull = torch.einsum("nk,bkd->bnd", grid, g).square().sum(2)
    found = mgda(g, ones(g)).square().sum(1)
    least = hull.min(1).values
    assert (found <= least + 1e-5).all()
    assert (found >= least * 0.9 - 1e-2).all()  # the grid is coarse, and the minimum lies between its points
    a = mgda_weights(torch.einsum("bid,bjd->bij", g, g), ones(g))
    assert (a >= 0).all()
    torch.testing.assert_close(a.sum(1), torch.ones(6))


def test_mgda_lowers_no_member():
    g = random(32, 4, 12, seed=5)
    direction = MGDA(equal=False)(g, ones(g))
    along = torch.einsum("bkd,bd->bk", g, direction)
    assert (along >= direction.square().sum(1, keepdim=True) * (1 - 1e-3) - 1e-4).all()  # the optimality condition


def test_mgda_leaves_out_a_member_of_weight_zero_and_turns_a_negative_one_round():
    g = plane((1, 0), (-3, 0), (0, 1))
    torch.testing.assert_close(mgda(g, torch.tensor([[1.0, 0.0, 1.0]])), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(mgda(g[:, :2], torch.tensor([[1.0, -1.0]])), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("rule", [EqualRMS(), PCGrad(), PCGrad(equal=False), MGDA(), MGDA(equal=False)])
def test_a_batch_equals_its_samples(rule):
    g, weights = random(5, 3, 17, seed=1), torch.tensor([[1.0, 1.0, -1.0]]).expand(5, 3)
    together = rule(g, weights)
    for i in range(5):
        torch.testing.assert_close(rule(g[i : i + 1], weights[:1])[0], together[i])


def test_with_gradient_keeps_the_values_and_gives_the_gradient():
    x = torch.rand(3, 3, 4, 4, requires_grad=True)
    direction = torch.randn(3, 3, 4, 4)
    values = torch.tensor([1 / 3, -7e5, math.pi], requires_grad=True)
    out = with_gradient(values, x, direction)
    assert torch.equal(out.detach(), values.detach())
    (gradient,) = torch.autograd.grad((out * torch.tensor([1.0, 2.0, 0.0])).sum(), x)
    assert torch.equal(gradient, direction * torch.tensor([1.0, 2.0, 0.0]).view(3, 1, 1, 1))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_not_finite_stops_its_own_sample_alone_and_says_so(broken, caplog):
    x = torch.rand(3, 3, 4, 4, requires_grad=True)
    direction = torch.randn(3, 3, 4, 4)
    direction[1, 2, 0, 3] = broken
    values = torch.tensor([1 / 3, -7e5, math.pi])
    out = with_gradient(values, x, direction)
    assert torch.equal(out.detach(), values)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient[[0, 2]], direction[[0, 2]])
    assert gradient[1].abs().max() == 0
    assert "sample 1 of 3" in caplog.text
    caplog.clear()
    with_gradient(values, x, torch.randn(3, 3, 4, 4))
    assert not caplog.text


def test_a_broken_direction_spoils_no_shared_weight():
    weight = torch.ones(3, requires_grad=True)
    images = torch.rand(2, 3, 4, 4) * weight.view(3, 1, 1)
    direction = torch.stack([torch.full((3, 4, 4), math.nan), torch.ones(3, 4, 4)])
    with_gradient(torch.zeros(2), images, direction).sum().backward()
    torch.testing.assert_close(weight.grad, images.detach()[1].sum((1, 2)))


def test_an_image_that_is_not_finite_changes_no_value():
    x = torch.full((1, 3, 2, 2), math.inf, requires_grad=True)
    assert with_gradient(torch.tensor([0.1]), x, torch.ones(1, 3, 2, 2)).tolist() == torch.tensor([0.1]).tolist()


def test_names():
    assert find_gradient_rule(None) is None
    assert find_gradient_rule("equal") == EqualRMS()
    assert find_gradient_rule({"name": "pcgrad", "equal": False}) == PCGrad(equal=False)
    with pytest.raises(ValueError, match="unknown gradient rule 'pcgrd'; did you mean 'pcgrad'"):
        find_gradient_rule("pcgrd")
    with pytest.raises(TypeError, match="gradient must be a name"):
        find_gradient_rule(1.0)


def test_what_mgda_cannot_do_is_refused():
    with pytest.raises(ValueError, match="the rule mgda reads only the signs"):
        check_gradient_rule(MGDA(), {"a": 1.0, "b": 0.5})
    many = {str(i): 1.0 for i in range(11)}
    with pytest.raises(ValueError, match="MGDA takes at most 10 members, got 11"):
        check_gradient_rule(MGDA(), many)
    with pytest.raises(ValueError, match="MGDA takes at most 10 members, got 11"):
        mgda_weights(torch.eye(11)[None], torch.ones(1, 11))

    assert weighted(plane((1, 2)), torch.tensor([[2.0]])).tolist() == [[2, 4]]
