"""MaPO, which needs no reference, and KTO, which needs no pairs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from diffalign.training.objectives.kto import KTO, UnpairedBatch
from diffalign.training.objectives.mapo import MaPO, phi
from tests.training.preference_toy import (
    Scripted,
    frozen,
    nudge,
    pairs,
    real,
    real_pairs,
    seeded,
    swapped,
    toy,
    train,
    unreached,
    unused,
)

PREDICTIONS = ("epsilon", "v_prediction", "flow")


class Forbidden:
    """A reference that must not be called."""

    def __call__(self, *arguments, **named):
        raise AssertionError("the reference was called")


# ---- MaPO ------------------------------------------------------------------------------------------------------------------------


def test_phi_worked_by_hand():
    """c e = ln 2: ln 2 / (2 - 1); 1 at no error, nothing at a large one; the slope at no error is -c / 2."""
    e = torch.tensor([0.0, 2 * math.log(2), 1e-3, 1e-5, 400.0, 1e6], requires_grad=True)
    values = phi(e, 0.5)
    torch.testing.assert_close(values.detach()[[0, 1, 4, 5]], torch.tensor([1.0, math.log(2), 0.0, 0.0]))
    assert values[2].item() == pytest.approx(0.99975, abs=1e-6)
    values.sum().backward()
    torch.testing.assert_close(e.grad[[0, 3, 5]], torch.tensor([-0.25, -0.25, 0.0]), rtol=1e-3, atol=0)
    assert torch.isfinite(e.grad).all()


def test_mapo_worked_by_hand():
    """A network that takes the noise for 1 and for 3: the loss from its two errors by the formula."""
    policy, batch = Scripted(1.0, 3.0), pairs(1)
    loss, figures = MaPO(beta=0.1, scale=10).loss(policy, Forbidden(), batch, seeded())
    generator = seeded()
    policy.backbone.draw_timesteps(1, generator)
    eps = torch.randn(1, 1, 4, 4, generator=generator)
    winner, loser = (((answer - eps) ** 2).mean().item() for answer in (1.0, 3.0))
    share = [e / 2 / (math.exp(e / 2) - 1) for e in (winner, loser)]
    margin = 10 * (share[0] - share[1])
    assert loss.item() == pytest.approx(winner + 0.1 * math.log(1 + math.exp(-margin)), rel=1e-5)
    assert figures["margin"] == pytest.approx(margin, rel=1e-4)
    assert (figures["winner_error"], figures["loser_error"]) == (pytest.approx(winner, rel=1e-5), pytest.approx(loser, rel=1e-5))


def test_equal_errors_cost_log_2_and_swapping_flips_the_margin():
    policy = toy(gain=1.1)
    batch = pairs()
    margins = [MaPO().loss(policy, Forbidden(), each, seeded())[1]["margin"] for each in (batch, swapped(batch))]
    assert margins[0] == pytest.approx(-margins[1], rel=1e-4)
    alike = pairs(1, winner=2.0, loser=2.0)
    alike = type(alike)(alike.winners, alike.winners, alike.conditioning)
    loss, figures = MaPO().loss(policy, Forbidden(), alike, seeded())
    assert loss.item() == pytest.approx(figures["winner_error"] + 0.1 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mapo_learns_what_is_preferred(prediction):
    policy = toy(prediction)
    losses = train(MaPO(scale=10), policy, (pairs(8, seed=100 + step) for step in range(30)))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert policy.backbone.gain > 1.1
    assert MaPO().loss(policy, Forbidden(), pairs(200, seed=1), seeded(99))[1]["implicit_accuracy"] > 0.9


# ---- KTO -------------------------------------------------------------------------------------------------------------------------


def test_kto_worked_by_hand():
    """Gains .4 and 0, so z = .2: a good image .2 above it and a bad one .2 below cost the same, w (1 - sigmoid(.2 beta))."""
    gains, good = torch.tensor([0.4, 0.0]), torch.tensor([True, False])
    cost = 1 - 1 / (1 + math.exp(-2))
    torch.testing.assert_close(KTO(beta=10).losses(gains, good), torch.tensor([cost, cost]))
    torch.testing.assert_close(KTO(beta=10).losses(gains, ~good), torch.tensor([1 - cost, 1 - cost]))
    weighted = KTO(beta=10, good_weight=3, bad_weight=2).losses(gains, good)
    torch.testing.assert_close(weighted, torch.tensor([3 * cost, 2 * cost]))
    timid = KTO(beta=10, utility="log-sigmoid").losses(gains, good)
    torch.testing.assert_close(timid, torch.full((2,), 1 + math.log(1 + math.exp(-2))))


def test_a_loss_on_average_is_compared_with_nothing():
    """Gains -.4 and 0: their mean is below 0, so z = 0, and no gradient goes through z."""
    gains = torch.tensor([-0.4, 0.0], requires_grad=True)
    losses = KTO(beta=10).losses(gains, torch.tensor([True, True]))
    torch.testing.assert_close(losses.detach(), torch.tensor([1 - 1 / (1 + math.exp(4)), 0.5]))
    gains = torch.tensor([0.4, 0.0], requires_grad=True)
    KTO(beta=10).losses(gains, torch.tensor([True, True]))[1].backward()
    assert gains.grad[0] == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_policy_as_it_was_gives_exactly_a_half(prediction):
    policy, batch = toy(prediction), UnpairedBatch.of_pairs(pairs(captions=True))
    loss, figures = KTO().loss(policy, frozen(policy), batch, seeded())
    assert loss.item() == 0.5
    assert (figures["good_gain"], figures["bad_gain"]) == (0, 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("utility", ["sigmoid", "log-sigmoid"])
def test_kto_learns_what_is_liked(prediction, utility):
    policy = toy(prediction)
    before = frozen(policy)
    objective = KTO(beta=2, utility=utility)
    losses = train(objective, policy, (UnpairedBatch.of_pairs(pairs(8, seed=100 + step)) for step in range(30)))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert policy.backbone.gain > 1.1
    figures = objective.loss(policy, before, UnpairedBatch.of_pairs(pairs(200, seed=1)), seeded(99))[1]
    assert figures["implicit_accuracy"] > 0.9
    assert figures["good_gain"] > figures["bad_gain"]


def test_one_image_has_nothing_to_be_compared_with():
    batch = UnpairedBatch(torch.zeros(1, 1, 4, 4), torch.tensor([True]), pairs(1).conditioning)
    with pytest.raises(ValueError, match="at least 2"):
        KTO().loss(toy(), toy(), batch, seeded())


def test_pairs_become_single_images_with_their_captions():
    batch = UnpairedBatch.of_pairs(pairs(2, captions=True))
    assert len(batch) == 4
    assert batch.good.tolist() == [True, True, False, False]
    assert batch.conditioning.prompts == ("3.0", "3.0", "1.0", "1.0")


# ---- both ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_tensor_of_tiny_networks_learns(prediction):
    policy, reference = real(prediction)
    nudge(policy)
    data = real_pairs(policy, captions=True)
    idle = unused(policy, data)
    for objective, batch in ((MaPO(), data), (KTO(beta=10), UnpairedBatch.of_pairs(data))):
        objective.loss(policy, reference, batch, seeded())[0].backward()
        assert unreached(policy) == idle
        assert len(unreached(reference)) == len(list(getattr(reference.backbone, reference.backbone.denoiser).parameters()))
        getattr(policy.backbone, policy.backbone.denoiser).zero_grad()


def test_the_same_seed_gives_the_same_loss_to_the_bit():
    policy, reference = toy(gain=1.1), toy()
    for objective, batch in ((MaPO(), pairs()), (KTO(beta=2), UnpairedBatch.of_pairs(pairs()))):
        first, again, other = (objective.loss(policy, reference, batch, seeded(seed))[0].item() for seed in (4, 4, 5))
        assert first == again != other


def test_settings_are_plain_and_checked():
    for objective in (MaPO.paper(), KTO.paper(), KTO(utility="log-sigmoid")):
        assert json.loads(json.dumps(objective.settings()))["name"] == objective.name
    for name, value in {"beta": 0, "curvature": 0, "scale": -1, "space": "v"}.items():
        with pytest.raises(ValueError, match=name):
            MaPO(**{name: value})
    for name, value in {"beta": 0, "utility": "exp", "good_weight": -1, "bad_weight": -1, "space": "v"}.items():
        with pytest.raises(ValueError, match=name):
            KTO(**{name: value})


def test_a_batch_in_another_order_gives_the_same_losses():
    gains, good = torch.tensor([0.4, -0.3, 0.1]), torch.tensor([True, False, True])
    order = torch.tensor([2, 0, 1])
    objective = KTO(beta=3, bad_weight=2)
    torch.testing.assert_close(objective.losses(gains[order], good[order]), objective.losses(gains, good)[order])
