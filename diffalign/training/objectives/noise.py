"""Amortised noise: train a small network to move noise so that the frozen model's images score better, once for all prompts.

Papers: Eyring et al., "Noise Hypernetworks: Amortizing Test-Time Compute in Diffusion Models", 2025
(2508.09968), for the residual; Chen et al., "FIND", ACM MM 2024 (2407.19453), for the distribution.

    minimise over theta   E_{p, eps} [ - R(G(eps', p), p) ] + w KL(eps' || N(0, I)),   eps' = policy_theta(eps, p)

R -> `score`;  G -> `NoiseLearner.generate`;  theta -> `NoiseLearner.parameters`;  w -> `pull`;  the KL in nats an
entry, in closed form for the distribution, and mean(f^2) / 2 for a residual f (2508.09968, where f's derivative is small).

Unlike the papers:

1. The reward's gradient with respect to eps' is taken first and clipped for every sample, as ReNO does (`clip`); theta gets what
   flows back from there. A reward in nats has images whose gradient is twenty times the usual one, and they would decide every step.
2. eps' keeps the norm of eps. The policy is a small network of its own (diffalign/noise_policy.py), and theta is all of it.
3. FIND's policy learns by the gradient of the reward through the sample (reparametrised), not by policy gradients: over many prompts
   those would need an image for every prompt and direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.backbone import Conditioning
from diffalign.noise import sample_dot, sample_norm, spread
from diffalign.noise_policy import Moved, NoisePolicy
from diffalign.training.contract import PromptBatch, ScoreImages
from diffalign.training.data import seeded

Generate = Callable[[Float[Tensor, "b ..."], Conditioning], Float[Tensor, "b 3 h w"]]
"""generate(noise, conditioning): images in [0, 1], differentiable in the noise."""
NOISE = 5
"""Which of the streams of a sample's seed its noise comes from."""


class NoiseLearner:
    """A noise policy as the loop and the objective see it: what learns, and the frozen model that it learns for."""

    def __init__(self, policy: NoisePolicy, generate: Generate) -> None:
        self.policy, self.generate = policy, generate
        self.parameters: dict[str, nn.Parameter] = dict(policy.named_parameters())
        """What learns, by name."""

    def denoiser(self) -> NoiseLearner:
        """Itself: no network that denoises learns here."""
        return self

    reference = denoiser

    def move(self, noise: Float[Tensor, "b ..."], conditioning: Conditioning) -> Moved:
        """What the policy makes of noise. ValueError for a model that does not read its prompts as `prompt_embeds`."""
        text = conditioning.conditional().get("prompt_embeds")
        if text is None:
            raise ValueError(f"a noise policy reads prompt_embeds, and this model is given {', '.join(conditioning.conditional())}")
        return self.policy(noise, text)

    def weights(self) -> dict[str, Tensor]:
        """A copy of what learns."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raises ValueError where names or shapes are not those of `weights()`."""
        if weights.keys() != self.parameters.keys() or any(weights[n].shape != p.shape for n, p in self.parameters.items()):
            raise ValueError("the weights are not those of this noise policy; was it trained with the same shape?")
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


@dataclass(frozen=True, eq=False)
class AmortiseNoise:
    """AmortiseNoise(score, clip=1.0, pull=0.5)."""

    name: ClassVar[str] = "amortised-noise"

    score: ScoreImages
    """R, differentiable in the images."""
    _: KW_ONLY
    clip: float = 1.0
    """Greatest L2 norm of one sample's reward gradient with respect to its noise, > 0. Papers: none."""
    pull: float = 0.5
    """w >= 0, how much a nat an entry costs. Paper: 0.5 on the mean square, with rewards of its own scale."""

    def __post_init__(self) -> None:
        if not self.clip > 0 or not self.pull >= 0:
            raise ValueError(f"clip must be above 0 and pull at least 0, got {self.clip!r} and {self.pull!r}")

    def settings(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"clip": self.clip, "pull": self.pull}

    def collect(self, policy: NoiseLearner, batch: PromptBatch, generator: torch.Generator) -> PromptBatch:
        """Prompts are all that is needed."""
        return batch

    def loss(
        self, policy: NoiseLearner, reference: NoiseLearner, batch: PromptBatch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Its gradient is that of the objective with every sample's reward gradient clipped; its value means nothing."""
        shape = policy.policy.shape.noise
        device = next(iter(policy.parameters.values())).device
        noise = torch.stack([torch.randn(shape, generator=seeded(seed, NOISE)) for seed in batch.seeds]).to(device)
        moved = policy.move(noise, batch.conditioning)
        total, uphill = self.slope(policy.generate, moved.noise, batch.conditioning)
        length = sample_norm(uphill)
        clipped = uphill * spread((self.clip / (length + 1e-6)).clamp_max(1), uphill)
        loss = self.pull * moved.kl.mean() - sample_dot(moved.noise, clipped).mean()
        figures = torch.stack([total.mean(), moved.kl.detach().mean(), length.mean()]).tolist()
        return loss, dict(zip(("reward", "kl_per_entry", "noise_gradient"), figures, strict=True))

    def slope(
        self, generate: Generate, noise: Float[Tensor, "b ..."], conditioning: Conditioning
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b ..."]]:
        """R and its gradient with respect to the noise, outside of any graph that the noise belongs to."""
        with torch.enable_grad():
            leaf = noise.detach().requires_grad_()
            total = self.score(generate(leaf, conditioning), list(conditioning.prompts))
            if not total.requires_grad:
                raise TypeError("the reward has no gradient to the noise, which amortised noise learns from; climb a differentiable one")
            (uphill,) = torch.autograd.grad(total.sum(), leaf)
        return total.detach().float(), uphill.float()
