"""DRaFT, AlignProp and ReFL: hand-worked losses, where gradients stop, and that rewards rise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffalign.sampling import rollout
from diffalign.training.chain import SeededDDIM
from diffalign.training.climbing import Climb
from diffalign.training.objectives.draft import AlignProp, DRaFT, ReFL, Sampling
from tests.training.chained import (
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

SHORT = Sampling(steps=4, guidance_scale=1.0)
MEAN = Climb({"mean": mean_value})


def objectives(climb: Climb, sampling: Sampling = SHORT) -> dict:
    return {
        "draft-1": DRaFT(climb, sampling=sampling),
        "draft-3": DRaFT(climb, sampling=sampling, last=3),
        "draft-lv": DRaFT.low_variance(climb, sampling),
        "alignprop": AlignProp(climb, sampling=replace(sampling, eta=1.0), mean_depth=2.0, depth_std=1.0),
        "refl": ReFL(climb, sampling=sampling, earliest=2),
    }


EACH = pytest.mark.parametrize("name", objectives(MEAN))
PREDICTIONS = pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction"])


# ---- losses worked by hand ---------------------------------------------------------------------------------------------------


@EACH
@PREDICTIONS
def test_hand_worked(name, prediction):
    """The last x0^ is gain target in every entry: loss -gain * 2 at targets 1 and 3, gradient -2. Guided by w: w times both."""
    policy, reference = pair(prediction)
    with torch.no_grad():
        policy.backbone.gain.fill_(1.5)
    batch = prompts(policy, ("1", "3"), (4, 9))
    for scale in (1.0, 3.0):
        objective = objectives(MEAN, replace(SHORT, guidance_scale=scale))[name]
        loss, figures = loss_of(objective, policy, reference, batch)
        gradient, _ = gradients_of(objective, policy, reference, batch)
        assert loss.item() == pytest.approx(-1.5 * 2 * scale, rel=1e-3)
        assert gradient.item() == pytest.approx(-2 * scale, rel=1e-3)
        assert figures["reward"] == pytest.approx(1.5 * 2 * scale, rel=1e-3)
        assert figures["departure"] == pytest.approx(0.5 * 2 * scale, rel=1e-3)


@EACH
def test_zero_rewards_move_nothing(name):
    policy, reference = pair(spread=0.5)
    gain, offsets = gradients_of(objectives(Climb({"zero": nothing}))[name], policy, reference, prompts(policy, ("1", "3"), (4, 9)))
    assert gain == 0
    assert not offsets.any()


def test_refl_stops_pulling_at_the_ceiling():
    policy, reference = pair()
    objective = ReFL(MEAN, sampling=SHORT, earliest=2, ceiling=2.0)
    gain, _ = gradients_of(objective, policy, reference, prompts(policy, ("1", "3"), (4, 9)))
    assert gain.item() == pytest.approx(-0.5)  # the first sample's alone
    loss, figures = loss_of(objective, policy, reference, prompts(policy, ("1", "3"), (4, 9)))
    assert (loss.item(), figures["reward"]) == (pytest.approx(-1.5), pytest.approx(2.0))


# ---- where gradients stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_draft_reaches_the_last_steps_alone(last):
    policy, reference = pair(spread=0.5)
    objective = DRaFT(MEAN, sampling=SHORT, last=last)
    _, offsets = gradients_of(objective, policy, reference, prompts(policy, ("1", "3"), (4, 9)))
    assert not offsets[: 4 - last].any()
    assert (offsets[4 - last :] < 0).all()


def test_draft_of_all_steps_is_plain_back_propagation():
    policy, reference = pair("epsilon", spread=0.5)
    batch = prompts(policy, ("1", "3"), (4, 9))
    got = gradients_of(DRaFT(Climb({"goal": towards(4.0)}), sampling=SHORT, last=4), policy, reference, batch)
    noise = policy.backbone.draw_noise([generator(4), generator(9)])
    latents = rollout(policy.backbone, noise, batch.conditioning, policy.backbone.schedule(), SeededDDIM((4, 9))).latents
    expected = torch.autograd.grad(-towards(4.0)(latents, None).mean(), [policy.backbone.gain, policy.backbone.offsets])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_low_variance_is_the_mean_over_fresh_noise_at_the_last_level():
    """Two more gradients of the last step, from other noise: for a squared reward they differ, and their mean varies less."""
    policy, reference = pair(spread=0.5)
    climb = Climb({"goal": towards(4.0)})
    found = {0: [], 2: []}
    for seed in range(24):
        batch = prompts(policy, ("1",), (seed,))
        for renoised, each in found.items():
            _, offsets = gradients_of(DRaFT(climb, sampling=SHORT, renoised=renoised), policy, reference, batch)
            assert not offsets[:3].any()
            each.append(offsets[3])
    one, three = (torch.stack(found[n]) for n in (0, 2))
    assert three.std() < one.std()
    assert three.mean().item() == pytest.approx(one.mean().item(), rel=0.1)
    batch = prompts(policy, ("1",), (4,))  # of a linear reward each gradient is the last step's own: the re-noised image is a constant
    same = [gradients_of(DRaFT(MEAN, sampling=SHORT, renoised=n), policy, reference, batch)[1] for n in (0, 2)]
    torch.testing.assert_close(*same)


def test_alignprop_cuts_each_sample_at_a_depth_of_its_own():
    policy, reference = pair(spread=0.5)
    objective = objectives(MEAN)["alignprop"]
    found = set()
    for seed in range(30):
        (cut,) = objective.cuts((seed,), 4)
        _, offsets = gradients_of(objective, policy, reference, prompts(policy, ("2",), (seed,)))
        assert not offsets[:cut].any()
        assert (offsets[cut:] < 0).all()
        found.add(cut)
    assert found == {1, 2, 3}
    cuts = AlignProp(MEAN).cuts(tuple(range(2000)), 50)
    assert min(cuts) >= 1
    assert max(cuts) == 49
    assert sum(cuts) / 2000 == pytest.approx(41.8, abs=0.5)  # 42, but for what is cut at 49


def test_refl_reaches_the_step_it_drew():
    policy, reference = pair(spread=0.5)
    objective = objectives(MEAN)["refl"]
    found = set()
    for seed in range(20):
        batch = prompts(policy, ("2",), (seed,))
        (step,) = objective.collect(policy, batch, generator()).steps
        _, offsets = gradients_of(objective, policy, reference, batch)
        assert torch.equal(offsets != 0, torch.arange(4) == step)
        found.add(step)
    assert found == {2, 3}


@EACH
def test_no_gradient_to_the_reference(name):
    policy, reference = pair(spread=0.5)
    reference.backbone.requires_grad_(True)
    loss, _ = loss_of(objectives(MEAN)[name], policy, reference, prompts(policy, ("1", "3"), (4, 9)))
    loss.backward()
    assert reference.backbone.gain.grad is None


# ---- batches, seeds, effect ----------------------------------------------------------------------------------------------------


@EACH
@PREDICTIONS
def test_a_batch_is_its_singles_in_any_order(name, prediction):
    policy, reference = pair(prediction, spread=0.5)
    objective = objectives(Climb({"goal": towards(4.0)}), replace(SHORT, guidance_scale=2.0))[name]
    targets, seeds = ("1", "2", "-3"), (4, 9, 2)
    whole = gradients_of(objective, policy, reference, prompts(policy, targets, seeds))
    turned = gradients_of(objective, policy, reference, prompts(policy, targets[::-1], seeds[::-1]))
    singles = [gradients_of(objective, policy, reference, prompts(policy, (t,), (s,))) for t, s in zip(targets, seeds, strict=True)]
    for k in range(2):
        torch.testing.assert_close(whole[k], torch.stack([single[k] for single in singles]).mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole[k], turned[k], rtol=1e-4, atol=1e-4)


@EACH
def test_seeds_decide_to_the_bit(name):
    policy, reference = pair(spread=0.5)
    objective = objectives(Climb({"goal": towards(4.0)}))[name]
    first, again, other = (loss_of(objective, policy, reference, prompts(policy, ("1", "2"), (s, 9)))[0] for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@EACH
@PREDICTIONS
def test_it_moves_towards_the_reward(name, prediction):
    """The reward is highest at an image of mean 3, the data lie at 2: gain goes from 1 towards 1.5."""
    policy, reference = pair(prediction, spread=0.3)
    objective = objectives(Climb({"goal": towards(3.0)}, watched={"mean": mean_value}))[name]
    log = trained(objective, policy, reference, lambda step: prompts(policy, ("2",) * 4, tuple(range(4 * step, 4 * step + 4))))
    assert log[-1]["reward"] > log[0]["reward"] + 0.3
    assert log[-1]["watched/mean"] > log[0]["watched/mean"] + 0.1
    assert log[-1]["departure"] > log[0]["departure"]
    assert 1.2 < policy.backbone.gain.item() < 2.2


# ---- networks ----------------------------------------------------------------------------------------------------------------


@EACH
def test_networks_get_a_finite_gradient_and_checkpointing_keeps_it(name, pipelines):
    policy, reference, batch = pipelines
    network = getattr(policy.backbone, policy.backbone.denoiser)
    named = dict(network.named_parameters())
    found = []
    for checkpoint in (False, True):
        objective = objectives(Climb({"contrast": lambda x, p: x.flatten(1).std(1)}), Sampling(4, 3.0, checkpoint=checkpoint))[name]
        loss, figures = loss_of(objective, policy, reference, batch)
        found.append(torch.autograd.grad(loss, list(named.values()), allow_unused=True))
        assert figures["departure"] == pytest.approx(0, abs=1e-4)
    reached = [name for name, g in zip(named, found[0], strict=True) if g is not None and g.isfinite().all() and g.any()]
    assert len(reached) > 0.8 * len(named), sorted(set(named) - set(reached))
    for plain, checkpointed in zip(*found, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-6)


# ---- settings and mistakes -----------------------------------------------------------------------------------------------------


def test_settings_are_plain_data_and_papers_say_what_was_published():
    settings = DRaFT.low_variance(MEAN).settings()
    assert settings["sampling"] == {"steps": 50, "guidance_scale": 7.5, "eta": 0.0, "checkpoint": True}
    assert (settings["name"], settings["last"], settings["renoised"]) == ("draft", 1, 2)
    sampling = AlignProp(MEAN).sampling
    assert (sampling.steps, sampling.eta, sampling.guidance_scale) == (50, 1.0, 5.0)
    assert (ReFL.paper(MEAN).ceiling, ReFL.paper(MEAN).sampling.steps) == (2.0, 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DRaFT(MEAN, sampling=SHORT, last=5), "last must lie in 1..4"),
        (lambda: DRaFT(MEAN, last=2, renoised=1), "above 0 only where last is 1"),
        (lambda: AlignProp(MEAN, depth_std=-1.0), "depth_std must be a finite number"),
        (lambda: ReFL(MEAN, sampling=SHORT, earliest=4), "earliest must lie in 0..3"),
        (lambda: Sampling(eta=1.5), r"eta must lie in \[0, 1\]"),
        (lambda: Sampling(steps=0), "steps must be a whole number"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
