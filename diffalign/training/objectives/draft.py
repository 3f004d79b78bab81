"""Reward back-propagation through a shortened chain, R0's baselines: DRaFT-K, AlignProp and ReFL.

Papers: Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024
(2309.17400). Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward
Backpropagation" (2310.03739). Xu et al., "ImageReward", NeurIPS 2023 (2304.05977).

All three maximise E[ sum_m w_m r_m(decode(x), c) ] by gradient ascent through the sampler, and differ
in what of it has a gradient:

    DRaFT-K      x = x_S, the last K of S steps
    DRaFT-LV     DRaFT-1, and n times more: x = x0^(a sg(x_S) + s xi), (a, s) the last step's level,
                 xi fresh; the mean of all n + 1
    AlignProp    x = x_S, the last K_b steps of sample b, K_b ~ N(mean, std), rounded, in [1, S - 1]
    ReFL         x = x0^ at a random late step, whose input is a constant; -min(r, ceiling) instead of -r

S -> `sampling.steps`;  K -> `last`;  n -> `renoised`;  r_m, w_m -> `climb`;  sg: no gradient.

Unlike the papers: K_b and ReFL's step are drawn for each sample, from its seed, so that a batch equals
its samples alone; DRaFT-LV takes the mean where the paper sums, so that n does not change the step.
ReFL's pre-training loss on images is left out: a prompt batch has none. None of the three has a
regulariser. What becomes of the images is for the watched rewards to say, and for the distance of the
last prediction from the reference's, which all of them report as `departure`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning
from diffalign.diffusion import Schedule
from diffalign.loop import LoopState
from diffalign.rewards.gradients import with_gradient
from diffalign.training import chain
from diffalign.training.chain import Paused, SeededDDIM
from diffalign.training.climbing import Climb, Slope, slope
from diffalign.training.contract import Denoiser, PromptBatch

Loss = tuple[Float[Tensor, ""], dict[str, float]]


@dataclass(frozen=True)
class Sampling:
    """How images are made."""

    steps: int = 50
    """S >= 1. Papers: 50, ReFL 40."""
    guidance_scale: float = 7.5
    """w of classifier-free guidance; up to 1 it takes one evaluation a step. Papers: 7.5, AlignProp 5."""
    eta: float = 0.0
    """DDIM's, in [0, 1]. Papers: 0, AlignProp 1."""
    checkpoint: bool = True
    """Recompute the network in the backward pass. Papers: yes."""

    def __post_init__(self) -> None:
        chain.check_steps(self.steps, None)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def schedule(self, policy: Denoiser, conditioning: Conditioning) -> Schedule:
        """The levels of the stock schedule."""
        return policy.backbone.schedule(self.steps, size=conditioning.size)

    def pause(self, policy: Denoiser, batch: PromptBatch, stops: list[int]) -> Paused:
        """The run up to where gradients begin."""
        sampler = SeededDDIM(batch.seeds, self.eta)
        return chain.pause(policy, batch, self.schedule(policy, batch.conditioning), sampler, stops, self.guidance_scale)

    def finish(self, policy: Denoiser, batch: Paused, cuts: list[int] | None = None) -> LoopState:
        """The last step of a run that goes on with gradient."""
        schedule, sampler = self.schedule(policy, batch.conditioning), SeededDDIM(batch.seeds, self.eta)
        return chain.finish(policy, batch, schedule, sampler, self.guidance_scale, cuts=cuts, checkpoint=self.checkpoint)

    def predict_x0(self, denoiser: Denoiser, batch: Paused, x: Tensor, steps: list[int]) -> Float[Tensor, "b ..."]:
        """One evaluation at x, each sample at its step."""
        schedule = self.schedule(denoiser, batch.conditioning)
        return chain.predict_x0(denoiser, x, steps, schedule, batch.conditioning, self.guidance_scale, checkpoint=self.checkpoint)

    def figures(self, reference: Denoiser, batch: Paused, rewards: Slope, x0: Tensor, before: Tensor, steps: list[int]) -> dict[str, float]:
        """What the rewards were, and how far x0 lies from what the reference predicts for the same input."""
        with torch.no_grad():
            distance = chain.departure(x0, self.predict_x0(reference, batch, before, steps)).mean().item()
        return {"reward": rewards.total.mean().item(), **rewards.figures, "departure": distance}


def _climbed(x: Float[Tensor, "b ..."], rewards: Slope) -> Float[Tensor, " b"]:
    return with_gradient(rewards.total, x, rewards.direction)


@dataclass(frozen=True, eq=False)
class DRaFT:
    """DRaFT(climb, last=1, ...)."""

    name: ClassVar[str] = "draft"

    climb: Climb
    """r_m and w_m, and what is watched. Papers: one reward, or a weighted sum."""
    _: KW_ONLY
    sampling: Sampling = Sampling()
    """S, guidance and eta."""
    last: int = 1
    """K in 1 ... S. Paper: 1; with K = S it is called DRaFT."""
    renoised: int = 0
    """n >= 0: the low-variance form, for last = 1. Paper: 2 for DRaFT-LV."""

    def __post_init__(self) -> None:
        if not 1 <= self.last <= self.sampling.steps:
            raise ValueError(f"last must lie in 1..{self.sampling.steps}, the steps, got {self.last}")
        if self.renoised < 0 or (self.renoised and self.last != 1):
            raise ValueError(f"renoised must be at least 0, and above 0 only where last is 1; got {self.renoised} with last={self.last}")

    @classmethod
    def low_variance(cls, climb: Climb, sampling: Sampling = Sampling()) -> DRaFT:
        """DRaFT-LV as published."""
        return cls(climb, sampling=sampling, last=1, renoised=2)

    def settings(self) -> dict[str, Any]:
        """As plain JSON data."""
        return chain.plain_settings(self)

    def collect(self, policy: Denoiser, batch: PromptBatch, generator: torch.Generator) -> Paused:
        """All steps but the last K."""
        return self.sampling.pause(policy, batch, [self.sampling.schedule(policy, batch.conditioning).steps - self.last] * len(batch))

    def loss(self, policy: Denoiser, reference: Denoiser, batch: Paused, generator: torch.Generator) -> Loss:
        """Minus the mean reward."""
        state = self.sampling.finish(policy, batch)
        steps = [state.index] * len(batch)
        rewards = slope(self.climb, policy.backbone, state.x, batch.conditioning)
        totals = [_climbed(state.x, rewards)]
        for draw in range(self.renoised):
            fresh = chain.normal_like(state.x, chain.streams(batch.seeds, chain.LOW_VARIANCE, draw))
            again = self.sampling.schedule(policy, batch.conditioning).add_noise(state.index, state.x.detach(), fresh)
            x0 = self.sampling.predict_x0(policy, batch, again, steps)
            totals.append(_climbed(x0, slope(self.climb, policy.backbone, x0, batch.conditioning)))
        return -torch.stack(totals).mean(), self.sampling.figures(reference, batch, rewards, state.x0.detach(), state.before, steps)


@dataclass(frozen=True, eq=False)
class AlignProp:
    """AlignProp(climb, mean_depth=8, ...)."""

    name: ClassVar[str] = "alignprop"

    climb: Climb
    """r_m and w_m, and what is watched. Papers: one reward, or a weighted sum."""
    _: KW_ONLY
    sampling: Sampling = Sampling(guidance_scale=5.0, eta=1.0)
    """S, guidance and eta."""
    mean_depth: float = 8.0
    """Mean of K_b before it is cut, > 0. Paper's code: 8 of 50."""
    depth_std: float = 5.0
    """Its standard deviation, >= 0. Paper's code: 5."""

    def __post_init__(self) -> None:
        for name in ("mean_depth", "depth_std"):
            chain.check_at_least_zero(name, getattr(self, name))

    def settings(self) -> dict[str, Any]:
        """As plain JSON data."""
        return chain.plain_settings(self)

    def cuts(self, seeds: tuple[int, ...], steps: int) -> list[int]:
        """The first step of each sample that has a gradient."""
        drawn = [torch.randn(1, generator=stream).item() for stream in chain.streams(seeds, chain.STEP)]
        return [steps - min(max(round(self.mean_depth + self.depth_std * z), 1), max(steps - 1, 1)) for z in drawn]

    def collect(self, policy: Denoiser, batch: PromptBatch, generator: torch.Generator) -> Paused:
        """The steps that have a gradient in no sample."""
        cuts = self.cuts(batch.seeds, self.sampling.schedule(policy, batch.conditioning).steps)
        return self.sampling.pause(policy, batch, [min(cuts)] * len(batch))

    def loss(self, policy: Denoiser, reference: Denoiser, batch: Paused, generator: torch.Generator) -> Loss:
        """Minus the mean reward."""
        cuts = self.cuts(batch.seeds, self.sampling.schedule(policy, batch.conditioning).steps)
        state = self.sampling.finish(policy, batch, cuts)
        rewards = slope(self.climb, policy.backbone, state.x, batch.conditioning)
        figures = self.sampling.figures(reference, batch, rewards, state.x0.detach(), state.before, [state.index] * len(batch))
        return -_climbed(state.x, rewards).mean(), figures


@dataclass(frozen=True, eq=False)
class ReFL:
    """ReFL(climb, earliest=30, ...)."""

    name: ClassVar[str] = "refl"

    climb: Climb
    """r_m and w_m, and what is watched. Papers: one reward, or a weighted sum."""
    _: KW_ONLY
    sampling: Sampling = Sampling(steps=40)
    """S, guidance and eta."""
    earliest: int = 30
    """The steps earliest ... S - 1, counted from 0, are drawn from, alike. Paper: 30 of 40."""
    ceiling: float | None = None
    """Rewards above this pull no more; None: no limit. Paper's code: 2, for ImageReward."""

    def __post_init__(self) -> None:
        if not 0 <= self.earliest < self.sampling.steps:
            raise ValueError(f"earliest must lie in 0..{self.sampling.steps - 1}, for {self.sampling.steps} steps; got {self.earliest}")

    @classmethod
    def paper(cls, climb: Climb) -> ReFL:
        """With ImageReward's ceiling."""
        return cls(climb, ceiling=2.0)

    def settings(self) -> dict[str, Any]:
        """As plain JSON data."""
        return chain.plain_settings(self)

    def stops(self, seeds: tuple[int, ...], steps: int) -> list[int]:
        """The step of each sample, from its seed."""
        return chain.random_steps(seeds, self.earliest, steps)

    def collect(self, policy: Denoiser, batch: PromptBatch, generator: torch.Generator) -> Paused:
        """The steps before the drawn ones."""
        return self.sampling.pause(policy, batch, self.stops(batch.seeds, self.sampling.schedule(policy, batch.conditioning).steps))

    def loss(self, policy: Denoiser, reference: Denoiser, batch: Paused, generator: torch.Generator) -> Loss:
        """Minus the mean reward, cut at the ceiling."""
        steps = list(batch.steps)
        x0 = self.sampling.predict_x0(policy, batch, batch.state, steps)
        rewards = slope(self.climb, policy.backbone, x0, batch.conditioning)
        total = _climbed(x0, rewards)
        figures = self.sampling.figures(reference, batch, rewards, x0.detach(), batch.state, steps)
        return -(total if self.ceiling is None else total.clamp_max(self.ceiling)).mean(), figures
