"""The mathematics of Gaussian noise that the methods share, as pure functions: its norm, its density, its draws, its health.

Noise is float32 of unit variance, "b ..."; d is the number of entries of one sample. Every function treats each sample alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.files import whole_file


def spread(values: Shaped[Tensor, " b"], like: Float[Tensor, "b ..."]) -> Tensor:
    """One value per sample, shaped to multiply `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def sample_dot(a: Float[Tensor, "b ..."], b: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """The inner product of each sample of `a` with the same sample of `b`, in float32 at least."""
    return (a.float() * b.float()).flatten(1).sum(1)


def sample_norm(x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """The L2 norm of each sample, in float32: half precision overflows at r^2 = 65504, which a 64x64x16 latent reaches."""
    return sample_dot(x, x).sqrt()


def norm_log_density(noise: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """The log-density of the noise's norm r under N(0, I), less its maximum: K(r) - K(sqrt(d - 1)), zero at best, negative elsewhere.

    K(r) = (d - 1) ln r - r^2 / 2 is the chi distribution with d degrees of freedom without its constant (Samuel et al. 2023; ReNO, eq. 3).
    Written with u = r^2 / (d - 1) as (d - 1)/2 (ln u - u + 1), as the two terms of K are near 10^5 and cancel: float32 would leave noise.
    """
    d = noise[0].numel() if len(noise) else 2
    if d < 2:
        raise ValueError(f"noise has {d} entry per sample; the density of its norm needs at least 2.")
    excess = sample_dot(noise, noise) / (d - 1) - 1
    return (d - 1) / 2 * (torch.log1p(excess) - excess)


def tangent(vector: Float[Tensor, "b ..."], point: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """`vector` without its component along `point`: the part that moves along the sphere on which `point` lies."""
    along = sample_dot(vector, point) / sample_dot(point, point).clamp_min(torch.finfo(torch.float32).tiny)
    return vector - spread(along, point) * point


def with_norm(x: Float[Tensor, "b ..."], norm: Float[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """`x` scaled so that each sample has the given norm."""
    return x * spread(norm / sample_norm(x).clamp_min(torch.finfo(torch.float32).tiny), x)


def seeded_noise(shape: Sequence[int], seeds: Sequence[int], draw: int, device: torch.device | str | None = None) -> Float[Tensor, "k ..."]:
    """Draw number `draw` of one sample of the given shape per seed, float32: sample i depends on (seeds[i], draw) alone.

    It is drawn on the CPU from a generator of its own, so neither the batch, nor the order, nor the device changes it; the two numbers
    are hashed together, so neighbouring seeds share no draws.
    """
    samples = []
    for seed in seeds:
        hashed = int(np.random.SeedSequence([seed % 2**64, draw]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(hashed)
        samples.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float32))
    return torch.stack(samples).to(device)


def noise_statistics(noise: Float[Tensor, "b ..."]) -> dict[str, Float[Tensor, " b"]]:
    """How much each sample still looks like white noise; in brackets what N(0, I) gives, within about 1 / sqrt(d).

    noise_norm (sqrt(d)), noise_mean (0), noise_variance (1), noise_autocorrelation (0): the mean product of neighbours over the variance,
    along height and width of a "b c h w" latent, along tokens of a packed "b n c" one, along the entries of a flat one.
    """
    x = noise.detach().float()
    flat = x.flatten(1)
    mean = flat.mean(1)
    variance = flat.var(1, correction=0)
    centred = x - spread(mean, x)
    products = []
    for axis in range(2, x.dim()) if x.dim() > 3 else [1]:
        length = x.shape[axis]
        if length > 1:
            products.append((centred.narrow(axis, 0, length - 1) * centred.narrow(axis, 1, length - 1)).flatten(1).mean(1))
    neighbours = torch.stack(products).mean(0) if products else torch.zeros_like(mean)
    return {
        "noise_norm": sample_norm(x),
        "noise_mean": mean,
        "noise_variance": variance,
        "noise_autocorrelation": neighbours / variance.clamp_min(torch.finfo(torch.float32).tiny),
    }


@dataclass(frozen=True)
class NoiseDistribution:
    """N(mean, diag(std^2)) over the initial noise, one for each sample; N(0, I) is what a model was trained with."""

    mean: Float[Tensor, "b ..."]
    std: Float[Tensor, "b ..."]

    def sample(self, seeds: Sequence[int], draw: int = 0) -> Float[Tensor, "b ..."]:
        """Draw number `draw` of every sample: sample i depends on its distribution and (seeds[i], draw) alone."""
        if len(seeds) != len(self.mean):
            raise ValueError(f"seeds must hold one entry for each of the {len(self.mean)} distributions, got {len(seeds)}")
        return self.mean + self.std * seeded_noise(self.mean.shape[1:], seeds, draw, self.mean.device)

    def kl_per_entry(self) -> Float[Tensor, " b"]:
        """KL(N(mean, std^2) || N(0, 1)) in nats, averaged over a sample's entries, so that it means the same at every size."""
        return (0.5 * (self.std.square() + self.mean.square() - 1) - self.std.log()).flatten(1).mean(1)

    def log_density_per_entry(self, noise: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
        """ln N(noise; mean, std^2) averaged over a sample's entries, without the constant -ln(2 pi) / 2."""
        return (-0.5 * ((noise - self.mean) / self.std).square() - self.std.log()).flatten(1).mean(1)

    def rows(self, rows: Sequence[int]) -> NoiseDistribution:
        """The distributions of samples `rows`, in that order."""
        chosen = torch.as_tensor(list(rows), dtype=torch.long, device=self.mean.device)
        return NoiseDistribution(self.mean[chosen], self.std[chosen])

    def save(self, path: str | Path) -> None:
        """One safetensors file with `mean` and `std`, float32, replaced whole or not at all."""
        tensors = {name: getattr(self, name).detach().float().cpu().contiguous() for name in ("mean", "std")}
        with whole_file(Path(path)) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: str | Path) -> NoiseDistribution:
        """What `save` wrote. ValueError where the file holds something else."""
        tensors = load_file(path)
        if set(tensors) != {"mean", "std"} or tensors["mean"].shape != tensors["std"].shape:
            raise ValueError(f"{path} holds {', '.join(sorted(tensors))}, not a mean and a std of one shape, as save() writes them")
        return cls(tensors["mean"], tensors["std"])
