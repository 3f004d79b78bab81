"""Parrot: several rewards at once; only images that no other one of their prompt beats in every reward teach anything.

Paper: Lee et al., "Parrot: Pareto-optimal Multi-Reward Reinforcement Learning Framework for
Text-to-Image Generation", ECCV 2024 (2401.05675), algorithm 1 and eq. 4. No code was published.

    grad J = 1 / n(P)  sum over i in P, rewards k, steps t of  r_k(x^i) grad ln p(x_{t-1} | x_t)

P: the images that none of their group dominates, n(P) of them -> rewards/pareto.py;  ln p, its mean
over the D entries of a sample -> rollouts.py;  r_k -> `rewards`, their sum over k weighted by
`weights`. We take the gradient from exp(l / D) with l = ln p_now - ln p_then, which is that of ln p
/ D as long as nothing has been updated, and right afterwards too. Several prompts a batch: the mean
over them.

`Parrot.paper` is that, with the published "clip 1e-4" read as DDPO's bound on the ratio, which does
nothing in the first update of a batch. Every reward counts in it as it is, so an image on the front
is pushed up even if it is bad, and the reward with the largest numbers decides. The default differs
so, each by a setting of its own:

1. `standardise`: each reward is centred and scaled inside its group, then they are summed (GDPO,
   rewards/advantages.py).
2. `fronts`: images on the worst front teach too, what to avoid; those between the fronts stay
   silent. P is then both.
3. `epsilon`: with small groups or many rewards nearly nobody is dominated (rewards/pareto.py gives
   shares), and a filter that keeps everything selects nothing; small differences do not count for
   domination. `kept` is logged: above one half, raise it.
4. `kl`: the divergence from the model before tuning; the bound on the ratio is in nats (ddpo.py).
5. The mean over steps in place of the sum, so that learning rates carry over between schedules;
   Adam sees no difference.

Not here yet: the reward-identifier tokens in prompts and the prompt expansion network; without
tokens every image is taught by all rewards. An image with a score that is not finite is compared
with nobody and teaches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.rewards.advantages import gdpo
from diffalign.rewards.pareto import front_ranks, kept_fraction
from diffalign.training.contract import Denoiser, PromptBatch
from diffalign.training.objectives.ddpo import check_bounds, plain_settings, ratio_bounds, ratio_figures, surrogate
from diffalign.training.rollouts import Rewards, Rollouts, Trajectories, as_rewards, finite_rows, log_ratio, score_figures, step_kl


@dataclass(frozen=True)
class Selected:
    """Trajectories, their scores, and how much each image counts: exactly 0 for those that were not selected."""

    trajectories: Trajectories
    scores: Float[Tensor, "n k"]
    weights: Float[Tensor, " n"]
    """Their sum over a group's images, times exp(l / D), is what the group's loss is minus of."""
    kept: float
    """The share on the best front, mean over groups."""


@dataclass(frozen=True, eq=False)
class Parrot:
    """Parrot({"alignment": score, "aesthetics": score, ...})."""

    name: ClassVar[str] = "parrot"

    rewards: Rewards
    """Each higher for better images; they need no gradient."""
    _: KW_ONLY
    rollouts: Rollouts = field(default_factory=lambda: Rollouts(images=16))
    """How images are made; at least 2 of each prompt. Paper: 256 a batch."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of rewards in the sum, >= 0; 1 for those not named. They do not change who dominates whom. Paper: 1."""
    standardise: bool = True
    """Centre and scale each reward inside its group. Paper: no."""
    fronts: Literal["best", "both"] = "both"
    """Whether the worst front teaches too. Paper: best."""
    epsilon: float = 0.1
    """What is too small for domination, >= 0, in each reward's standard deviations within prompts. Paper: 0."""
    trust: float = 1.6
    """Nats a step, > 0, by which an image may become likelier or less likely before it stops to count."""
    clip: float | None = None
    """eps > 0 of the bound 1 - eps ... 1 + eps on exp(l / D), in place of `trust`. Paper: 1e-4, if this is what it means."""
    kl: float = 0.01
    """Weight of the divergence from the reference, >= 0. Paper: 0."""
    summed: bool = False
    """Sum over stochastic steps instead of their mean. Paper: sum."""

    def __post_init__(self) -> None:
        check_bounds(self.trust, self.clip, self.kl)
        names = as_rewards(self.rewards)
        if self.rollouts.images < 2:
            raise ValueError(f"rollouts.images must be at least 2, got {self.rollouts.images}: images are compared within a prompt")
        unknown = sorted(set(self.weights) - set(names))
        if unknown or any(not weight >= 0 for weight in self.weights.values()):
            raise ValueError(f"weights must give numbers of at least 0 for {', '.join(names)}; got {dict(self.weights)}")
        if self.fronts not in ("best", "both"):
            raise ValueError(f"fronts must be 'best' or 'both', got {self.fronts!r}")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, got {self.epsilon}")

    @classmethod
    def paper(cls, rewards: Rewards, images: int = 64) -> Parrot:
        """The published estimator, without tokens."""
        made = Rollouts(images, steps=50, eta=1.0, guidance_scale=5.0)
        return cls(rewards, rollouts=made, standardise=False, fronts="best", epsilon=0.0, clip=1e-4, kl=0.0, summed=True)

    def collect(self, policy: Denoiser, batch: PromptBatch, generator: torch.Generator) -> Selected:
        """Images of every prompt, scored and selected. All that is random comes from the batch's seeds."""
        made = self.rollouts.make(policy, batch)
        scores = self.rollouts.score(policy.backbone, made, self.rewards)
        return self.select(made, scores)

    def select(self, made: Trajectories, scores: Float[Tensor, "n k"]) -> Selected:
        """How much each image counts, by its scores."""
        known = finite_rows(scores)
        weights, kept = torch.zeros(len(scores), device=scores.device), float("nan")
        if known.any():
            factors = torch.tensor([self.weights.get(name, 1.0) for name in as_rewards(self.rewards)], device=scores.device)
            groups = made.groups[known]
            weights[known], kept = self.selection(scores[known], groups, factors)
        return Selected(made, scores, weights, kept)

    def selection(self, scores: Float[Tensor, "n k"], groups: Int[Tensor, " n"], factors: Float[Tensor, " k"]) -> tuple[Tensor, float]:
        """(what each image counts, the share on the best front) for scores that are finite."""
        ranks = front_ranks(scores, self.epsilon * spread_within(scores, groups), groups)
        best, chosen = ranks == 0, torch.zeros_like(ranks, dtype=torch.bool)
        for group in groups.unique():
            members = groups == group
            worst = members & (ranks == ranks[members].max())
            chosen |= members & best if self.fronts == "best" else (members & best) | worst
        worth = gdpo(scores, factors, groups) if self.standardise else scores @ factors
        sizes = torch.stack([(chosen & (groups == group)).sum() for group in groups])  # n(P) of each image's group
        return torch.where(chosen, worth / sizes, torch.zeros_like(worth)), kept_fraction(best, groups)

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: Selected, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        made, entries = batch.trajectories, batch.trajectories.entries
        bounds, prompts = ratio_bounds(entries, self.trust, self.clip), len(made.groups.unique())
        losses, moved, kls = [], [], []
        for i in self.rollouts.chosen(made, generator):
            step = self.rollouts.step(policy, made, i)
            nats = log_ratio(step, made, i)
            loss = surrogate(batch.weights, nats / entries, bounds).sum() / prompts
            if self.kl > 0:
                with torch.no_grad():
                    before = self.rollouts.step(reference, made, i)
                divergence = step_kl(step, before)
                loss = loss + self.kl * divergence.mean() / entries
                kls.append(divergence.detach())
            losses.append(loss)
            moved.append(nats.detach())
        figures = {**score_figures(batch.scores, list(as_rewards(self.rewards))), **ratio_figures(torch.stack(moved), entries, bounds)}
        figures |= {"kept": batch.kept, "selected": float((batch.weights != 0).float().mean())}
        if kls:
            figures["kl"] = float(torch.stack(kls).mean())
        return torch.stack(losses).mean() * (len(made.steps) if self.summed else 1), figures

    def settings(self) -> dict[str, Any]:
        plain = plain_settings(self, leave_out=("rewards", "weights"))
        return {**plain, "rewards": list(as_rewards(self.rewards)), "weights": dict(self.weights)}


def spread_within(scores: Float[Tensor, "n k"], groups: Int[Tensor, " n"]) -> Float[Tensor, " k"]:
    """Each reward's standard deviation within prompts, over all of them."""
    members: Sequence[Tensor] = [scores[groups == group] for group in groups.unique()]
    squares = sum((each - each.mean(0)).square().sum(0) for each in members)
    return (squares / max(1, len(scores) - len(members))).sqrt()
