"""Parrot: who is selected and how much each counts, by hand; silence of the dominated; that several rewards rise together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from diffalign.training.objectives.parrot import Parrot, spread_within
from diffalign.training.rollouts import Rollouts, log_ratio
from tests.training.rollout_toys import (
    QUICK,
    REAL,
    assert_gradients,
    brightness,
    by_luck,
    frozen,
    gradients,
    luck,
    mean_value,
    prompts,
    real,
    toy,
    train,
)

FOUR = Rollouts(images=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def evenness(images, texts):
    """A second reward, which does not ask for a larger mean: high where an image's numbers agree."""
    return -images.flatten(1).std(1)


def table(rows):
    """Two rewards that give the images these scores."""
    scores = torch.tensor(rows, dtype=torch.float32)
    return {"a": lambda images, texts: scores[:, 0], "b": lambda images, texts: scores[:, 1]}


def published(rewards, **changes) -> Parrot:
    return replace(Parrot.paper(rewards), **{"rollouts": FOUR, **changes})


GROUPS = [[3, 1], [1, 3], [1, 1], [0, 2], [5, 5], [4, 4], [5, 5], [0, 0]]
"""Of the first prompt the first two are on the front; of the second the two that tie."""


# ---- selection by hand -------------------------------------------------------------------------------------------------------


def test_published_weights_by_hand():
    """The front's summed rewards over n(P), which is 2 in both; the others exactly 0."""
    objective = published(table(GROUPS))
    chosen = objective.collect(toy(), prompts(toy(), "1", "2"), generator())
    assert chosen.weights.tolist() == [2, 2, 0, 0, 5, 0, 5, 0]
    assert chosen.kept == 0.5
    weighted = replace(objective, weights={"b": 3.0}).collect(toy(), prompts(toy(), "1", "2"), generator())
    assert weighted.weights.tolist() == [3, 5, 0, 0, 10, 0, 10, 0]


def test_the_normaliser_is_the_size_of_the_front():
    """The same best image alone on its front, and one of four that tie."""
    alone = published(table([[6, 6], [1, 1], [2, 2], [3, 3]])).collect(toy(), prompts(toy(), "1"), generator())
    shared = published(table([[6, 6]] * 4)).collect(toy(), prompts(toy(), "1"), generator())
    assert alone.weights.tolist() == [12, 0, 0, 0]
    assert shared.weights.tolist() == [3, 3, 3, 3]


def test_dominated_images_give_exactly_no_gradient():
    policy, objective = toy(), published(table(GROUPS))
    chosen = objective.collect(policy, prompts(policy, "1", "2"), generator())
    made, moved = chosen.trajectories, toy(gain=1.001)
    for row in range(len(made)):
        alone = replace(chosen, weights=torch.where(torch.arange(8) == row, chosen.weights, torch.zeros(8)))
        loss, _ = objective.loss(moved, policy, alone, generator())
        (gradient,) = torch.autograd.grad(loss, moved.backbone.gain)
        assert (gradient == 0) == (chosen.weights[row] == 0)
    states = {i: x.clone() for i, x in made.states.items()}
    loss, _ = objective.loss(policy, policy, chosen, generator())
    for i in states:
        states[i][[2, 3, 5, 7]] += 0.1  # were the dominated ones elsewhere, nothing would change
    elsewhere = replace(chosen, trajectories=replace(made, states=states))
    other, _ = objective.loss(policy, policy, elsewhere, generator())
    gradients_of = [torch.autograd.grad(each, policy.backbone.gain)[0] for each in (loss, other)]
    assert torch.equal(*gradients_of)


def test_the_published_gradient_is_that_of_equation_4():
    policy, objective = toy(), published(table(GROUPS))
    chosen = objective.collect(policy, prompts(policy, "1", "2"), generator())
    loss, figures = objective.loss(policy, frozen(policy), chosen, generator())
    assert figures["log_ratio_size"] == 0
    (gradient,) = torch.autograd.grad(loss, policy.backbone.gain)
    made, total = chosen.trajectories, 0.0
    for i in made.steps:
        step = FOUR.step(policy, made, i)
        log_p = -(made.states[i + 1] - step.mean).square().flatten(1).mean(1) / (2 * step.std**2)
        first = (4 * log_p[0] + 4 * log_p[1]) / 2
        second = (10 * log_p[4] + 10 * log_p[6]) / 2
        total = total + (first + second) / 2
    torch.testing.assert_close(gradient, -torch.autograd.grad(total, policy.backbone.gain)[0])


def test_the_default_takes_both_ends_with_opposite_signs():
    objective = Parrot(table([[5, 5], [3, 2], [2, 3], [0, 0]]), rollouts=FOUR)
    chosen = objective.collect(toy(), prompts(toy(), "1"), generator())
    assert chosen.weights[0] > 0 > chosen.weights[3]
    assert chosen.weights[[1, 2]].tolist() == [0, 0]
    torch.testing.assert_close(chosen.weights[0], -chosen.weights[3])
    assert chosen.kept == 0.25
    scaled = Parrot(table([[500, 5], [300, 2], [200, 3], [0, 0]]), rollouts=FOUR).collect(toy(), prompts(toy(), "1"), generator())
    torch.testing.assert_close(scaled.weights, chosen.weights, atol=1e-3, rtol=1e-3)  # no reward decides by its scale


def test_small_differences_do_not_count_for_domination():
    """Image 1 is a hair better in one reward and far worse in the other."""
    scores = torch.tensor([[3.0, 3.0], [3.01, 0.0], [1.0, 1.0], [0.0, 2.0]])
    groups = torch.zeros(4, dtype=torch.long)
    factors = torch.ones(2)
    objective = Parrot({"a": mean_value, "b": evenness}, rollouts=FOUR, fronts="best", standardise=False)
    assert (replace(objective, epsilon=0.0).selection(scores, groups, factors)[0] != 0).tolist() == [True, True, False, False]
    assert (objective.selection(scores, groups, factors)[0] != 0).tolist() == [True, False, False, False]
    torch.testing.assert_close(spread_within(torch.tensor([[0.0], [2.0], [9.0], [9.0]]), torch.tensor([0, 0, 1, 1])), torch.ones(1))


def test_kept_fraction_is_what_independent_rewards_give():
    """Of n independent samples h_k(n) / n are dominated by nobody, with h_1 = 1 and h_k(n) = sum over m <= n of h_{k-1}(m) / m."""
    draw, groups, expected = generator(1), torch.arange(40).repeat_interleave(24), [1.0] * 24
    for count in (2, 3, 4):
        expected = [sum(expected[m] / (m + 1) for m in range(n + 1)) for n in range(24)]
        objective = Parrot.paper({str(k): mean_value for k in range(count)})
        kept = objective.selection(torch.randn(960, count, generator=draw), groups, torch.ones(count))[1]
        assert kept == pytest.approx(expected[-1] / 24, abs=0.04)


def test_broken_scores_are_compared_with_nobody():
    nan = float("nan")
    chosen = published(table([[3, 1], [nan, 9], [1, 1], [9, float("inf")]])).collect(toy(), prompts(toy(), "1"), generator())
    assert chosen.weights.tolist() == [4, 0, 0, 0]
    none = Parrot(table([[nan, 1]] * 4), rollouts=FOUR).collect(toy(), prompts(toy(), "1"), generator())
    assert none.weights.tolist() == [0, 0, 0, 0]
    loss, figures = Parrot(table([[nan, 1]] * 4), rollouts=FOUR).loss(toy(), toy(), none, generator())
    assert loss == 0
    assert figures["broken"] == 1


# ---- invariances -------------------------------------------------------------------------------------------------------------


def test_the_first_update_has_a_ratio_of_one_and_the_divergence_pulls_back():
    policy, objective = toy(gain=1.5), Parrot({"a": mean_value, "b": evenness}, rollouts=FOUR, kl=0.1)
    chosen = objective.collect(policy, prompts(policy, "2"), generator())
    for i in chosen.trajectories.steps:
        assert torch.equal(log_ratio(FOUR.step(policy, chosen.trajectories, i), chosen.trajectories, i).detach(), torch.zeros(4))
    base = toy()
    silent = replace(chosen, weights=torch.zeros(4))
    loss, figures = objective.loss(policy, base, silent, generator())
    loss.backward()
    assert policy.backbone.gain.grad > 0
    assert base.backbone.gain.grad is None
    assert loss.item() == pytest.approx(0.1 * figures["kl"] / 16)


@pytest.mark.parametrize("objective", [Parrot, published], ids=["default", "paper"])
def test_a_batch_is_the_mean_of_its_singles_in_any_order(objective):
    rewards = {"a": mean_value, "b": evenness}
    made = objective(rewards, rollouts=FOUR, standardise=False, epsilon=0.0)  # whitening and spreads are the batch's
    policy = toy()
    batch = prompts(policy, "1", "2")

    def loss(rows):
        part = type(batch)(batch.conditioning.rows(rows), tuple(batch.seeds[row] for row in rows))
        return made.loss(toy(gain=1.01), policy, made.collect(policy, part, generator()), generator())[0]

    torch.testing.assert_close(loss([0, 1]), (loss([0]) + loss([1])) / 2)
    torch.testing.assert_close(loss([0, 1]), loss([1, 0]))


def test_the_same_seed_and_step_give_the_same_loss_to_the_bit():
    found = []
    for _ in range(2):
        policy, objective = toy(), Parrot({"a": mean_value, "b": evenness}, rollouts=Rollouts(images=4, trained=1))
        chosen = objective.collect(policy, prompts(policy, "1", "2"), generator(3))
        found.append(objective.loss(toy(gain=1.1), policy, chosen, generator(3))[0])
    assert torch.equal(*found)


def test_the_sum_over_steps_does_not_depend_on_how_many_are_drawn():
    """On average: over all draws of one step, the summed loss is that of all steps."""
    policy, whole = toy(), published({"a": mean_value, "b": evenness})
    chosen = whole.collect(policy, prompts(policy, "2"), generator())
    moved = toy(gain=1.00001)
    expected, _ = whole.loss(moved, policy, chosen, generator())
    drawn = {}
    for seed in range(30):
        one = replace(whole, rollouts=Rollouts(images=4, trained=1))
        drawn[one.rollouts.chosen(chosen.trajectories, generator(seed))] = one.loss(moved, policy, chosen, generator(seed))[0]
    assert len(drawn) == 3
    torch.testing.assert_close(sum(drawn.values()) / 3, expected)


# ---- effect ------------------------------------------------------------------------------------------------------------------

TWO = {"value": mean_value, "evenness": evenness}


def test_rewards_rise():
    assert train(Parrot(TWO, kl=0.0), toy()) > 0.25


def test_luck_teaches_nothing():
    assert abs(by_luck(Parrot(TWO, kl=0.0, rollouts=Rollouts(images=8)), "rewards")) < 0.1


def test_the_published_estimator_rises_on_one_reward():
    """Scores are all positive here: only because the best images alone teach does the weight move their way."""
    assert train(published(mean_value), toy()) > 0.25


@pytest.mark.parametrize("name", REAL)
def test_tiny_pipelines(name):
    policy, batch = real(name)
    loss, figures, found = gradients(Parrot({"a": brightness, "b": luck()}, rollouts=QUICK), policy, batch)
    assert loss.isfinite()
    assert figures["log_ratio_size"] == figures["kl"] == 0
    assert_gradients(found)


def test_settings_are_plain_and_mistakes_are_named():
    plain = Parrot(TWO, weights={"value": 2.0}).settings()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["rewards"], plain["weights"]) == (["value", "evenness"], {"value": 2.0})
    for changes, message in (
        ({"rollouts": Rollouts(images=1)}, "rollouts.images must be at least 2"),
        ({"weights": {"beauty": 1.0}}, "weights must give numbers of at least 0 for value, evenness; got {'beauty': 1.0}"),
        ({"weights": {"value": -1.0}}, "weights must give numbers"),
        ({"fronts": "first"}, "fronts must be 'best' or 'both', got 'first'"),
        ({"epsilon": -0.1}, "epsilon must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Parrot(TWO, **changes)
