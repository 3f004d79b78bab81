"""Evaluation during training: images of held-out prompts, scored by rewards that are not optimised.

The score that decides about the best weights and early stop is the mean over watched rewards of

    (mean score now - mean score of the reference) / standard deviation of the reference's scores

on the same prompts and noises, so that 0 is the model before tuning and rewards of any unit count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Backbone, Size
from diffalign.diffusion import DDIM
from diffalign.sampling import rollout
from diffalign.training.contract import ScoreImages
from diffalign.training.data import seeded

if TYPE_CHECKING:
    from diffalign.training.policy import Policy

LEAST = 1e-6  # a reward whose scores spread less says nothing


@dataclass(frozen=True)
class Watch:
    """What is drawn, and what it is scored by."""

    prompts: Sequence[str]
    """Held out: no prompt that is learned from."""
    watched: Mapping[str, ScoreImages]
    """Name -> reward that decides; none of them optimised."""
    optimised: Mapping[str, ScoreImages]
    """Name -> reward that is reported beside them."""
    steps: int | None = None
    """Of deterministic DDIM; None: the model's own."""
    guidance_scale: float = 1.0
    """w in u + w (c - u); up to 1: none."""
    size: Size | None = None
    """None: the model's own."""
    seed: int = 0
    """Of the noise, one image a prompt."""
    batch_size: int = 32
    """Images at once: memory and speed."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("held_out_prompts is empty; give prompts that are not learned from")
        if not self.watched:
            raise ValueError("watched is empty; name a reward that is not optimised, or evaluate the loss on held-out pairs")
        both = sorted(set(self.watched) & set(self.optimised))
        if both:
            raise ValueError(f"watch names {', '.join(both)}, which is optimised; a reward that is climbed cannot tell when to stop")

    @torch.no_grad()
    def scores(self, backbone: Backbone) -> dict[str, Float[Tensor, " n"]]:
        """Every reward's scores of one image of each prompt."""
        found: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.prompts), self.batch_size):
            prompts = list(self.prompts[start : start + self.batch_size])
            noise = backbone.draw_noise([seeded(self.seed, 6, start + i) for i in range(len(prompts))], self.size)
            conditioning = backbone.encode(prompts, unconditional=True, size=self.size)
            out = rollout(backbone, noise, conditioning, backbone.schedule(self.steps, size=self.size), DDIM(),
                          guidance_scale=self.guidance_scale)  # fmt: skip
            images = backbone.decode(out.latents, self.size)
            for name, score in {**self.watched, **self.optimised}.items():
                found.setdefault(name, []).append(torch.as_tensor(score(images, prompts)).float().cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def evaluator(self) -> Callable[[Policy, int], Mapping[str, float]]:
        """For the loop: "held_out/NAME" of every reward, and "score". ValueError where no watched reward tells images apart."""
        before: dict[str, Tensor] = {}

        def evaluate(policy: Policy, step: int) -> Mapping[str, float]:
            if not before:
                before.update(self.scores(policy.reference().as_backbone()))
            now = before if step == 0 else self.scores(policy.as_backbone())
            gains = {name: gain(now[name], before[name]) for name in self.watched}
            known = [value for value in gains.values() if value is not None]
            if not known:
                raise ValueError(f"watched rewards {', '.join(gains)} score all held-out images alike; watch another, or give more prompts")
            return {**{f"held_out/{name}": float(values.mean()) for name, values in now.items()}, "score": sum(known) / len(known)}

        return evaluate


def gain(now: Float[Tensor, " n"], before: Float[Tensor, " n"]) -> float | None:
    """How far the mean rose, in standard deviations of `before`; over images that have both scores. None where there is no spread."""
    known = now.isfinite() & before.isfinite()
    if int(known.sum()) < 2:
        return None
    spread = float(before[known].std())
    return None if spread < LEAST else float(now[known].mean() - before[known].mean()) / spread
