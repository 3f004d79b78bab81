"""D3PO: of two images of a prompt one is preferred; make each step that led to it likelier than the same step of the other.

Paper: Yang et al., "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
CVPR 2024 (2311.13231), eq. 14.

    loss = mean over pairs and steps of  - ln sigmoid(beta (ln R_w - ln R_l)),   R = clamp(p_now / p_reference, 1 - eps, 1 + eps)

w, l: the preferred image and the other one -> `Judged.winners`, `losers`;  ln p_now - ln
p_reference -> l_i of rollouts.py; beta -> `beta`;  eps -> `clip`;  p_reference -> `anchor`. Several
rewards: an image is preferred where it is no worse in any and better in one.

The paper takes the mean over the D entries of a sample for ln p. With eps = beta = 0.1 the argument
of the sigmoid then stays within 0.02 of 0: the loss is a straight line, beta is a learning rate,
and the bound lets one step move by 1,600 nats on an SD latent (DDPO's: 1.6). `D3PO.paper` is that.
The default differs so:

1. l_i is in nats, and beta ln R saturates: with trust 5 and beta 0.2 a pair is settled at ln(1 +
   e^-2).
2. The bound is in nats, and one-sided: l_w counts up to `trust`, l_l down to -`trust`. A two-sided
   bound also stops pairs that went the wrong way, so that they can never come back.
3. The policy that made the images is the reference (as between the paper's rounds, sec. 5.2), by
   the log-probabilities kept from sampling: a quarter of the evaluations less, and l is 0 before
   the first update. Anchored to a far model, both images of a new pair are likelier than it says,
   winners stop to count, and losers alone are pushed down. What holds the policy to the model
   before tuning is `kl`, as in DPOK.

Cost: one evaluation of every image a step, however many pairs it is in. A tie is no pair; nor is an
image whose score is not finite. Loss ln 2 and gradient 0 where there is no pair at all, so that
processes stay in step.

By hand: `sample` makes the trajectories, people look at the images (`backbone.decode`), `judged`
turns their choices into what `loss` takes; `collect` returns that as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from diffalign.diffusion import log_prob
from diffalign.rewards.pareto import dominates
from diffalign.training.contract import Denoiser, PromptBatch
from diffalign.training.objectives.ddpo import check_bounds, plain_settings
from diffalign.training.rollouts import Rewards, Rollouts, Trajectories, as_rewards, finite_rows, log_ratio, score_figures, step_kl


@dataclass(frozen=True)
class Choice:
    """One person's choice among the images of one prompt."""

    group: int
    """Which prompt, as in `Trajectories.groups`."""
    preferred: int
    """Number of the image within the prompt, from 0."""
    over: tuple[int, ...] = ()
    """The images that it was preferred to; empty: all others of the prompt. People who disagree give both pairs, which cancel."""


@dataclass(frozen=True)
class Judged:
    """Trajectories and pairs of their images: rows of the preferred ones, and of those they were preferred to."""

    trajectories: Trajectories
    winners: Int[Tensor, " pairs"]
    losers: Int[Tensor, " pairs"]
    figures: Mapping[str, float] = field(default_factory=dict)
    """What is known of the scores, to log."""


@dataclass(frozen=True, eq=False)
class D3PO:
    """D3PO(rewards), or D3PO() for choices made by people."""

    name: ClassVar[str] = "d3po"

    rewards: Rewards | None = None
    """What stands in for people; they need no gradient."""
    _: KW_ONLY
    rollouts: Rollouts = field(default_factory=lambda: Rollouts(images=4, shared_noise=True))
    """How images are made; at least 2 of each prompt. Paper: 2 for a reward, 7 for people, beginning at the same noise."""
    beta: float = 0.2
    """> 0, of log-ratios in nats; with `clip`, of means over entries. Paper: 0.1."""
    trust: float = 5.0
    """Nats a step, > 0, by which an image may become likelier (preferred) or less likely before it stops to count."""
    clip: float | None = None
    """eps > 0 of the published two-sided bound, on means over entries, in place of `trust`. Paper: 0.1."""
    anchor: Literal["sampler", "reference"] = "sampler"
    """What log-ratios are against: the policy that made the images, or the model before tuning. Paper: reference."""
    kl: float = 0.0
    """Weight of the divergence from the reference a step, >= 0, in the unit of the log-ratios. Paper: 0."""

    def __post_init__(self) -> None:
        check_bounds(self.trust, self.clip, self.kl)
        if self.rollouts.images < 2:
            raise ValueError(f"rollouts.images must be at least 2, got {self.rollouts.images}: images are compared within a prompt")
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if self.anchor not in ("sampler", "reference"):
            raise ValueError(f"anchor must be 'sampler' or 'reference', got {self.anchor!r}")

    @classmethod
    def paper(cls, rewards: Rewards | None = None) -> D3PO:
        """The published setting: pairs for a reward, groups of seven for people."""
        made = Rollouts(7 if rewards is None else 2, steps=20, eta=1.0, guidance_scale=5.0, shared_noise=True)
        return cls(rewards, rollouts=made, beta=0.1, clip=0.1, anchor="reference")

    def sample(self, policy: Denoiser, batch: PromptBatch) -> Trajectories:
        """Images for people to look at. All that is random comes from the batch's seeds."""
        return self.rollouts.make(policy, batch)

    def judged(self, trajectories: Trajectories, choices: Sequence[Choice]) -> Judged:
        """The pairs that choices mean. IndexError for an image that is not there, ValueError for one preferred to itself."""
        winners, losers = [], []
        for choice in choices:
            best = trajectories.row(choice.group, choice.preferred)
            group = (trajectories.groups == choice.group).nonzero().flatten().tolist()
            over = [trajectories.row(choice.group, image) for image in choice.over] or [row for row in group if row != best]
            if best in over:
                raise ValueError(f"{choice} prefers an image to itself; leave it out of over")
            winners += [best] * len(over)
            losers += over
        device = trajectories.groups.device
        return Judged(
            trajectories, torch.tensor(winners, dtype=torch.long, device=device), torch.tensor(losers, dtype=torch.long, device=device)
        )

    def collect(self, policy: Denoiser, batch: PromptBatch | Judged, generator: torch.Generator) -> Judged:
        """Images of every prompt, compared by the rewards; what people judged, as it is."""
        if isinstance(batch, Judged):
            return batch
        if self.rewards is None:
            raise ValueError("D3PO has no rewards to choose by: give them, or train on judged(sample(policy, prompts), choices)")
        trajectories = self.sample(policy, batch)
        scores = self.rollouts.score(policy.backbone, trajectories, self.rewards)
        known = finite_rows(scores).nonzero().flatten()
        winners, losers = dominates(scores[known], groups=trajectories.groups[known]).nonzero(as_tuple=True)
        return Judged(trajectories, known[winners], known[losers], score_figures(scores, list(as_rewards(self.rewards))))

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: Judged, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        made = batch.trajectories
        losses, margins, kls = [], [], []
        for i in self.rollouts.chosen(made, generator):
            step, before, compared = self.rollouts.step(policy, made, i), None, None
            if self.anchor == "reference" or self.kl > 0:
                with torch.no_grad():
                    before = self.rollouts.step(reference, made, i)
                    compared = log_prob(made.states[i + 1], before.mean, before.std) if self.anchor == "reference" else None
            nats = log_ratio(step, made, i, compared)
            margin = self.margin(nats, batch.winners, batch.losers, made.entries)
            loss = softplus(-self.beta * margin).mean() if len(margin) else math.log(2) + 0 * nats.sum()
            if self.kl > 0:
                divergence = step_kl(step, before)
                loss = loss + self.kl * divergence.mean() / (made.entries if self.clip is not None else 1)
                kls.append(divergence.detach())
            losses.append(loss)
            margins.append((nats[batch.winners] - nats[batch.losers]).detach())
        margin = torch.stack(margins)
        figures = {**batch.figures, "pairs": float(len(batch.winners))}
        if margin.numel():
            figures |= {"margin": float(margin.mean()), "accuracy": float((margin > 0).float().mean())}
        if kls:
            figures["kl"] = float(torch.stack(kls).mean())
        return torch.stack(losses).mean(), figures

    def margin(
        self, nats: Float[Tensor, " n"], winners: Int[Tensor, " pairs"], losers: Int[Tensor, " pairs"], entries: int
    ) -> Float[Tensor, " pairs"]:
        """ln R_w - ln R_l of every pair, from each image's l_i in nats: bounded in nats, or as published."""
        if self.clip is not None:
            bounded = (nats / entries).exp().clamp(1 - self.clip, 1 + self.clip).log()
            return bounded[winners] - bounded[losers]
        return nats[winners].clamp(max=self.trust) - nats[losers].clamp(min=-self.trust)

    def settings(self) -> dict[str, Any]:
        named = None if self.rewards is None else list(as_rewards(self.rewards))
        return {**plain_settings(self, leave_out=("rewards",)), "rewards": named}
