"""Guide: while the image is denoised, the gradient of a reward or a loss on its prediction pulls the trajectory along.

Source: x0-prediction guidance, as in Bansal et al., "Universal Guidance for Diffusion Models", 2023 (2302.07121), forward guidance, and
Yu et al., "FreeDoM", 2023 (2303.09833); here without back-propagation through the network, so a step costs a decoder's backward pass.

    g = d r(decode(x0)) / d x0 / its norm,   Delta = rho s sqrt(d) g,   x' = a' (x0 + Delta) + s' eps

x0, eps -> what step i predicts;  (a', s') -> the next level;  s -> the noise of step i, so that late steps move little;  d -> entries of a
sample;  rho -> `strength`;  steps that pull -> `start` ... `stop`, shares of the schedule, of which every `every`-th, by as much more.

Any differentiable reward will do, or any function of (images, prompts): `Guide.by(function)`. The gradient is normalised, so the scale
of the reward does not matter and `strength` is a length: the share of the latents' radius by which a pull at full noise moves x0.

The plain image of the given noise is made too, counted, and returned where it scores better; `budget` beyond two tries further noises.
With a budget of one the guided image is all that is made, which costs least, and there is no plain one to compare it with.

A reward that was trained on finished images judges the blurs of early steps badly; `ranges` are rewards for them (methods/experts.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.loop import LoopState
from diffalign.methods.checks import check_integer, check_number, no_gradient
from diffalign.methods.particles import noise_share, record, require_loop
from diffalign.methods.tracking import Tracker
from diffalign.noise import sample_norm, seeded_noise, spread
from diffalign.types import NoiseProblem, NoiseResult, RangedReward, Reward, RewardScores

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Guide:
    """Guide(reward, budget=2). Raises TypeError for a reward that has no gradient."""

    name: ClassVar[str] = "guide"

    reward: Reward
    """r, whose gradient pulls."""
    _: KW_ONLY
    budget: int = 2
    """Whole generations of each sample, >= 1: one plain, the others guided, from the given noise and from drawn ones; 1: guided alone."""
    strength: float = 0.05
    """rho >= 0: how far a pull at full noise moves the prediction, as a share of the radius of unit noise."""
    start: float = 0.0
    """In [0, 1): the share of steps before the first pull."""
    stop: float = 0.8
    """In (start, 1]: the share of steps after which nothing pulls."""
    every: int = 1
    """>= 1: so many steps from one pull to the next, each pull so many times as long: fewer gradients, the same way."""
    ranges: RangedReward | None = None
    """Who pulls at which level of noise; None: `reward` at all of them. The finished image is always `reward`'s to judge."""

    def __post_init__(self) -> None:
        if not self.reward.differentiable:
            raise TypeError(f"{no_gradient(self.reward)}, which Guide follows; use FKSteering, which needs none.")
        check_integer("budget", self.budget, 1)
        check_integer("every", self.every, 1)
        check_number("strength", self.strength, 0.0)
        check_number("start", self.start, 0.0, math.nextafter(1.0, 0.0))
        check_number("stop", self.stop, self.start, 1.0, above=True)

    @classmethod
    def by(cls, function: Callable[[Tensor, Sequence[str]], Tensor], **settings: float | int) -> Guide:
        """Guided by function(images, prompts), one number a sample, higher is better: minus a loss, say."""
        return cls(FunctionReward(function), **settings)

    @torch.no_grad()
    def search(self, problem: NoiseProblem) -> NoiseResult:
        """Raises ValueError for a one-step model. A sample whose gradient is not finite or zero is not pulled at that step."""
        loop = require_loop(problem, self.name)
        tracker = Tracker(problem)
        self.reward.prepare(problem.prompts)
        b, given = len(problem.noise), problem.noise.detach().float()
        if self.budget > 1:
            record(tracker, problem, self.reward, given, problem.generate(given, range(b)), range(b))
        first, last = round(self.start * loop.steps), max(round(self.stop * loop.steps), 1)

        def pull(state: LoopState) -> LoopState | None:
            if not first <= state.index < last or (state.index - first) % self.every:
                return None
            reward = self.reward if self.ranges is None else self.ranges.at(noise_share(loop.schedule, state.index))
            tracker.charge(range(b), backward_passes=1, reward_calls=1)
            length = self.strength * self.every * loop.schedule.noise[state.index]
            shift = length * direction(reward, state.x0, loop.decode, problem.prompts)
            return replace(state, x=state.x + loop.schedule.signal[state.index + 1] * shift, x0=state.x0 + shift)

        for k in range(max(1, self.budget - 1)):
            noise = given if k == 0 else seeded_noise(given.shape[1:], problem.seeds, k, given.device)
            if self.strength == 0:  # switched off, it is the pipeline's own loop, whatever its scheduler
                images = problem.generate(noise, range(b))
            else:
                images = loop.decode(loop.run(noise, range(b), on_step=pull).latents)
            record(tracker, problem, self.reward, noise, images, range(b))
        return replace(tracker.result(self), noise=None)


def direction(
    reward: Reward, x0: Float[Tensor, "b ..."], decode: Callable[[Tensor], Tensor], prompts: Sequence[str]
) -> Float[Tensor, "b ..."]:
    """The reward's gradient at the predicted images, every sample's as long as unit noise; 0 where it is not finite or there is none."""
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(decode(x0), prompts).total.float().sum(), x0)
    norm = sample_norm(gradient)
    known = norm.isfinite() & (norm > 0)
    length = torch.where(known, math.sqrt(gradient[0].numel()) / norm, torch.zeros_like(norm))
    return torch.where(spread(known, gradient), spread(length, gradient) * gradient, torch.zeros_like(gradient))


class FunctionReward:
    """A plain function of images and prompts, as a Reward."""

    differentiable = True

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Tensor]) -> None:
        self.function, self.name = function, getattr(function, "__name__", "function")

    def prepare(self, prompts: Sequence[str]) -> None:
        """Nothing of a prompt is kept."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardScores:
        total = self.function(images, prompts)
        return RewardScores(total, {self.name: total})
