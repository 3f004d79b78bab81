"""MaPO: preference pairs without a reference; the margin between the two likelihoods is itself bounded.

Paper: Hong et al., "Margin-aware Preference Optimization for Aligning Diffusion Models without
Reference" (2406.06424).

    e_w, e_l  mean squared errors of the policy on the noised winner and loser, one t and one eps
    phi(e) = c e / (exp(c e) - 1)                      falls from 1 to 0 as e grows
    loss   = e_w - beta ln sigmoid(T (phi(e_w) - phi(e_l)))

c -> `curvature`, T -> `scale`. The first term is plain fine-tuning on winners and takes the place of
the reference; half the memory for networks, and no drift from a reference that fits the data badly,
but nothing that holds the model where the data are silent. The form and the constants are the public
code's, which divides by nothing at e = 0; phi's limit there is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.training.contract import Denoiser, PairBatch
from diffalign.training.denoising import SPACES, errors, forward_noise, in_one_batch
from diffalign.training.objectives.preference import accuracy


@dataclass(frozen=True)
class MaPO:
    """MaPO(beta=0.1)."""

    name: ClassVar[str] = "mapo"

    beta: float = 0.1
    """beta > 0: what the margin counts beside fine-tuning on winners. Paper's code: 0.1."""
    curvature: float = 0.5
    """c > 0, in units of 1 / error. Paper's code: 0.5."""
    scale: float = 1000.0
    """T > 0: how large a difference of phi decides a pair. Paper's code: the number of training timesteps."""
    space: Literal["network", "epsilon", "x0"] = "network"
    """What the errors are of: the network's own output, eps or x0. Paper: epsilon."""

    def __post_init__(self) -> None:
        for name in ("beta", "curvature", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {self.space!r}")

    @classmethod
    def paper(cls) -> MaPO:
        """The released code's."""
        return cls(space="epsilon")

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def collect(self, policy: Denoiser, batch: PairBatch, generator: torch.Generator) -> PairBatch:
        return batch

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        """`reference` is not called."""
        samples = in_one_batch(batch, policy.backbone, generator)
        x, eps = forward_noise(policy, reference, samples, generator)
        winner, loser = errors(policy, samples, x, eps, self.space).chunk(2)
        margin = self.scale * (phi(winner, self.curvature) - phi(loser, self.curvature))
        losses = winner - self.beta * logsigmoid(margin)
        if batch.weights is not None:
            losses = losses * batch.weights.to(losses)
        figures = {
            "implicit_accuracy": accuracy(margin),
            "margin": margin.mean().item(),
            "winner_error": winner.mean().item(),
            "loser_error": loser.mean().item(),
        }
        return losses.mean(), figures


def phi(errors: Float[Tensor, " b"], curvature: float) -> Float[Tensor, " b"]:
    """c e / (exp(c e) - 1), with its limit 1 - c e / 2 at small ones; written so that large ones do not overflow."""
    z = curvature * errors
    small = z < 1e-4
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 - z / 2, safe * torch.exp(-safe) / -torch.expm1(-safe))
