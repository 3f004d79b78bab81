"""DDPO: make the denoising steps of images that scored better than their siblings more likely, a little at a time.

Papers: Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024
(2305.13301), the policy gradient; Fan et al., "DPOK", NeurIPS 2023 (2305.16381), a KL penalty to
the model before tuning; Liu et al., "Flow-GRPO", NeurIPS 2025 (2505.05470), the same for flow
models by stochastic steps, with rewards compared inside groups.

    rho_i = exp(l_i / D)        l_i = ln p_now(x_{i+1} | x_i) - ln p_then(x_{i+1} | x_i), D entries in a sample
    loss  = mean over images and steps of  max(-A rho_i, -A clamp(rho_i, lowest, highest)) + kl k_i / D
    k_i   = |m_now - m_reference|^2 / 2 std_i^2

l_i, k_i, the steps i and the images -> rollouts.py;  A -> `advantage`, `advantage_clip`;  lowest,
highest -> `trust` or `clip`; DPOK's w_kl / w_r, Flow-GRPO's beta -> `kl`.

The papers take the mean over entries for a log-probability, which is the l_i / D above, and bound
rho by 1 +- 1e-4: 1.6 nats a step for the 16,384 entries of an SD latent, but 26 for FLUX's 262,144.
We differ so:

1. The bound is in nats a step, `trust`, which means the same at every size; lowest, highest =
   exp(-+ trust / D).
2. The default advantage compares an image with the others of its prompt (leave one out), over the
   spread within prompts of the whole batch: a group that agrees by chance is not blown up to unit
   spread. DDPO keeps a history of rewards for every prompt, whose place the group takes here; DPOK
   trains a value network, for which the others stand in.
3. DPOK's penalty is the squared difference of guided noise predictions; ours is the divergence that
   it stands for, as in Flow-GRPO. DPOK clamps without the max, which stops an image that moved the
   wrong way from coming back; `dpok` here keeps the max.
4. Flow-GRPO's last step is deterministic here (rollouts.py says why).

An image whose score is not finite teaches nothing, and nobody is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.rewards.advantages import group_advantages
from diffalign.training.contract import Denoiser, PromptBatch, ScoreImages
from diffalign.training.rollouts import Rollouts, Trajectories, finite_rows, log_ratio, score_figures, step_kl

ADVANTAGES = ("leave-one-out", "group", "batch")
EPSILON = 1e-4  # keeps a batch without any spread finite; Flow-GRPO's


@dataclass(frozen=True)
class Graded:
    """Trajectories, their scores "n 1", and what each image is worth beside its siblings."""

    trajectories: Trajectories
    scores: Float[Tensor, "n 1"]
    advantages: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class DDPO:
    """DDPO(score); `paper`, `dpok` and `flow_grpo` are published settings."""

    name: ClassVar[str] = "ddpo"

    score: ScoreImages
    """The reward; it needs no gradient."""
    _: KW_ONLY
    rollouts: Rollouts = field(default_factory=Rollouts)
    """How images are made; at least 2 of each prompt."""
    advantage: Literal["leave-one-out", "group", "batch"] = "leave-one-out"
    """Less the mean of the others, over the pooled spread within prompts; less the group's mean, over the group's spread (DDPO), or over
    that of all rewards in the batch (Flow-GRPO)."""
    advantage_clip: float = 5.0
    """Advantages are cut to +- this, > 0. DDPO, Flow-GRPO: 5."""
    trust: float = 1.6
    """Nats a step, > 0, by which an image may become likelier or less likely before it stops to count. DDPO on SD: 1.64."""
    clip: float | None = None
    """eps > 0 of the published bound 1 - eps ... 1 + eps on rho, in place of `trust`. DDPO, DPOK, Flow-GRPO: 1e-4."""
    kl: float = 0.0
    """Weight of the divergence from the reference, >= 0. DDPO: 0, Flow-GRPO: 0.01 to 0.04."""

    def __post_init__(self) -> None:
        check_bounds(self.trust, self.clip, self.kl)
        if self.rollouts.images < 2:
            raise ValueError(f"rollouts.images must be at least 2, got {self.rollouts.images}: images are compared within a prompt")
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"advantage must be one of {', '.join(ADVANTAGES)}, got {self.advantage!r}")
        if not self.advantage_clip > 0:
            raise ValueError(f"advantage_clip must be above 0, got {self.advantage_clip}")

    @classmethod
    def paper(cls, score: ScoreImages, images: int = 8) -> DDPO:
        """DDPO as published, the group in place of the history of rewards."""
        made = Rollouts(images, steps=50, eta=1.0, guidance_scale=5.0)
        return cls(score, rollouts=made, advantage="group", clip=1e-4)

    @classmethod
    def dpok(cls, score: ScoreImages, images: int = 10, kl: float = 0.01) -> DDPO:
        """DPOK: DDPO held to the model before tuning. Its own weight, 0.001 of squared noise differences, has another unit than `kl`."""
        made = Rollouts(images, steps=50, eta=1.0, guidance_scale=7.5, trained=4)
        return cls(score, rollouts=made, advantage="leave-one-out", clip=1e-4, kl=kl)

    @classmethod
    def flow_grpo(cls, score: ScoreImages, images: int = 24) -> DDPO:
        """Flow-GRPO, for models that predict a flow."""
        made = Rollouts(images, steps=10, sampler="flow_sde", eta=0.7, guidance_scale=4.5)
        return cls(score, rollouts=made, advantage="batch", clip=1e-4, kl=0.04)

    def collect(self, policy: Denoiser, batch: PromptBatch, generator: torch.Generator) -> Graded:
        """Images of every prompt, scored and compared. All that is random comes from the batch's seeds."""
        trajectories = self.rollouts.make(policy, batch)
        scores = self.rollouts.score(policy.backbone, trajectories, self.score)
        known = finite_rows(scores)
        worth = torch.zeros(len(scores), device=scores.device)
        if known.any():
            worth[known] = advantages(scores[known, 0], trajectories.groups[known], self.advantage)
        return Graded(trajectories, scores, worth.clamp(-self.advantage_clip, self.advantage_clip))

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: Graded, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        made, entries = batch.trajectories, batch.trajectories.entries
        bounds = ratio_bounds(entries, self.trust, self.clip)
        losses, moved, kls = [], [], []
        for i in self.rollouts.chosen(made, generator):
            step = self.rollouts.step(policy, made, i)
            nats = log_ratio(step, made, i)
            each = surrogate(batch.advantages, nats / entries, bounds)
            if self.kl > 0:
                with torch.no_grad():
                    before = self.rollouts.step(reference, made, i)
                divergence = step_kl(step, before)
                each = each + self.kl * divergence / entries
                kls.append(divergence.detach())
            losses.append(each.mean())
            moved.append(nats.detach())
        figures = {**score_figures(batch.scores, ["reward"]), **ratio_figures(torch.stack(moved), entries, bounds)}
        if kls:
            figures["kl"] = float(torch.stack(kls).mean())
        return torch.stack(losses).mean(), figures

    def settings(self) -> dict[str, Any]:
        return plain_settings(self, leave_out=("score",))


# ---- what Parrot and D3PO share ----------------------------------------------------------------------------------------------


def surrogate(weights: Float[Tensor, " n"], log_rho: Float[Tensor, " n"], bounds: tuple[float, float]) -> Float[Tensor, " n"]:
    """max(-A rho, -A clamp(rho)) of each sample: no more is gained outside the bounds, and the way back stays open.

    A weight of 0 gives a loss and a gradient of exactly 0, whatever rho has become.
    """
    rho = torch.where(weights == 0, torch.zeros_like(log_rho), log_rho).exp()
    return torch.maximum(-weights * rho, -weights * rho.clamp(*bounds))


def ratio_bounds(entries: int, trust: float, clip: float | None) -> tuple[float, float]:
    """Lowest and highest rho: `trust` nats either way, or 1 -+ `clip` where that is given."""
    return (math.exp(-trust / entries), math.exp(trust / entries)) if clip is None else (1 - clip, 1 + clip)


def ratio_figures(nats: Float[Tensor, "m n"], entries: int, bounds: tuple[float, float]) -> dict[str, float]:
    """To log: the mean and the mean size of l_i in nats, and the share of rho outside the bounds."""
    rho = (nats / entries).exp()
    outside = (rho < bounds[0]) | (rho > bounds[1])
    return {"log_ratio": float(nats.mean()), "log_ratio_size": float(nats.abs().mean()), "clipped": float(outside.float().mean())}


def advantages(rewards: Float[Tensor, " n"], groups: Int[Tensor, " n"], kind: str) -> Float[Tensor, " n"]:
    """What each image is worth, by one of ADVANTAGES; 0 where it has no sibling. Rewards must be finite."""
    if kind == "group":
        return group_advantages(rewards[:, None], groups)[:, 0]
    names, index = groups.unique(return_inverse=True)
    sizes = torch.bincount(index, minlength=len(names))
    means = torch.zeros(len(names), device=rewards.device).index_add_(0, index, rewards.float()) / sizes
    centred = rewards.float() - means[index]
    if kind == "batch":
        return centred / (rewards.float().std(correction=0) + EPSILON)
    within = (centred.square().sum() / max(1, len(rewards) - len(names))).sqrt()
    own = sizes[index]
    return centred * own / (own - 1).clamp_min(1) / (within + EPSILON)  # r - mean of the others = n / (n - 1) (r - mean)


def check_bounds(trust: float, clip: float | None, kl: float) -> None:
    """ValueError for settings outside their range."""
    if not trust > 0:
        raise ValueError(f"trust must be above 0 nats, got {trust}")
    if clip is not None and not 0 < clip < 1:
        raise ValueError(f"clip must lie between 0 and 1, got {clip}; leave it out to bound by trust")
    if not kl >= 0:
        raise ValueError(f"kl must be at least 0, got {kl}")


def plain_settings(objective: Any, leave_out: tuple[str, ...]) -> dict[str, Any]:
    """The fields of an objective as JSON data, its rollouts' under "rollouts"."""
    plain = {each.name: getattr(objective, each.name) for each in fields(objective) if each.name not in leave_out}
    made = {each.name: getattr(plain["rollouts"], each.name) for each in fields(plain["rollouts"])}
    return {**plain, "rollouts": {**made, "window": list(made["window"]) if made["window"] else None}}
