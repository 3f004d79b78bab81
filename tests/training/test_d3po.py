"""D3PO: pairs by rewards and by people, the loss by hand in both forms, and that preferred images become likelier."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from diffalign.training.objectives.d3po import D3PO, Choice, Judged
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

SMALL = Rollouts(images=3, shared_noise=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*values):
    """A reward that gives the images of one prompt these scores."""
    return lambda images, texts: torch.tensor(list(values), dtype=torch.float32)


def pairs(judged: Judged) -> set[tuple[int, int]]:
    return set(zip(judged.winners.tolist(), judged.losers.tolist(), strict=True))


# ---- pairs -------------------------------------------------------------------------------------------------------------------


def test_rewards_choose_within_prompts_and_ties_are_no_pairs():
    objective = D3PO(numbers(1, 2, 2, 9, 0, 4), rollouts=SMALL)
    judged = objective.collect(toy(), prompts(toy(), "1", "2"), generator())
    assert pairs(judged) == {(1, 0), (2, 0), (3, 4), (3, 5), (5, 4)}
    assert judged.figures == {"score/reward": 3.0, "broken": 0.0}


def test_of_several_rewards_one_image_must_beat_the_other_in_all():
    objective = D3PO({"a": numbers(1, 2, 3), "b": numbers(5, 5, 4)}, rollouts=SMALL)
    assert pairs(objective.collect(toy(), prompts(toy(), "1"), generator())) == {(1, 0)}


def test_broken_scores_are_in_no_pair():
    objective = D3PO(numbers(1, float("nan"), 3), rollouts=SMALL)
    assert pairs(objective.collect(toy(), prompts(toy(), "1"), generator())) == {(2, 0)}


def test_people_choose():
    objective, policy = D3PO(rollouts=SMALL), toy()
    made = objective.sample(policy, prompts(policy, "1", "2"))
    judged = objective.judged(made, [Choice(0, 1), Choice(1, 2, over=(0,)), Choice(1, 0, over=(2,))])
    assert list(zip(judged.winners.tolist(), judged.losers.tolist(), strict=True)) == [(1, 0), (1, 2), (5, 3), (3, 5)]
    assert objective.collect(policy, judged, generator()) is judged
    by_reward = D3PO(numbers(0, 1, 0, 0, 0, 0), rollouts=SMALL).collect(policy, prompts(policy, "1", "2"), generator())
    assert pairs(by_reward) == pairs(objective.judged(made, [Choice(0, 1)]))
    assert torch.equal(by_reward.trajectories.latents, made.latents)
    with pytest.raises(ValueError, match="prefers an image to itself"):
        objective.judged(made, [Choice(0, 1, over=(1,))])
    with pytest.raises(IndexError, match="group 0 holds 3 images, and there is no number 4"):
        objective.judged(made, [Choice(0, 4)])
    with pytest.raises(ValueError, match="has no rewards to choose by"):
        objective.collect(policy, prompts(policy, "1"), generator())


# ---- the loss by hand ----------------------------------------------------------------------------------------------------------


def test_margins_by_hand():
    """Four images with l = 3, -7, 6, -1 nats; trust 5 cuts the third when it wins and the second when it loses, and not otherwise."""
    nats = torch.tensor([3.0, -7.0, 6.0, -1.0]).requires_grad_()
    winners, losers = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    margin = D3PO(trust=5.0).margin(nats, winners, losers, 100)
    torch.testing.assert_close(margin, torch.tensor([3.0 + 5.0, -7.0 - 6.0, 5.0 + 1.0]))
    (gradient,) = torch.autograd.grad(margin.sum(), nats)
    assert gradient.tolist() == [1.0, 1.0, -1.0, -1.0]  # the wrong pair (1, 2) is free to come back
    published = D3PO.paper().margin(nats, winners, losers, 10)
    torch.testing.assert_close(published, torch.tensor([math.log(1.1) - math.log(0.9), math.log(0.9) - math.log(1.1), math.log(1.1) + 0.1]))


def test_the_loss_by_hand():
    policy, moved = toy(), toy(gain=1.02)
    objective = D3PO(mean_value, rollouts=replace(SMALL, images=2), beta=0.5, trust=100.0)
    judged = objective.collect(policy, prompts(policy, "2"), generator())
    loss, figures = objective.loss(moved, policy, judged, generator())
    (better,), (worse,) = judged.winners.tolist(), judged.losers.tolist()
    made, terms, margins = judged.trajectories, [], []
    for i in made.steps:
        x = made.states[i + 1]
        new, old = SMALL.step(moved, made, i), SMALL.step(policy, made, i)
        nats = ((x - old.mean).square() - (x - new.mean).square()).flatten(1).sum(1) / (2 * new.std**2)
        margins.append(float((nats[better] - nats[worse]).detach()))
        terms.append(-math.log(1 / (1 + math.exp(-0.5 * margins[-1]))))
    assert loss.item() == pytest.approx(sum(terms) / 3, abs=1e-4)
    assert figures["margin"] == pytest.approx(sum(margins) / 3, abs=1e-3)
    assert figures["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert figures["pairs"] == 1


def test_the_published_loss_is_nearly_a_straight_line():
    policy = toy()
    objective = replace(D3PO.paper(mean_value), rollouts=replace(SMALL, images=2))
    judged = objective.collect(policy, prompts(policy, "2"), generator())
    for gain in (0.0, 0.9, 1.1, 5.0):
        loss, _ = objective.loss(toy(gain=gain), policy, judged, generator())
        assert 0.683 < loss.item() < 0.704


@pytest.mark.parametrize("objective", [D3PO(mean_value, rollouts=SMALL), replace(D3PO.paper(mean_value), rollouts=SMALL)])
def test_before_the_first_update_it_is_ln_2_and_swapping_turns_the_gradient_round(objective):
    policy = toy()
    judged = objective.collect(policy, prompts(policy, "1", "2"), generator())
    found = []
    for each in (judged, replace(judged, winners=judged.losers, losers=judged.winners)):
        loss, _ = objective.loss(policy, frozen(policy), each, generator())
        assert torch.equal(loss.detach(), torch.tensor(2.0).log())
        found.append(torch.autograd.grad(loss, policy.backbone.gain)[0])
    assert found[0] < 0  # descent raises gain
    torch.testing.assert_close(found[0], -found[1])


def test_without_pairs_the_loss_is_ln_2_without_gradient():
    policy, objective = toy(), D3PO(numbers(1, 1, 1), rollouts=SMALL)
    judged = objective.collect(policy, prompts(policy, "1"), generator())
    loss, figures = objective.loss(toy(gain=1.5), policy, judged, generator())
    assert loss.item() == pytest.approx(math.log(2))
    moved = toy(gain=1.5)
    loss, figures = objective.loss(moved, policy, judged, generator())
    assert torch.autograd.grad(loss, moved.backbone.gain)[0] == 0
    assert figures["pairs"] == 0


def test_the_anchor_and_the_divergence():
    policy, base = toy(gain=1.2), toy(gain=1.0)
    to_base = D3PO(mean_value, rollouts=SMALL, anchor="reference", kl=0.01)
    judged = to_base.collect(policy, prompts(policy, "1"), generator())
    loss, figures = to_base.loss(policy, base, judged, generator())
    loss.backward()
    assert figures["kl"] > 0
    assert base.backbone.gain.grad is None
    alone, _ = replace(to_base, kl=0.0).loss(policy, base, judged, generator())
    assert loss.item() == pytest.approx(alone.item() + 0.01 * figures["kl"], rel=1e-5)
    assert alone.item() != pytest.approx(math.log(2), abs=1e-3)
    to_sampler, _ = replace(to_base, anchor="sampler").loss(policy, base, judged, generator())
    assert to_sampler.item() == pytest.approx(math.log(2) + 0.01 * figures["kl"], rel=1e-5)
    calls = len(base.backbone.calls)
    D3PO(mean_value, rollouts=SMALL).loss(policy, base, judged, generator())
    assert len(base.backbone.calls) == calls  # the sampler's log-probabilities were kept: the reference is not asked


def test_one_evaluation_of_every_image_a_step_however_many_pairs():
    policy = toy()
    objective = D3PO(mean_value, rollouts=replace(SMALL, images=7))
    judged = objective.collect(policy, prompts(policy, "2"), generator())
    assert len(judged.winners) == 21
    policy.backbone.calls.clear()
    objective.loss(policy, policy, judged, generator())
    assert policy.backbone.calls == [7, 7, 7]


# ---- invariances, effect, real networks --------------------------------------------------------------------------------------


def test_a_batch_is_the_mean_of_its_singles_in_any_order():
    policy, objective = toy(), D3PO(mean_value, rollouts=SMALL, kl=0.01)
    batch = prompts(policy, "1", "2")

    def loss(rows):
        part = type(batch)(batch.conditioning.rows(rows), tuple(batch.seeds[row] for row in rows))
        judged = objective.collect(policy, part, generator())
        return objective.loss(toy(gain=1.05), policy, judged, generator())[0]

    torch.testing.assert_close(loss([0, 1]), (loss([0]) + loss([1])) / 2)
    torch.testing.assert_close(loss([0, 1]), loss([1, 0]))
    judged = objective.collect(policy, batch, generator())
    turned = replace(judged, winners=judged.winners.flip(0), losers=judged.losers.flip(0))
    pair = [objective.loss(toy(gain=1.05), policy, each, generator())[0] for each in (judged, turned)]
    torch.testing.assert_close(*pair)


def test_the_same_seed_and_step_give_the_same_loss_to_the_bit():
    found = []
    for _ in range(2):
        policy, objective = toy(), D3PO(mean_value, rollouts=replace(SMALL, trained=1))
        judged = objective.collect(policy, prompts(policy, "1", "2"), generator(3))
        found.append(objective.loss(toy(gain=1.1), policy, judged, generator(3))[0])
    assert torch.equal(*found)


LEARNERS = {
    "default": D3PO(mean_value),
    "two updates": D3PO(mean_value, rollouts=Rollouts(images=4, trained=2)),
    "paper": D3PO.paper(mean_value),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_rewards_rise(name):
    least = 0.1 if name == "paper" else 0.25  # its bound is around the model before tuning: of 16 entries, 1.6 nats
    assert train(LEARNERS[name], toy(), per_batch=2 if name == "two updates" else 1) > least


def test_luck_teaches_nothing():
    assert abs(by_luck(LEARNERS["default"], "rewards")) < 0.1


def test_people_raise_what_they_prefer():
    """One round by hand: the lowest image of each prompt is preferred, and the weight falls."""
    policy, objective = toy(), D3PO()
    made = objective.sample(policy, prompts(policy, "2", "3"))
    lowest = made.latents.flatten(1).mean(1).view(2, 4).argmin(1).tolist()
    judged = objective.judged(made, [Choice(group, image) for group, image in enumerate(lowest)])
    optimizer = torch.optim.Adam([policy.backbone.gain], lr=0.01)
    for update in range(5):
        loss, _ = objective.loss(policy, policy, objective.collect(policy, judged, generator(update)), generator(update))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert policy.backbone.gain < 0.97


@pytest.mark.parametrize("name", REAL)
def test_tiny_pipelines(name):
    policy, batch = real(name)
    objective = D3PO(brightness, rollouts=QUICK, anchor="reference")
    loss, figures, found = gradients(objective, policy, batch)
    assert torch.equal(loss.detach(), torch.tensor(2.0).log())
    assert figures["pairs"] == 2
    assert_gradients(found)


def test_settings_are_plain_and_mistakes_are_named():
    plain = D3PO({"a": mean_value, "b": mean_value}).settings()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rewards"] == ["a", "b"]
    assert D3PO.paper().settings()["rollouts"]["images"] == 7
    for changes, message in (
        ({"rollouts": Rollouts(images=1)}, "rollouts.images must be at least 2"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"anchor": "base"}, "anchor must be 'sampler' or 'reference', got 'base'"),
    ):
        with pytest.raises(ValueError, match=message):
            D3PO(mean_value, **changes)
