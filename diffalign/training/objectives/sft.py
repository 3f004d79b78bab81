"""Supervised fine-tuning: learn to denoise the images that were preferred. The baseline of every preference objective.

It is training as the model was trained (Ho et al., "Denoising Diffusion Probabilistic Models", 2006.11239, eq. 14), on winners alone:

    loss = mean_i w_i mean (net(a x0 + s eps, t, c) - target)^2

x0 -> `batch.winners`;  w -> `batch.weights`, 1 without;  target: what a network of its kind is trained to predict for (x0, eps);
t uniform, eps ~ N(0, I). Nothing holds the policy to the reference but few steps and a small learning rate: it moves towards the
images of the data in every way, the prompts' share of it included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import add_noise
from diffalign.training.contract import Denoiser, PairBatch
from diffalign.training.denoising import SPACES, Samples, draw, errors


@dataclass(frozen=True)
class SFT:
    """SFT()."""

    name: ClassVar[str] = "sft"

    space: Literal["network", "epsilon", "x0"] = "network"
    """What the errors are of: the network's own output, eps, or x0; see denoising.py."""

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {self.space!r}")

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def collect(self, policy: Denoiser, batch: PairBatch, generator: torch.Generator) -> PairBatch:
        return batch

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        clean = batch.winners.float()
        timesteps = policy.backbone.draw_timesteps(len(batch), generator)
        signal, noise = policy.backbone.levels(timesteps)
        samples = Samples(clean, batch.conditioning, timesteps.to(clean.device), signal, noise)
        eps = draw(clean, generator)
        losses = errors(policy, samples, add_noise(clean, eps, signal, noise), eps, self.space)
        if batch.weights is not None:
            losses = losses * batch.weights.to(losses)
        return losses.mean(), {}
