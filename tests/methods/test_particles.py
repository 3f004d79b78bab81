"""FK steering and seed pruning on a denoiser known in closed form: whom they keep, what they cost, and the distribution they reach."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.diffusion import DDIM
from diffalign.methods.particles import FKSteering, SeedPruning, systematic, weighings
from diffalign.noise import seeded_noise
from diffalign.sampling import rollout
from diffalign.types import NoiseProblem, RewardScores
from tests.test_sampling import Gaussian


class TwoModes(Gaussian):
    """Data at -1 and +1 with equal chances and a little spread: the posterior mean is known, and both modes are reached."""

    def predict(self, x, timestep, texts, conditioning):
        self.calls.append(len(x))
        plan = self.schedule()
        i = plan.timesteps.index(timestep)
        a, s = plan.signal[i], plan.noise[i]
        variance = a**2 * self.spread**2 + s**2
        mean = x.flatten(1).sum(1)  # all entries share their mode, so the mode's log-odds add up
        odds = (2 * a * mean / variance).view(-1, *[1] * (x.dim() - 1))
        target = torch.tanh(odds / 2)
        weight = a * self.spread**2 / variance
        x0 = target + weight * (x - a * target)
        return (x - x0) / s


class Loop:
    """A DenoisingLoop over a toy backbone."""

    def __init__(self, backbone, prompts, seeds):
        self.backbone, self.conditioning, self.seeds = backbone, backbone.encode(prompts), seeds
        self.schedule = backbone.schedule()
        self.steps, self.spent = self.schedule.steps, 0

    def run(self, noise, rows, sampler=None, on_step=None, draws=None):
        draws = [0] * len(rows) if draws is None else draws
        streams = [torch.Generator().manual_seed(7919 * self.seeds[row] + draw) for row, draw in zip(rows, draws, strict=True)]
        out = rollout(self.backbone, noise, self.conditioning.rows(list(rows)), self.schedule, sampler, on_step=on_step, generators=streams)
        self.spent += sum(out.evaluations)
        return out

    def decode(self, latents):
        return latents.expand(-1, 3, -1, -1)


class Mean:
    """r = the image's mean; counts what it scored."""

    differentiable = True

    def __init__(self) -> None:
        self.scored = 0

    def prepare(self, prompts) -> None:
        pass

    def __call__(self, images, prompts) -> RewardScores:
        self.scored += len(images)
        total = images.mean(dim=(1, 2, 3))
        return RewardScores(total, {"mean": total})


def problem(seeds=(0,), backbone=None, prompts=None) -> NoiseProblem:
    backbone = backbone or Gaussian("flow", spread=0.5)
    prompts = prompts or ["1"] * len(seeds)
    loop = Loop(backbone, prompts, seeds)

    def generate(noise, rows):
        return loop.decode(loop.run(noise, list(rows)).latents)

    return NoiseProblem(seeded_noise((1, 4, 4), seeds, 0), prompts, list(seeds), generate, loop=loop)


# ---- FK steering -------------------------------------------------------------------------------------------------------------


def test_one_particle_without_potential_is_plain_sampling_to_the_bit():
    given = problem((3,))
    seen = []
    FKSteering(Recorder(seen), budget=2, strength=0.0).search(given)
    plain = given.loop.run(seeded_noise((1, 4, 4), [3], 1), [0], DDIM(1.0), None, [1])
    assert torch.equal(seen[1], given.loop.decode(plain.latents))
    assert torch.equal(seen[0], given.generate(given.noise, [0]))


class Recorder(Mean):
    def __init__(self, seen) -> None:
        super().__init__()
        self.seen = seen

    def __call__(self, images, prompts):
        self.seen.append(images.clone())
        return super().__call__(images, prompts)


@pytest.mark.parametrize(("potential", "odds"), [("difference", 2), ("max", 1)])
def test_steering_reaches_the_tilted_distribution(potential, odds):
    """Two modes at -1 and 1 under r = mean and lambda = 1: chances 1 : e^2. Under "max" a particle at -1 has looked like 0 on its way,
    and counts as that: 1 : e.
    """
    backbone, count = TwoModes("flow", spread=0.1), 600
    given = problem((0,), backbone)
    seen = []
    FKSteering(Recorder(seen), budget=count + 1, strength=1.0, potential=potential, every=0.25, start=0.0, stop=1.0).search(given)
    found = torch.cat(seen[-count:]).mean(dim=(1, 2, 3))
    share = (found > 0).float().mean().item()
    assert share == pytest.approx(math.e**odds / (1 + math.e**odds), abs=0.06)
    seen.clear()
    FKSteering(Recorder(seen), budget=count + 1, strength=0.0).search(given)
    assert (torch.cat(seen[-count:]).mean(dim=(1, 2, 3)) > 0).float().mean().item() == pytest.approx(0.5, abs=0.07)


def test_systematic_drawing_is_unbiased_and_close_to_its_expectation():
    logs = torch.tensor([0.1, 0.5, 0.2, 0.2]).log()
    counts = torch.stack([torch.bincount(torch.tensor(systematic(logs, seed, 0)), minlength=4) for seed in range(4000)]).float()
    torch.testing.assert_close(counts.mean(0), torch.tensor([0.4, 2.0, 0.8, 0.8]), atol=0.03, rtol=0)
    assert ((counts - torch.tensor([0.4, 2.0, 0.8, 0.8])).abs() < 1).all()
    assert systematic(torch.tensor([-math.inf, 0.0, -math.inf]), 0, 0) == [1, 1, 1]
    assert systematic(torch.full((3,), -math.inf), 0, 0) == [0, 1, 2]


def test_prompts_keep_their_own_particles():
    given = problem((0, 1), prompts=["1", "-1"])
    out = FKSteering(Mean(), budget=9, strength=5.0).search(given)
    assert out.images[0].mean() > 0.5
    assert out.images[1].mean() < -0.2
    for i, seed in enumerate((0, 1)):
        alone = FKSteering(Mean(), budget=9, strength=5.0).search(problem((seed,), prompts=[["1"], ["-1"]][i]))
        torch.testing.assert_close(alone.images[0], out.images[i])
    assert out.noise is None
    assert [len(totals) for totals in out.trace.rewards["total"]] == [9, 9]


def test_steering_raises_the_reward():
    plain, steered = (FKSteering(Mean(), budget=9, strength=strength) for strength in (0.0, 20.0))
    means = []
    for method in (plain, steered):
        totals = [method.search(problem((k,), Gaussian("flow", spread=1.0))).trace.rewards["total"][0][1:] for k in range(12)]
        means.append(torch.tensor(totals).mean())
    assert means[1] > means[0] + 0.05


def test_steps_of_weighing():
    assert weighings(100, 0.2, 0.8, 0.2) == {19, 39, 59, 79}
    assert weighings(2, 0.2, 0.8, 0.2) == {0}
    assert max(weighings(20, 0.0, 1.0, 0.25)) < 19, "after the last step there is nothing to decide"


# ---- pruning -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [2, 4, 8, 20])
@pytest.mark.parametrize("cuts", [(0.5,), (0.25, 0.5)])
def test_pruning_stays_within_its_budget_and_uses_it(budget, cuts):
    given, reward = problem((0, 1)), Mean()
    method = SeedPruning(reward, budget=budget, cuts=cuts)
    out = method.search(given)
    count, kept = method.plan(4)
    assert given.loop.spent <= 2 * budget * 4
    assert given.loop.spent > 2 * (budget - 1) * 4 - 2 * 4
    assert count >= budget - 1
    assert len(out.trace.rewards["total"][0]) == 1 + kept[max(kept)]
    assert out.trace.settings["candidates"] == count


def test_pruning_keeps_those_that_look_best_on_the_way():
    """The posterior mean only grows sharper here, so whoever leads half-way leads at the end: pruning finds best-of-N's image for less."""
    given = problem((5,))
    method = SeedPruning(Mean(), budget=8)
    out = method.search(given)
    count, _ = method.plan(4)
    noises = torch.cat([given.noise, *(seeded_noise((1, 4, 4), [5], 1 + k) for k in range(count))])
    everyone = given.generate(noises, [0] * (count + 1)).mean(dim=(1, 2, 3))
    assert out.images.mean().item() == pytest.approx(everyone.max().item(), abs=1e-5)
    assert count + 1 > 8


def test_a_model_of_one_step_cannot_be_steered():
    given = problem()
    given.loop.steps = 1
    for method in (FKSteering(Mean()), SeedPruning(Mean())):
        with pytest.raises(ValueError, match="takes one; use best-of-n"):
            method.search(given)
    with pytest.raises(ValueError, match="guidance plugin"):
        FKSteering(Mean()).search(NoiseProblem(given.noise, given.prompts, given.seeds, given.generate))


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (FKSteering, {"budget": 1}, "budget must be an integer of at least 2, got 1"),
        (FKSteering, {"eta": 0.0}, "eta must be a finite number above 0"),
        (FKSteering, {"potential": "sum"}, "potential must be 'difference' or 'max', got 'sum'"),
        (FKSteering, {"start": 0.5, "stop": 0.4}, "stop must be"),
        (SeedPruning, {"cuts": (0.5, 0.25)}, "cuts must be ascending"),
        (SeedPruning, {"cuts": ()}, "cuts must be ascending"),
    ],
)
def test_bad_settings_are_named(cls, settings, words):
    with pytest.raises(ValueError, match=words):
        cls(Mean(), **settings)
