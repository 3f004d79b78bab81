"""Diffusion-KTO: learn from single images that are good or bad, without pairs.

Paper: Li et al., "Aligning Diffusion Models by Optimizing Human Utility", NeurIPS 2024 (2404.04465).

    g = e(reference) - e(policy)        mean squared errors on a noised image: what the policy gains
    z = max(0, mean of g)               over the batch, without gradient: what gains are compared with
    loss = w (1 - U(y beta (g - z)))    y = 1 for good images, -1 for bad ones

w -> `good_weight`, `bad_weight`; U -> `utility`. The sigmoid, after Kahneman and Tversky, is timid
about gains and bold about losses: an image far to either side teaches little. Its logarithm is timid
about both: an image that the policy has wrong keeps its pull, however wrong.

z needs other images beside the one that it judges, so a batch holds at least two; the public code
takes the mean over all processes, ours each over its own. t and eps are each image's own.
`UnpairedBatch.of_pairs` makes the data of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.backbone import Conditioning
from diffalign.diffusion import add_noise
from diffalign.training.contract import Denoiser, PairBatch
from diffalign.training.denoising import SPACES, Samples, draw, errors, joined

UTILITIES = ("sigmoid", "log-sigmoid")


@dataclass(frozen=True)
class UnpairedBatch:
    """Images that were liked or not, each on its own."""

    latents: Float[Tensor, "b ..."]
    good: Bool[Tensor, " b"]
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def of_pairs(cls, pairs: PairBatch) -> UnpairedBatch:
        """Winners as good, then losers as bad. The pairs' weights are not used."""
        good = torch.arange(2 * len(pairs), device=pairs.winners.device) < len(pairs)
        losers = pairs.conditioning if pairs.losers_conditioning is None else pairs.losers_conditioning
        return cls(torch.cat([pairs.winners, pairs.losers]), good, joined(pairs.conditioning, losers))


@dataclass(frozen=True)
class KTO:
    """KTO(beta=1000)."""

    name: ClassVar[str] = "kto"

    beta: float = 1000.0
    """beta > 0: how little the policy may leave the reference. Paper's code: 1000."""
    utility: Literal["sigmoid", "log-sigmoid"] = "sigmoid"
    """U. Paper: sigmoid."""
    good_weight: float = 1.0
    """w of good images, >= 0. Paper: 1, with four of five images drawn from the good ones."""
    bad_weight: float = 1.0
    """w of bad images, >= 0. Paper: 1."""
    space: Literal["network", "epsilon", "x0"] = "network"
    """What the errors are of: the network's own output, eps or x0. Paper: epsilon."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta!r}")
        for name in ("good_weight", "bad_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        for name, known in (("utility", UTILITIES), ("space", SPACES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def paper(cls) -> KTO:
        """The released script's, which also drops every fifth prompt."""
        return cls(space="epsilon")

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def collect(self, policy: Denoiser, batch: UnpairedBatch, generator: torch.Generator) -> UnpairedBatch:
        return batch

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: UnpairedBatch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        """Raises ValueError for a batch of one image."""
        if len(batch) < 2:
            raise ValueError("batch holds one image, and KTO compares an image with the others; give it at least 2")
        clean = batch.latents.float()
        timesteps = policy.backbone.draw_timesteps(len(batch), generator)
        samples = Samples(clean, batch.conditioning, timesteps.to(clean.device), *policy.backbone.levels(timesteps))
        eps = draw(clean, generator)
        x = add_noise(clean, eps, samples.signal, samples.noise)
        with torch.no_grad():
            known = errors(reference, samples, x, eps, self.space)
        gains = known - errors(policy, samples, x, eps, self.space)
        good = batch.good.to(gains.device)
        losses = self.losses(gains, good)
        figures = {
            "implicit_accuracy": ((gains > gains.mean()) == good).float().mean().item(),
            "good_gain": _mean(gains[good]),
            "bad_gain": _mean(gains[~good]),
        }
        return losses.mean(), figures

    def losses(self, gains: Float[Tensor, " b"], good: Bool[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Of each image of a batch, from g."""
        point = gains.detach().mean().clamp_min(0)
        signs = good.to(gains) * 2 - 1
        value = signs * self.beta * (gains - point)
        utility = torch.sigmoid(value) if self.utility == "sigmoid" else logsigmoid(value)
        return (self.bad_weight + (self.good_weight - self.bad_weight) * good.to(gains)) * (1 - utility)


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else 0.0
