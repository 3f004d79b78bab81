"""Particles: several trajectories of one prompt are denoised side by side, and what the reward sees on the way decides who goes on.

FK steering: Singhal et al., "A General Framework for Inference-time Scaling and Steering of Diffusion Models", 2025 (2501.06848).
Sequential Monte Carlo towards p(x0) exp(lambda r(x0)): K particles; at some steps each is weighted by a potential and K are drawn again.

    difference  G_t = exp(lambda (r_t - r_before)):  all together exp(lambda r_last), so the tilted distribution is what is reached
    max         G_t = exp(lambda (max_{s <= t} r_s - max_{s < t} r_s)):  favours whoever ever looked good
    r_t = r(decode(x0 predicted at step t)),  before the first weighing 0;  drawing is systematic, hence unbiased

lambda -> `strength`;  K -> `budget` less one;  steps of weighing -> `start`, `stop`, `every`, shares of the schedule;  eta -> `eta`.
Our max telescopes too; the paper's exp(lambda max r) counts an early maximum at every weighing again.

Seed pruning: of N trajectories those that score worst on the way are dropped, half at each of `cuts`, and the best of the rest is
returned; successive halving, here with DDIM, so that what is kept is what it would have been. A trajectory is paid for as far as it went.

Both need the inside of the loop, hence a model of several steps and a scheduler whose levels are known. They sample with DDIM(eta) along
the pipeline's own schedule, so no initial noise makes their images again under another scheduler, and `out.noise` is None. The given
noise is always made in full by the pipeline itself and competes with the rest, so that the start is known.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import DDIM, Schedule
from diffalign.loop import DenoisingLoop, LoopState
from diffalign.methods.checks import check_integer, check_number
from diffalign.methods.tracking import Tracker
from diffalign.noise import seeded_noise
from diffalign.types import NoiseProblem, NoiseResult, RangedReward, Reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FKSteering:
    """FKSteering(reward, budget=5)."""

    name: ClassVar[str] = "fk"

    reward: Reward
    """r. It needs no gradient."""
    _: KW_ONLY
    budget: int = 5
    """Whole generations of each sample, >= 2: the given noise, and K = budget - 1 particles. Paper: K = 4."""
    strength: float = 10.0
    """lambda >= 0, in units of 1 / reward; 0 never prefers a particle. Paper: 10 for ImageReward."""
    potential: Literal["difference", "max"] = "difference"
    """How a score becomes a weight. Paper: max, and difference does about as well."""
    every: float = 0.2
    """In (0, 1]: the share of steps between two weighings. Paper: 20 of 100."""
    start: float = 0.2
    """In [0, 1): the share of steps before the first. Paper: 20 of 100."""
    stop: float = 0.8
    """In (start, 1]: the share of steps after which nobody is weighed. Paper: 80 of 100."""
    eta: float = 1.0
    """Of DDIM, in (0, 1]: without noise at the steps, copies would stay copies. Paper: 1."""
    ranges: RangedReward | None = None
    """Who scores predictions at which level of noise (methods/experts.py); None: `reward` at all of them. Paper: none."""

    def __post_init__(self) -> None:
        check_integer("budget", self.budget, 2)
        check_number("strength", self.strength, 0.0)
        check_number("every", self.every, 0.0, 1.0, above=True)
        check_number("start", self.start, 0.0, math.nextafter(1.0, 0.0))
        check_number("stop", self.stop, self.start, 1.0, above=True)
        check_number("eta", self.eta, 0.0, 1.0, above=True)
        if self.potential not in ("difference", "max"):
            raise ValueError(f"potential must be 'difference' or 'max', got {self.potential!r}.")

    @torch.no_grad()
    def search(self, problem: NoiseProblem) -> NoiseResult:
        """Raises ValueError for a one-step model. A score that is not finite weighs nothing."""
        loop = require_loop(problem, self.name)
        tracker = Tracker(problem)
        self.reward.prepare(problem.prompts)
        b, count = len(problem.noise), self.budget - 1
        given = problem.noise.detach().float()
        record(tracker, problem, self.reward, given, problem.generate(given, range(b)), range(b))
        samples = [i for i in range(b) for _ in range(count)]
        noise = particles(problem, count)
        last, best = torch.zeros(b * count), torch.full((b * count,), -math.inf)
        weighed = weighings(loop.steps, self.start, self.stop, self.every)

        def weigh(state: LoopState) -> LoopState | None:
            nonlocal last, best
            if state.index not in weighed or self.strength == 0:
                return None
            held = [samples[row] for row in state.rows]
            scores = predicted_scores(state, loop, self.reward, self.ranges, [problem.prompts[i] for i in held])
            tracker.charge(held, reward_calls=1)
            if self.potential == "difference":
                logs = self.strength * (scores - last)
            else:
                logs = self.strength * (torch.maximum(best, scores) - torch.where(best.isfinite(), best, torch.zeros_like(best)))
            last, best = scores, torch.maximum(best, scores)
            chosen = [i * count + j for i in range(b) for j in systematic(logs[i * count : (i + 1) * count], problem.seeds[i], state.index)]
            last, best = last[chosen], best[chosen]
            return state.take(chosen)

        draws = [1 + k for _ in range(b) for k in range(count)]
        out = loop.run(noise, samples, DDIM(self.eta), weigh, draws)
        images = loop.decode(out.latents)
        for k in range(count):
            part = [i * count + k for i in range(b)]
            record(tracker, problem, self.reward, noise[part], images[part], range(b))
        return replace(tracker.result(self), noise=None)


@dataclass(frozen=True, eq=False)
class SeedPruning:
    """SeedPruning(reward, budget=8)."""

    name: ClassVar[str] = "prune"

    reward: Reward
    """r. It needs no gradient."""
    _: KW_ONLY
    budget: int = 8
    """What may be spent on each sample, in whole generations, >= 2; how many trajectories that begins is `candidates`."""
    cuts: tuple[float, ...] = (0.25, 0.5)
    """Shares of the steps, ascending in (0, 1), after which the worse half is dropped."""
    ranges: RangedReward | None = None
    """Who scores predictions at which level of noise (methods/experts.py); None: `reward` at all of them."""

    def __post_init__(self) -> None:
        check_integer("budget", self.budget, 2)
        for cut in self.cuts:
            check_number("cuts", cut, 0.0, math.nextafter(1.0, 0.0), above=True)
        if not self.cuts or list(self.cuts) != sorted(set(self.cuts)):
            raise ValueError(f"cuts must be ascending shares of the steps, got {self.cuts!r}.")

    def plan(self, steps: int) -> tuple[int, dict[int, int]]:
        """(N, after which step how many go on): the most trajectories whose cost, the given one's included, stays within the budget."""
        marks = sorted({min(max(round(cut * steps), 1), steps - 1) - 1 for cut in self.cuts}) if steps > 1 else []

        def costs(count: int) -> tuple[int, dict[int, int]]:
            alive, spent, before, kept = count, 0, -1, {}
            for mark in marks:
                spent += alive * (mark - before)
                alive, before = max(1, math.ceil(alive / 2)), mark
                kept[mark] = alive
            return spent + alive * (steps - 1 - before), kept

        count = 1
        while costs(count + 1)[0] <= (self.budget - 1) * steps:
            count += 1
        return count, costs(count)[1]

    @torch.no_grad()
    def search(self, problem: NoiseProblem) -> NoiseResult:
        """Raises ValueError for a one-step model. A score that is not finite counts as the worst."""
        loop = require_loop(problem, self.name)
        tracker = Tracker(problem)
        self.reward.prepare(problem.prompts)
        b, given = len(problem.noise), problem.noise.detach().float()
        record(tracker, problem, self.reward, given, problem.generate(given, range(b)), range(b))
        count, kept = self.plan(loop.steps)
        samples = [i for i in range(b) for _ in range(count)]
        noise = particles(problem, count)

        def prune(state: LoopState) -> LoopState | None:
            if state.index not in kept:
                return None
            held = [samples[row] for row in state.rows]
            scores = predicted_scores(state, loop, self.reward, self.ranges, [problem.prompts[i] for i in held])
            tracker.charge(held, reward_calls=1)
            alive = len(state.rows) // b
            best = scores.view(b, alive).argsort(dim=1, descending=True, stable=True)[:, : kept[state.index]].sort(dim=1).values
            return state.take([i * alive + int(j) for i in range(b) for j in best[i]])

        out = loop.run(noise, samples, DDIM(), prune)
        whole = max(out.evaluations)  # of the network: what a trajectory costs that was not dropped
        for sample, spent in zip(samples, out.evaluations, strict=True):
            tracker.charge([sample], evaluations=spent / whole)
        alive = len(out.rows) // b
        for k in range(alive):
            part = [i * alive + k for i in range(b)]
            record(tracker, problem, self.reward, noise[[out.rows[j] for j in part]], loop.decode(out.latents[part]), range(b), 0.0)
        return replace(tracker.result(self, candidates=count), noise=None)


# ---- shared ------------------------------------------------------------------------------------------------------------------


def require_loop(problem: NoiseProblem, name: str) -> DenoisingLoop:
    """The problem's loop. ValueError where there is nothing to steer."""
    if problem.loop is None or problem.loop.steps < 2:
        reason = "this call has none that can be steered (a guidance plugin holds it)" if problem.loop is None else "this model takes one"
        raise ValueError(f"{name} steers a denoising loop of several steps, and {reason}; use best-of-n, find or reno")
    return problem.loop


def particles(problem: NoiseProblem, count: int) -> Float[Tensor, "k ..."]:
    """`count` noises of every sample, side by side; those that best-of-N would draw after the given one."""
    given = problem.noise
    drawn = torch.stack([seeded_noise(given.shape[1:], problem.seeds, 1 + k, given.device) for k in range(count)], dim=1)
    return drawn.flatten(0, 1)


def record(
    tracker: Tracker, problem: NoiseProblem, reward: Reward, noise: Tensor, images: Tensor, rows: Sequence[int], evaluations: float = 1.0
) -> None:
    """Scores finished images and enters them; evaluations: what each has cost, unless it was charged before."""
    tracker.record(list(rows), noise, images, reward(images, [problem.prompts[row] for row in rows]), evaluations=evaluations)


def noise_share(schedule: Schedule, step: int) -> float:
    """s / sqrt(a^2 + s^2) in [0, 1]: how much of what step `step` started from is noise."""
    return schedule.noise[step] / math.hypot(schedule.signal[step], schedule.noise[step])


def predicted_scores(
    state: LoopState, loop: DenoisingLoop, reward: Reward, ranges: RangedReward | None, prompts: list[str]
) -> Float[Tensor, " k"]:
    """What the reward, or the one of `ranges` for that noise, makes of each row's predicted image, on the host; -inf where not finite."""
    reward = reward if ranges is None else ranges.at(noise_share(loop.schedule, state.index))
    scores = reward(loop.decode(state.x0), prompts).total.float().cpu()
    return torch.where(scores.isfinite(), scores, torch.full_like(scores, -math.inf))


def weighings(steps: int, start: float, stop: float, every: float) -> set[int]:
    """After which steps particles are weighed."""
    between = max(1, round(every * steps))
    return set(range(max(1, round(start * steps)) - 1, min(round(stop * steps), steps - 1), between))


def systematic(logs: Float[Tensor, " k"], seed: int, step: int) -> list[int]:
    """K indices drawn with chances proportional to exp(logs), each floor or ceil of its expected number of times. From (seed, step)."""
    logs = torch.where(logs.isfinite(), logs, torch.full_like(logs, -math.inf))
    if not logs.isfinite().any() or bool((logs == logs[0]).all()):
        return list(range(len(logs)))
    chances = logs.double().softmax(0).cumsum(0)
    offset = seeded_noise((), [seed], 10_000_019 + step).double()
    first = 0.5 * (1 + torch.erf(offset / math.sqrt(2)))  # uniform in (0, 1)
    points = (first + torch.arange(len(logs), dtype=torch.float64)) / len(logs)
    return torch.searchsorted(chances / chances[-1], points).clamp_max(len(logs) - 1).tolist()
