"""Training samples as the preference objectives see them: noised, with the network's error on each.

Pairs become one batch, winners first, so that a network is called once for both images. Errors are
those of what the network itself predicts, or converted: at fixed x = a x0 + s eps

    e_eps = a^2 e_v = a^2 e_flow = (a / s)^2 e_x0        e_x0 = s^2 e_v = s^2 e_flow = (s / a)^2 e_eps

"network" leaves them as they are. Papers mostly write eps: a v or flow network then counts low noise
as they do and high noise 1 / a^2 times as much, which for flow (a = 1 - s) grows without bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Backbone, Conditioning
from diffalign.diffusion import add_noise, from_x0_and_eps
from diffalign.training.contract import Denoiser, PairBatch

SPACES = ("network", "epsilon", "x0")


@dataclass(frozen=True)
class Samples:
    """Clean latents, what each is described by, the time that it is noised to, and the level there."""

    clean: Float[Tensor, "n ..."]
    conditioning: Conditioning
    timesteps: Float[Tensor, " n"]
    signal: Float[Tensor, " n"]
    noise: Float[Tensor, " n"]


class StateProvider(Protocol):
    """Where the network is looked at: (x, eps) with x = a clean + s eps at the level of `samples`. Called without gradient."""

    def __call__(
        self, policy: Denoiser, reference: Denoiser, samples: Samples, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."]]: ...


# ---- errors -------------------------------------------------------------------------------------------------------------------


def space_weight(space: str, prediction: str, signal: Float[Tensor, " n"], noise: Float[Tensor, " n"]) -> Float[Tensor, " n"] | float:
    """What makes the squared error of the network's output one of eps or of x0. ValueError where it is not finite."""
    if space == "network":
        return 1.0
    of_eps = {"epsilon": torch.ones_like(signal), "sample": (signal / noise).square()}.get(prediction, signal.square())
    of_x0 = {"epsilon": (noise / signal).square(), "sample": torch.ones_like(signal)}.get(prediction, noise.square())
    weight = of_eps if space == "epsilon" else of_x0
    if not bool(weight.isfinite().all()):
        raise ValueError(f"space={space!r} has no finite weight at every timestep of a model that predicts {prediction!r}; use 'network'")
    return weight


# ---- batches ------------------------------------------------------------------------------------------------------------------


def forward_noise(
    policy: Denoiser, reference: Denoiser, samples: Samples, generator: torch.Generator
) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."]]:
    """Noised images, the same noise for both images of a pair."""
    half = samples.clean.chunk(2)[0]
    eps = draw(half, generator).repeat(2, *[1] * (half.dim() - 1))
    return add_noise(samples.clean, eps, samples.signal, samples.noise), eps


def errors(denoiser: Denoiser, samples: Samples, x: Float[Tensor, "n ..."], eps: Float[Tensor, "n ..."], space: str) -> Float[Tensor, " n"]:
    """The mean squared error of each sample in float32, from one call of the network without guidance."""
    prediction = denoiser.backbone.prediction
    target = from_x0_and_eps(samples.clean, eps, samples.signal, samples.noise, prediction)
    output = denoiser(x, samples.timesteps, samples.conditioning)
    weight = space_weight(space, prediction, samples.signal, samples.noise)
    squares = (output.float() - target).square().flatten(1).mean(1)
    return squares * (weight.to(squares) if isinstance(weight, Tensor) else weight)


def draw(like: Float[Tensor, "b ..."], generator: torch.Generator) -> Float[Tensor, "b ..."]:
    """Unit noise of the shape and on the device of `like`, drawn where the generator is."""
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like.device)


def in_one_batch(batch: PairBatch, backbone: Backbone, generator: torch.Generator) -> Samples:
    """Winners, then losers; a pair shares its training timestep."""
    b = len(batch)
    if batch.losers.shape != batch.winners.shape:
        raise ValueError(f"losers have shape {tuple(batch.losers.shape)}, winners {tuple(batch.winners.shape)}; pairs must be of one size")
    winners, losers = batch.conditioning, batch.losers_conditioning
    losers = winners if losers is None else losers
    if not len(winners) == len(losers) == b:
        raise ValueError(f"{b} pairs need as many prompts, got {len(winners)} for the winners and {len(losers)} for the losers")
    clean = torch.cat([batch.winners, batch.losers]).float()
    timesteps = backbone.draw_timesteps(b, generator)
    signal, noise = backbone.levels(timesteps)
    return Samples(clean, joined(winners, losers), timesteps.repeat(2).to(clean.device), signal.repeat(2), noise.repeat(2))


def joined(first: Conditioning, second: Conditioning) -> Conditioning:
    """Both, one after the other, without their unconditional branches. ValueError where they do not fit into one batch."""
    one, other = first.conditional(), second.conditional()
    if (first.size, first.embedded_scale) != (second.size, second.embedded_scale):
        raise ValueError("losers_conditioning has another size or embedded_scale than conditioning; encode both alike")
    if {name: tensor.shape[1:] for name, tensor in one.items()} != {name: tensor.shape[1:] for name, tensor in other.items()}:
        raise ValueError("losers_conditioning has tensors of other shapes than conditioning; encode both captions to one length")
    tensors = {name: torch.cat([one[name], other[name]]) for name in one}
    return Conditioning(first.prompts + second.prompts, tensors, first.size, first.embedded_scale)
