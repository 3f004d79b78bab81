"""R0 and R0+: hand-worked losses, which steps a gradient reaches, what each term does, and what a chain costs."""

from __future__ import annotations

import pytest
import torch

from diffalign.diffusion import add_noise, from_x0_and_eps
from diffalign.rewards.gradients import EqualRMS
from diffalign.sampling import rollout
from diffalign.training.chain import RandomEta, SeededDDIM, levels_of
from diffalign.training.climbing import Climb, slope
from diffalign.training.objectives.r0 import R0, R0Plus, guidance_direction
from tests.training.chained import (
    Chained,
    generator,
    gradients_of,
    loss_of,
    mean_value,
    nothing,
    pair,
    prompts,
    towards,
    trained,
)

BOTH = pytest.mark.parametrize("kind", [R0, R0Plus])
PREDICTIONS = pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction"])
ALONE = {"guidance_reward": 0.0, "anchor": 0.0}


# ---- the chain ---------------------------------------------------------------------------------------------------------------


@PREDICTIONS
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.3, 0.3), (0.7, 0.7), (1.0, 1.0), (0.0, 1.0)])
def test_every_eta_keeps_the_marginals_of_the_forward_process(prediction, low, high):
    """For the true x0 and eps the state is N(a x0, s^2) at every level, and so on the noise that the next step starts from."""
    backbone, count = Chained(prediction), 1000
    schedule, x0 = backbone.schedule(), torch.full((count, 4), 1.5)
    eps = torch.randn(count, 4, generator=generator(1))
    sampler = RandomEta(tuple(range(count)), low, high)
    for i in range(schedule.steps - 1):
        level = schedule.signal[i], schedule.noise[i]
        x, output = add_noise(x0, eps, *level), from_x0_and_eps(x0, eps, *level, prediction)
        step = sampler.step(schedule, i, x, output)
        error = 4 / (4 * count) ** 0.5  # four standard errors
        assert step.mean.mean().item() == pytest.approx(schedule.signal[i + 1] * 1.5, abs=error * schedule.noise[i + 1])
        assert step.mean.std().item() == pytest.approx(schedule.noise[i + 1], rel=error)
        torch.testing.assert_close(step.x0, x0, rtol=0, atol=2e-4)


@PREDICTIONS
def test_random_eta_is_ddim_at_zero_and_fresh_noise_at_one(prediction):
    policy, _ = pair(prediction, spread=0.5)
    call = (torch.randn(2, 1, 4, 4, generator=generator(3)), policy.backbone.encode(["1", "2"]), policy.backbone.schedule())
    with torch.no_grad():
        still, ddim = (rollout(policy.backbone, *call, sampler).latents for sampler in (RandomEta((5, 6), 0.0, 0.0), SeededDDIM((5, 6))))
        torch.testing.assert_close(still, ddim)
        step = RandomEta((5, 6), 1.0, 1.0).step(call[2], 0, call[0], policy(call[0], 1000.0, call[1]))
        opposite = RandomEta((5, 6), 1.0, 1.0).step(call[2], 0, -call[0], policy(call[0], 1000.0, call[1]))
    signal = call[2].signal[1]
    torch.testing.assert_close(step.mean - signal * step.x0, opposite.mean - signal * opposite.x0, rtol=0, atol=1e-4)


def test_eta_is_drawn_for_each_sample_and_step_from_its_seed():
    drawn = torch.stack([RandomEta(tuple(range(400)), 0.2, 0.6).eta(i) for i in range(3)])
    assert 0.2 <= drawn.min() < 0.21
    assert 0.59 < drawn.max() < 0.6
    assert drawn.unique().numel() > 1190
    assert torch.equal(RandomEta((7, 3), 0.2, 0.6).eta(1), drawn[1][[7, 3]])


@PREDICTIONS
def test_levels_at_given_times_end_at_the_clean_image(prediction):
    backbone = Chained(prediction)
    schedule = levels_of(backbone, 2, (999.0, 400.0), None)
    assert (schedule.signal[-1], schedule.noise[-1], schedule.prediction) == (1.0, 0.0, prediction)
    assert schedule.noise[1] == pytest.approx(0.4)
    policy, reference = pair(prediction)
    objective = R0(Climb({"mean": mean_value}), steps=2, timesteps=(999.0, 400.0))
    objective.collect(policy, prompts(policy, ("1",), (1,)), generator())
    loss_of(objective, policy, reference, prompts(policy, ("1",), (1,)))
    assert policy.backbone.calls == [1, 1]


# ---- losses worked by hand ---------------------------------------------------------------------------------------------------


@BOTH
@PREDICTIONS
def test_hand_worked(kind, prediction):
    """x0^ = gain target in 16 entries. Rewards: direction 1/4 everywhere; guidance: c - u = target, direction 1/4 too. At targets 1 and
    3 and gain 1.5: value -1.5 * 2, plus the anchor 0.2 * mean(16 (0.5 target)^2 / 8) = 0.2 * 2.5, plus the penalty 3 * 0.25.
    """
    policy, reference = pair(prediction)
    distance = lambda: (policy.backbone.gain - 1).square()  # noqa: E731
    objective = kind(Climb({"mean": mean_value}), guidance_reward=0.5, anchor=0.2, weight_penalty=3.0, weight_distance=distance)
    with torch.no_grad():
        policy.backbone.gain.fill_(1.5)
    batch = prompts(policy, ("1", "3"), (4, 9))
    loss, figures = loss_of(objective, policy, reference, batch)
    assert loss.item() == pytest.approx(-3 + 0.2 * 2.5 + 3 * 0.25, abs=1e-3)
    gradient, _ = gradients_of(objective, policy, reference, batch)
    rewards, anchor, penalty = -4 * 2 * 1.5, 0.2 * (16 * 0.5 * (1 + 9) / 2) / 4, 3 * 2 * 0.5
    assert gradient.item() == pytest.approx(rewards + anchor + penalty, rel=2e-3)
    assert figures["reward"] == figures["reward/mean"] == pytest.approx(3, abs=1e-3)
    assert figures["departure"] == pytest.approx(0.5 * 2, abs=1e-3)
    assert figures["guidance_cosine"] == pytest.approx(1, abs=1e-3)
    assert figures["weight_distance"] == pytest.approx(0.25)
    assert figures["image_gradient/mean"] == pytest.approx(0.25)


@BOTH
def test_without_normalization_gradients_are_as_they_are(kind):
    """Direction 1/16 from the mean, target from the guidance: at target 2, -(16 * 2 / 16) - 0.5 * 16 * 2 * 2."""
    policy, reference = pair()
    batch = prompts(policy, ("2",), (4,))
    climb = Climb({"mean": mean_value, "twice": mean_value}, weights={"mean": 3.0, "twice": -2.0})
    for weight, expected in ((0.0, -2.0), (0.5, -34.0)):
        objective = kind(climb, normalize=False, guidance_reward=weight, anchor=0.0)
        gradient, _ = gradients_of(objective, policy, reference, batch)
        assert gradient.item() == pytest.approx(expected, rel=1e-5)
        loss, figures = loss_of(objective, policy, reference, batch)
        assert (loss.item(), figures["reward"]) == (pytest.approx(-2), pytest.approx(2))  # 3 - 2 times the mean; guidance has no value


def test_equal_norms_let_the_smaller_reward_speak():
    """Half of the image up, a thousandfold; the other half up. Equal sizes move both alike, a plain sum the first alone."""
    climbs = {"left": lambda x, p: 1000 * x[:, :, :2].flatten(1).mean(1), "right": lambda x, p: x[:, :, 2:].flatten(1).mean(1)}
    backbone, x0 = Chained(), torch.zeros(1, 1, 4, 4)
    conditioning = backbone.encode(["1"])
    equal = slope(Climb(climbs, rule=EqualRMS()), backbone, x0, conditioning).direction
    plain = slope(Climb(climbs), backbone, x0, conditioning).direction
    torch.testing.assert_close(equal[:, :, :2], equal[:, :, 2:])
    torch.testing.assert_close(plain[:, :, :2], 1000 * plain[:, :, 2:])


@PREDICTIONS
def test_the_guidance_reward_is_the_difference_of_the_branches(prediction):
    policy, reference = pair(prediction)
    batch = prompts(policy, ("2", "-3"), (4, 5))
    pull = guidance_direction(reference, torch.zeros(2, 1, 4, 4), batch.conditioning, batch.seeds, generator())
    torch.testing.assert_close(pull.mean(dim=(1, 2, 3)), torch.tensor([2.0, -3.0]), rtol=0, atol=1e-2)
    assert not pull.requires_grad


# ---- what a gradient reaches ---------------------------------------------------------------------------------------------------


@BOTH
def test_zero_rewards_leave_the_regulariser_alone(kind):
    policy, reference = pair(spread=0.5)
    with torch.no_grad():
        policy.backbone.gain.fill_(1.5)
    batch = prompts(policy, ("1", "3"), (4, 9))
    gain, offsets = gradients_of(kind(Climb({"zero": nothing}), **ALONE), policy, reference, batch)
    assert gain == 0
    assert not offsets.any()
    distance = lambda: (policy.backbone.gain - 1).square()  # noqa: E731
    penalised = kind(Climb({"zero": nothing}), **ALONE, weight_penalty=3.0, weight_distance=distance)
    gain, offsets = gradients_of(penalised, policy, reference, batch)
    assert gain.item() == 3.0
    assert not offsets.any()
    anchored, _ = gradients_of(kind(Climb({"zero": nothing}), guidance_reward=0.0, anchor=0.2), policy, reference, batch)
    assert anchored > 0
    guided, _ = gradients_of(kind(Climb({"zero": nothing}), guidance_reward=0.5, anchor=0.0), policy, reference, batch)
    assert guided < 0


@BOTH
def test_at_the_reference_the_anchor_pulls_nowhere(kind):
    policy, reference = pair(spread=0.5)
    batch = prompts(policy, ("1", "3"), (4, 9))
    loss, figures = loss_of(kind(Climb({"zero": nothing}), guidance_reward=0.0, anchor=0.2), policy, reference, batch)
    loss.backward()
    assert (loss.item(), policy.backbone.gain.grad.item(), figures["departure"]) == (0, 0, 0)


def test_r0_reaches_every_step_and_r0_plus_one():
    policy, reference = pair(spread=0.5)
    found = set()
    for seed in range(12):
        batch = prompts(policy, ("2",), (seed,))
        _, whole = gradients_of(R0(Climb({"mean": mean_value}), eta_high=0.9, **ALONE), policy, reference, batch)
        assert (whole < 0).all()
        plus = R0Plus(Climb({"mean": mean_value}), **ALONE)
        (step,) = plus.collect(policy, batch, generator()).steps
        _, one = gradients_of(plus, policy, reference, batch)
        assert one[step] < 0
        assert torch.equal(one != 0, torch.arange(4) == step)
        found.add(step)
    assert found == {0, 1, 2, 3}


def test_r0_back_propagates_what_autograd_does():
    policy, reference = pair("epsilon", spread=0.5)
    batch = prompts(policy, ("1", "3"), (4, 9))
    objective = R0(Climb({"goal": towards(4.0)}), normalize=False, **ALONE)
    got = gradients_of(objective, policy, reference, batch)
    noise = policy.backbone.draw_noise([generator(4), generator(9)])
    latents = rollout(policy.backbone, noise, batch.conditioning, policy.backbone.schedule(), RandomEta((4, 9))).latents
    expected = torch.autograd.grad(-towards(4.0)(latents, None).mean(), [policy.backbone.gain, policy.backbone.offsets])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@BOTH
def test_no_gradient_to_the_reference(kind):
    policy, reference = pair(spread=0.5)
    reference.backbone.requires_grad_(True)
    loss, _ = loss_of(kind(Climb({"mean": mean_value}), anchor=1.0), policy, reference, prompts(policy, ("1", "3"), (4, 9)))
    loss.backward()
    assert reference.backbone.gain.grad is None
    assert policy.backbone.gain.grad.isfinite()


def test_a_reward_that_is_not_finite_spares_the_other_samples(caplog):
    policy, reference = pair(spread=0.5)

    def broken(images, texts):
        return torch.where(torch.tensor([text == "3" for text in texts]), torch.nan, 1.0) * mean_value(images, texts)

    batch = prompts(policy, ("1", "3"), (4, 9))
    both, _ = gradients_of(R0(Climb({"broken": broken}), **ALONE), policy, reference, batch)
    alone, _ = gradients_of(R0(Climb({"broken": broken}), **ALONE), policy, reference, prompts(policy, ("1",), (4,)))
    torch.testing.assert_close(both, alone / 2)
    assert "sample 1 of 2" in caplog.text


# ---- batches and seeds -------------------------------------------------------------------------------------------------------


@BOTH
@PREDICTIONS
def test_a_batch_is_its_singles_in_any_order(kind, prediction):
    policy, reference = pair(prediction, spread=0.5)
    objective = kind(Climb({"goal": towards(4.0), "mean": mean_value}, rule=EqualRMS()), guidance_scale=2.0)
    targets, seeds = ("1", "2", "-3"), (4, 9, 2)
    whole = gradients_of(objective, policy, reference, prompts(policy, targets, seeds))
    turned = gradients_of(objective, policy, reference, prompts(policy, targets[::-1], seeds[::-1]))
    singles = [gradients_of(objective, policy, reference, prompts(policy, (t,), (s,))) for t, s in zip(targets, seeds, strict=True)]
    for k in range(2):
        torch.testing.assert_close(whole[k], torch.stack([single[k] for single in singles]).mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole[k], turned[k], rtol=1e-4, atol=1e-5)


@BOTH
def test_seeds_decide_to_the_bit(kind):
    policy, reference = pair(spread=0.5)
    objective = kind(Climb({"goal": towards(4.0)}))
    same = [loss_of(objective, policy, reference, prompts(policy, ("1", "2"), (4, 9)), 3)[0] for _ in range(2)]
    assert torch.equal(*same)
    others = [loss_of(objective, policy, reference, prompts(policy, ("1", "2"), (5, 9)), 3)[0]]
    assert not torch.equal(same[0], others[0])
    figures = [loss_of(objective, policy, reference, prompts(policy, ("1", "2"), (4, 9)), seed)[1]["guidance_cosine"] for seed in (3, 4)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


# ---- effect ------------------------------------------------------------------------------------------------------------------


@BOTH
@PREDICTIONS
def test_it_moves_towards_the_reward_and_the_anchor_holds_it(kind, prediction):
    """The reward is highest at an image of mean 3, the data lie at 2: gain goes from 1 towards 1.5."""

    def gain_after(**changes) -> float:
        policy, reference = pair(prediction, spread=0.3)
        log = trained(kind(Climb({"goal": towards(3.0)}, watched={"mean": mean_value}), **{**ALONE, **changes}), policy, reference,
                      lambda step: prompts(policy, ("2",) * 4, tuple(range(4 * step, 4 * step + 4))))  # fmt: skip
        assert log[-1]["reward"] > log[0]["reward"] + 0.3
        assert log[-1]["watched/mean"] > log[0]["watched/mean"] + 0.1
        return policy.backbone.gain.item()

    free = gain_after()
    assert free == pytest.approx(1.5, abs=0.15)
    assert 1.05 < gain_after(anchor=10.0) < free - 0.05


def test_with_guidance_as_the_only_reward_images_move_along_the_prompt():
    policy, reference = pair(spread=0.3)
    objective = R0Plus(Climb({"zero": nothing}), guidance_reward=1.0, anchor=0.0)
    trained(objective, policy, reference, lambda step: prompts(policy, ("2", "-2"), (2 * step, 2 * step + 1)), steps=10)
    assert policy.backbone.gain > 1.3


# ---- settings and mistakes -----------------------------------------------------------------------------------------------------


def test_settings_are_plain_data():
    objective = R0Plus(Climb({"mean": mean_value}, watched={"zero": nothing}, rule=EqualRMS()), steps=2, timesteps=(999.0, 499.0))
    settings = objective.settings()
    assert settings["name"] == "r0+"
    assert settings["climb"] == {"rewards": {"mean": 1.0}, "rule": "equal", "watched": ["zero"]}
    assert settings["timesteps"] == [999.0, 499.0]
    paper = R0.paper({"mean": mean_value}, lambda: torch.zeros(()), 0.1)
    assert (paper.anchor, paper.guidance_reward, paper.climb.rule.name, paper.settings()["weight_distance"]) == (0, 1, "equal", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"timesteps": (999.0, 499.0)}, "timesteps must be 4 numbers"),
        ({"steps": 2, "timesteps": (499.0, 999.0)}, "from noise to image"),
        ({"eta_low": 0.6, "eta_high": 0.5}, "0 <= low <= high <= 1"),
        ({"anchor": -1.0}, "anchor must be a finite number"),
        ({"weight_penalty": 0.1}, "needs weight_distance"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        R0(Climb({"mean": mean_value}), **changes)


def test_mistakes_in_rewards_are_named():
    with pytest.raises(ValueError, match="rewards is empty"):
        Climb({})
    with pytest.raises(ValueError, match="weights names clip"):
        Climb({"mean": mean_value}, weights={"clip": 1.0})
    with pytest.raises(ValueError, match="watched names mean"):
        Climb({"mean": mean_value}, watched={"mean": mean_value})
    policy, reference = pair()
    batch = prompts(policy, ("1",), (4,))
    with pytest.raises(TypeError, match="'cut' has no gradient"):
        loss_of(R0(Climb({"cut": lambda x, p: mean_value(x.detach(), p)})), policy, reference, batch)
    with pytest.raises(ValueError, match="one score for each"):
        loss_of(R0(Climb({"scalar": lambda x, p: x.mean()})), policy, reference, batch)
