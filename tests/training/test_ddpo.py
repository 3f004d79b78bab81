"""DDPO, DPOK and Flow-GRPO: advantages and losses by hand, the first update, the bounds, and that rewards rise."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from diffalign.training.objectives.ddpo import DDPO, Graded, advantages, ratio_bounds, surrogate
from diffalign.training.rollouts import Rollouts
from tests.training.rollout_toys import (
    QUICK,
    REAL,
    assert_gradients,
    brightness,
    by_luck,
    frozen,
    gradients,
    mean_value,
    prompts,
    real,
    toy,
    train,
)  # fmt: skip

SMALL = Rollouts(images=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- by hand -----------------------------------------------------------------------------------------------------------------


def test_the_surrogate_by_hand():
    """Bounds 0.9 and 1.1. Beyond them a good image stops, a bad one stops below; the way back stays open; a weight of 0 is silent."""
    weights = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, 0.0])
    log_rho = torch.tensor([1.0, 1.2, 0.8, 1.2, 0.8, 5.0]).log().requires_grad_()
    loss = surrogate(weights, log_rho, (0.9, 1.1))
    torch.testing.assert_close(loss, torch.tensor([-2.0, -2.2, -1.6, 1.2, 0.9, 0.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), log_rho)
    torch.testing.assert_close(gradient, torch.tensor([-2.0, 0.0, -1.6, 1.2, 0.0, 0.0]))


def test_a_weight_of_zero_is_silent_even_where_the_ratio_overflows():
    log_rho = torch.tensor([1e4]).requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(torch.zeros(1), log_rho, (0.9, 1.1)).sum(), log_rho)
    assert gradient.tolist() == [0.0]


def test_bounds():
    assert ratio_bounds(10, 1.6, 1e-4) == (1 - 1e-4, 1 + 1e-4)
    low, high = ratio_bounds(16384, 1.64, None)
    assert (1 - low, high - 1) == (pytest.approx(1e-4, rel=2e-3), pytest.approx(1e-4, rel=2e-3))  # DDPO's, on an SD latent


def test_advantages_by_hand():
    """Groups (1, 3) and (0, 0, 6): others' means 3, 1 and 3, 3, 0; squares within 2 and 24, over 5 - 2 degrees of freedom."""
    rewards, groups = torch.tensor([1.0, 0.0, 3.0, 0.0, 6.0]), torch.tensor([7, 2, 7, 2, 2])
    within = math.sqrt(26 / 3)
    expected = torch.tensor([-2.0, -3.0, 2.0, -3.0, 6.0]) / within
    torch.testing.assert_close(advantages(rewards, groups, "leave-one-out"), expected, atol=1e-4, rtol=1e-4)
    spread = math.sqrt((1 + 4 + 1 + 4 + 16) / 5)  # about the mean 2
    expected = torch.tensor([-1.0, -2.0, 1.0, -2.0, 4.0]) / spread
    torch.testing.assert_close(advantages(rewards, groups, "batch"), expected, atol=1e-4, rtol=1e-4)
    expected = torch.tensor([-1 / math.sqrt(2), -2 / math.sqrt(12), 1 / math.sqrt(2), -2 / math.sqrt(12), 4 / math.sqrt(12)])
    torch.testing.assert_close(advantages(rewards, groups, "group"), expected, atol=1e-3, rtol=1e-3)
    for kind in ("leave-one-out", "group", "batch"):
        assert advantages(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long), kind).abs().max() < 1e-3
        assert advantages(torch.tensor([4.0, 1.0, 3.0]), torch.tensor([0, 1, 1]), kind)[0] == 0


def test_the_first_loss_is_minus_the_mean_advantage_and_its_gradient_the_policy_gradient():
    policy = toy()
    objective = DDPO(mean_value, rollouts=SMALL)
    graded = objective.collect(policy, prompts(policy, "1", "2"), generator())
    loss, figures = objective.loss(policy, frozen(policy), graded, generator())
    assert loss.item() == pytest.approx(-graded.advantages.mean().item(), abs=1e-6)
    assert (figures["log_ratio"], figures["log_ratio_size"], figures["clipped"]) == (0, 0, 0)
    assert figures["score/reward"] == pytest.approx(graded.scores.mean().item())
    (gradient,) = torch.autograd.grad(loss, policy.backbone.gain)
    expected = 0.0
    for i in graded.trajectories.steps:
        step = SMALL.step(policy, graded.trajectories, i)
        moved = graded.trajectories.states[i + 1]
        log_p = -(moved - step.mean).square().flatten(1).mean(1) / (2 * step.std**2)  # the papers' mean over entries
        expected = expected - (graded.advantages * log_p).mean() / len(graded.trajectories.steps)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, policy.backbone.gain)[0])


# ---- bounds, divergence, what does and does not move ---------------------------------------------------------------------------


def test_no_gradient_beyond_the_bounds():
    """A policy whose every decision became much less likely: images that were bad have nothing more to teach, good ones have."""
    objective = DDPO(mean_value, rollouts=SMALL, trust=0.5)
    policy = toy()
    graded = objective.collect(policy, prompts(policy, "2"), generator())
    moved = toy(gain=3.0)
    for sign in (-1.0, 1.0):
        held = replace(graded, advantages=torch.full((4,), sign))
        loss, figures = objective.loss(moved, frozen(policy), held, generator())
        (gradient,) = torch.autograd.grad(loss, moved.backbone.gain)
        assert figures["clipped"] == 1
        assert (gradient == 0) == (sign < 0)


def test_the_divergence_pulls_back_and_the_reference_gets_no_gradient():
    policy, reference = toy(gain=1.5), toy(gain=1.0)
    objective = DDPO(mean_value, rollouts=SMALL, kl=0.1)
    graded = objective.collect(policy, prompts(policy, "2"), generator())
    silent = replace(graded, advantages=torch.zeros(4))
    loss, figures = objective.loss(policy, reference, silent, generator())
    (gradient,) = torch.autograd.grad(loss, policy.backbone.gain)
    assert gradient > 0
    assert reference.backbone.gain.grad is None
    assert loss.item() == pytest.approx(0.1 * figures["kl"] / 16)
    same, figures = objective.loss(policy, frozen(policy), silent, generator())
    assert same.item() == figures["kl"] == 0


def test_better_images_pull_and_worse_ones_push():
    """Swapping the advantages' sign turns the gradient round, before the first update."""
    policy, objective = toy(), DDPO(mean_value, rollouts=SMALL)
    graded = objective.collect(policy, prompts(policy, "2"), generator())
    found = []
    for sign in (1.0, -1.0):
        loss, _ = objective.loss(policy, policy, replace(graded, advantages=sign * graded.advantages), generator())
        found.append(torch.autograd.grad(loss, policy.backbone.gain)[0])
    assert found[0] < 0  # descent raises gain
    torch.testing.assert_close(found[0], -found[1])


def test_broken_scores_teach_nothing():
    def score(images, texts):
        return torch.tensor([1.0, float("nan"), 3.0, float("inf")])

    policy, objective = toy(), DDPO(score, rollouts=SMALL)
    graded = objective.collect(policy, prompts(policy, "2"), generator())
    assert graded.advantages[[1, 3]].tolist() == [0, 0]
    assert graded.advantages[0] == -graded.advantages[2] != 0
    loss, figures = objective.loss(policy, policy, graded, generator())
    assert loss.isfinite()
    assert (figures["broken"], figures["score/reward"]) == (0.5, 2.0)
    none = DDPO(lambda images, texts: torch.full((4,), float("nan")), rollouts=SMALL).collect(policy, prompts(policy, "2"), generator())
    assert none.advantages.tolist() == [0, 0, 0, 0]


# ---- invariances -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_batch_is_the_mean_of_its_singles_in_any_order(kl):
    policy, objective = toy(gain=1.2), DDPO(mean_value, rollouts=SMALL, kl=kl, advantage="group")
    batch = prompts(policy, "1", "2")

    def loss(rows):
        part = type(batch)(batch.conditioning.rows(rows), tuple(batch.seeds[row] for row in rows))
        made = objective.collect(policy, part, generator())
        return objective.loss(toy(gain=1.25), toy(), made, generator())[0]

    torch.testing.assert_close(loss([0, 1]), (loss([0]) + loss([1])) / 2)
    torch.testing.assert_close(loss([0, 1]), loss([1, 0]))


def test_the_same_seed_and_step_give_the_same_loss_to_the_bit():
    found = []
    for _ in range(2):
        policy, objective = toy(), DDPO(mean_value, rollouts=Rollouts(images=4, trained=1), kl=0.1)
        graded = objective.collect(policy, prompts(policy, "1", "2"), generator(3))
        found.append(objective.loss(toy(gain=1.1), policy, graded, generator(3))[0])
    assert torch.equal(*found)


# ---- effect ------------------------------------------------------------------------------------------------------------------

LEARNERS = {
    "default": DDPO(mean_value, rollouts=Rollouts(images=8)),
    "paper": DDPO.paper(mean_value),
    "flow_grpo": replace(DDPO.flow_grpo(mean_value, images=8), kl=0.0),  # which on steps as narrow as the toy's forbids every change
    "two updates": DDPO(mean_value, rollouts=Rollouts(images=8, trained=2, window=(0, 2))),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_rewards_rise(name):
    objective = LEARNERS[name]
    per_batch = 2 if name == "two updates" else 1
    assert train(objective, toy(), per_batch=per_batch) > 0.3


def test_luck_teaches_nothing():
    assert abs(by_luck(LEARNERS["default"], "score")) < 0.1


def test_the_divergence_holds_the_policy():
    free = train(DDPO(mean_value, rollouts=Rollouts(images=8)), toy())
    held = train(DDPO(mean_value, rollouts=Rollouts(images=8), kl=5.0), toy())
    assert abs(held) < free / 2


@pytest.mark.parametrize("name", REAL)
def test_tiny_pipelines(name):
    policy, batch = real(name)
    objective = DDPO(brightness, rollouts=QUICK, kl=0.1)
    loss, figures, found = gradients(objective, policy, batch)
    assert loss.isfinite()
    assert figures["log_ratio_size"] == figures["kl"] == 0
    assert_gradients(found)


# ---- settings ----------------------------------------------------------------------------------------------------------------


def test_settings_are_plain_and_mistakes_are_named():
    plain = DDPO(mean_value, rollouts=Rollouts(window=(1, 3))).settings()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rollouts"]["window"] == [1, 3]
    assert "score" not in plain
    assert isinstance(DDPO.dpok(mean_value).collect(toy(), prompts(toy(), "1"), generator()), Graded)
    for changes, message in (
        ({"rollouts": Rollouts(images=1)}, r"rollouts.images must be at least 2, got 1"),
        ({"advantage": "none"}, "advantage must be one of leave-one-out, group, batch, got 'none'"),
        ({"trust": 0.0}, "trust must be above 0"),
        ({"clip": 1.0}, "clip must lie between 0 and 1"),
        ({"kl": -1.0}, "kl must be at least 0"),
        ({"advantage_clip": 0.0}, "advantage_clip must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DDPO(mean_value, **changes)
