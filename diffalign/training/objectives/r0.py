"""R0, later named Reward-Instruct: rewards alone make a few-step generator of a many-step model.

Paper: Luo et al., "Reward-Instruct: A Reward-Centric Approach to Fast Photo-Realistic Image Generation"
(2503.13070, first named R0). No code was published.

    R0     max E[ sum_m w_m r_m(decode(x0^_S), c) ] + guidance reward - lambda ||theta - theta_0||^2
    R0+    the same of x0^_i at a random step i of the chain, the steps before it without gradient

over the chain of training/chain.py with a random eta at each step. Gradients are divided by their norms
before they are summed:

    G = unit( J' sum_m w_m g_m / |g_m| ) + w_g unit(g_c),    unit(v) = v / |v|
    g_m = grad of r_m with respect to the image,    J = the decoder's Jacobian
    g_c = x0_ref(x_t, c) - x0_ref(x_t, nothing),    x_t = a_t x0^ + s_t xi,  t and xi random
    loss = -<sg(G), x0^> + lambda ||theta - theta_0||^2 + kappa ||x0^ - x0_ref^||^2 / (2 sqrt(d))

g_c is the gradient of log p(c | x_t), what classifier-free guidance follows, of the frozen reference and
in units of x0; sg: no gradient; d: entries of a sample's latents.

S -> `steps`;  r_m, w_m and the rule for g_m -> `climb`;  w_g -> `guidance_reward`;  lambda ->
`weight_penalty`;  ||theta - theta_0||^2 -> `weight_distance`;  kappa -> `anchor`;  eta ~ U(`eta_low`,
`eta_high`);  x0_ref^ -> what the reference predicts for the same input.

What the sources leave open is decided here so. eta is uniform in [0, 1], drawn for each sample and step.
Norms are each sample's own. After the decoder the rewards together have norm 1, so that the penalties
mean the same whatever the rewards' scale and the latents' size; g_c has norm 1 likewise, which leaves no
weight w(t) to choose. R0 back-propagates the whole chain. `anchor` is ours, a distance of outputs, which
needs nothing but the reference; without it that distance is still a figure, `departure`.

Left out: the high-resolution term, whose formula is not known, and the Langevin noise on the weights of
the paper's second version, which is a matter of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning
from diffalign.diffusion import Schedule, add_noise, to_x0
from diffalign.noise import sample_dot
from diffalign.rewards.gradients import EqualRMS, with_gradient
from diffalign.training import chain
from diffalign.training.chain import Paused, RandomEta
from diffalign.training.climbing import Climb, as_numbers, slope, unit
from diffalign.training.contract import Denoiser, PromptBatch, ScoreImages


def guidance_direction(
    reference: Denoiser, x0: Float[Tensor, "b ..."], conditioning: Conditioning, seeds: tuple[int, ...], generator: torch.Generator
) -> Float[Tensor, "b ..."]:
    """g_c above, without gradient: two evaluations of the reference. Draws from the seeds and one number of `generator`.

    ValueError where the unconditional branch was not encoded.
    """
    draw = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    own = chain.streams(seeds, chain.GUIDANCE, draw)
    backbone, network = reference.backbone, reference.as_backbone()
    times = torch.cat([backbone.draw_timesteps(1, each) for each in own])
    signal, noise = backbone.levels(times)
    with torch.no_grad():
        x = add_noise(x0.detach(), chain.normal_like(x0, own), signal, noise)
        with_prompt, without = (
            to_x0(x, network.predict(x, times, texts, conditioning), signal, noise, backbone.prediction)
            for texts in (conditioning.conditional(), conditioning.unconditional())
        )
    return with_prompt - without


@dataclass(frozen=True, eq=False)
class R0:
    """R0(climb, steps=4, ...): the reward of the last prediction, with gradient through the whole chain."""

    name: ClassVar[str] = "r0"

    climb: Climb
    """r_m, w_m, what is watched, and the rule for the image gradients. Paper: HPSv2.1, ImageReward and CLIP under EqualRMS()."""
    _: KW_ONLY
    steps: int = 4
    """S >= 1, evaluations of the network for an image. Paper: 4."""
    timesteps: tuple[float, ...] | None = None
    """The network's times instead of the stock schedule's, descending, `steps` of them. Paper: not known."""
    eta_low: float = 0.0
    """Least eta, in [0, 1]. Paper: random, its law not known."""
    eta_high: float = 1.0
    """Greatest eta, in [eta_low, 1]."""
    guidance_scale: float = 1.0
    """w of classifier-free guidance in the chain; up to 1 it takes one evaluation a step. Paper: none."""
    normalize: bool = True
    """Scale the rewards' direction and g_c to norm 1, sample by sample. Paper: yes. No: both as they are."""
    guidance_reward: float = 0.5
    """w_g >= 0; 0 saves the two evaluations of the reference. Paper: used, its weight not known."""
    weight_penalty: float = 0.0
    """lambda >= 0. Paper: used, value not known."""
    weight_distance: Callable[[], Float[Tensor, ""]] | None = None
    """||theta - theta_0||^2 of the policy, with gradient; needed where weight_penalty is above 0."""
    anchor: float = 0.1
    """kappa >= 0: at an RMS distance of 1 from the reference's output its pull is kappa, where the rewards' is 1. Paper: none.
    It is one step's distance: that earlier steps moved what this one starts from, it does not see.
    """
    checkpoint: bool = False
    """Recompute the network in the backward pass: memory of one step instead of S, for a third more time."""

    def __post_init__(self) -> None:
        chain.check_steps(self.steps, self.timesteps)
        if not 0 <= self.eta_low <= self.eta_high <= 1:
            raise ValueError(f"eta_low and eta_high must satisfy 0 <= low <= high <= 1, got {self.eta_low} and {self.eta_high}")
        for name in ("guidance_reward", "weight_penalty", "anchor"):
            chain.check_at_least_zero(name, getattr(self, name))
        if self.weight_penalty > 0 and self.weight_distance is None:
            raise ValueError(f"weight_penalty={self.weight_penalty} needs weight_distance, a function that returns the distance; give it")

    @classmethod
    def paper(
        cls, rewards: Mapping[str, ScoreImages], weight_distance: Callable[[], Float[Tensor, ""]], weight_penalty: float, **more: Any
    ) -> R0:
        """As far as it is known: four steps, equal norms, lambda to be chosen. w_g = 1 is our reading."""
        return cls(Climb(rewards, rule=EqualRMS()), weight_distance=weight_distance, weight_penalty=weight_penalty, anchor=0.0,
                   guidance_reward=1.0, **more)  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """As plain JSON data."""
        return chain.plain_settings(self)

    def schedule(self, policy: Denoiser, conditioning: Conditioning) -> Schedule:
        """The chain's levels."""
        return chain.levels_of(policy.backbone, self.steps, self.timesteps, conditioning.size)

    def sampler(self, seeds: tuple[int, ...]) -> RandomEta:
        """The chain's steps."""
        return RandomEta(seeds, self.eta_low, self.eta_high)

    def stops(self, seeds: tuple[int, ...], steps: int) -> list[int]:
        """The step before which `collect` leaves each sample."""
        return [0] * len(seeds)

    def collect(self, policy: Denoiser, batch: PromptBatch, generator: torch.Generator) -> Paused:
        """Noise, and the chain up to where gradients begin. All draws come from the batch's seeds."""
        schedule = self.schedule(policy, batch.conditioning)
        stops = self.stops(batch.seeds, schedule.steps)
        return chain.pause(policy, batch, schedule, self.sampler(batch.seeds), stops, self.guidance_scale)

    def predict(self, policy: Denoiser, batch: Paused, schedule: Schedule) -> tuple[Tensor, Tensor, list[int]]:
        """x0^ with gradient, the input that it was predicted from, and each sample's step."""
        state = chain.finish(policy, batch, schedule, self.sampler(batch.seeds), self.guidance_scale, checkpoint=self.checkpoint)
        return state.x0, state.before, [state.index] * len(batch)

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: Paused, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Minus the mean reward, plus the penalties; the guidance reward has a gradient and no value."""
        schedule = self.schedule(policy, batch.conditioning)
        x0, before, steps = self.predict(policy, batch, schedule)
        rewards = slope(self.climb, policy.backbone, x0, batch.conditioning)
        with torch.no_grad():
            expected = chain.predict_x0(reference, before.detach(), steps, schedule, batch.conditioning, self.guidance_scale)
        figures = {"departure": chain.departure(x0.detach(), expected).mean()}
        direction = unit(rewards.direction) if self.normalize else rewards.direction
        if self.guidance_reward > 0:
            pull = guidance_direction(reference, x0, batch.conditioning, batch.seeds, generator)
            figures["guidance_cosine"] = sample_dot(unit(rewards.direction), unit(pull)).mean()
            direction = direction + self.guidance_reward * (unit(pull) if self.normalize else pull)
        loss = -with_gradient(rewards.total, x0, direction).mean()
        if self.anchor > 0:
            loss = loss + self.anchor * chain.anchor(x0, expected).mean()
        if self.weight_penalty > 0 and self.weight_distance is not None:
            distance = self.weight_distance()
            figures["weight_distance"] = distance
            loss = loss + self.weight_penalty * distance
        return loss, {"reward": rewards.total.mean().item(), **rewards.figures, **as_numbers(figures)}


@dataclass(frozen=True, eq=False)
class R0Plus(R0):
    """R0's reward at a random step of each sample's chain: one evaluation of the network has a gradient, whatever S is."""

    name: ClassVar[str] = "r0+"

    def stops(self, seeds: tuple[int, ...], steps: int) -> list[int]:
        """Any of the steps, alike, from each sample's seed."""
        return chain.random_steps(seeds, 0, steps)

    def predict(self, policy: Denoiser, batch: Paused, schedule: Schedule) -> tuple[Tensor, Tensor, list[int]]:
        """One evaluation, each sample at the step where it was left."""
        steps = list(batch.steps)
        x0 = chain.predict_x0(policy, batch.state, steps, schedule, batch.conditioning, self.guidance_scale, checkpoint=self.checkpoint)
        return x0, batch.state, steps
