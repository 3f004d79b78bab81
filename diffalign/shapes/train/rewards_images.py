"""What is done to the images the rewards are trained on, so that they hold up where a one-step generator and an optimiser take them.

`disturb` leaves a picture's meaning alone (noise, blotches, blur, brightness, a faint second picture), and so does `autoencoded` (what the
generators' decoder makes of a picture); `ruin` destroys it. Images are "b 3 h w" floats in [0, 1] unless said otherwise; everything
random comes from the generator or seed given, on the CPU, so runs repeat anywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from diffalign.types import Images

UNTOUCHED = 0.25  # share of images that `disturb` leaves as they are
NOISE, BLOTCHES, BLUR, SHIFT, CONTRAST, GHOST = 0.08, 0.06, 1.0, 0.08, 0.15, 0.15  # the strongest of each disturbance
LATENT_NOISE = 0.25  # strongest noise on latents of unit deviation
BLOCK = 16  # pixels; the side of the blocks that `ruin` shuffles


def _uniform(generator: torch.Generator, like: Images, low: float, high: float) -> Float[Tensor, "b 1 1 1"]:
    return (low + (high - low) * torch.rand(len(like), 1, 1, 1, generator=generator)).to(like.device)


def _normal(generator: torch.Generator, like: Images, side: int) -> Images:
    return torch.randn(len(like), 3, side, side, generator=generator).to(like.device)


def blur(images: Images) -> Images:
    """A 5 x 5 binomial blur, the edge repeated outward."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    kernel = (line[:, None] * line).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)


def disturb(images: Images, generator: torch.Generator) -> Images:
    """Each image with its own mild strengths of every disturbance, clamped to [0, 1]."""
    side = images.shape[-1]
    out = images.lerp(blur(images), _uniform(generator, images, -BLUR, BLUR).clamp(min=0))
    other = images[torch.randperm(len(images), generator=generator).to(images.device)]
    out = out.lerp(other, _uniform(generator, images, -2 * GHOST, GHOST).clamp(min=0))
    out = (out - 0.5) * _uniform(generator, images, 1 - CONTRAST, 1 + CONTRAST) + 0.5 + _uniform(generator, images, -SHIFT, SHIFT)
    coarse = F.interpolate(_normal(generator, images, side // 8), size=side, mode="bilinear")
    out = out + _uniform(generator, images, 0, BLOTCHES) * coarse + _uniform(generator, images, 0, NOISE) * _normal(generator, images, side)
    untouched = (torch.rand(len(images), 1, 1, 1, generator=generator) < UNTOUCHED).to(images.device)
    return torch.where(untouched, images, out.clamp(0, 1))


def ruin(images: Images, generator: torch.Generator) -> Images:
    """Each image made unreadable in one of three ways: blocks shuffled, mixed with another one, or drowned in blur and noise."""
    b, _, side, _ = images.shape
    grid = side // BLOCK
    blocks = images.unflatten(3, (grid, BLOCK)).unflatten(2, (grid, BLOCK)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(b, grid * grid, generator=generator).argsort(dim=1).to(images.device)
    blocks = blocks.gather(1, order[..., None, None, None].expand_as(blocks))
    shuffled = blocks.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    mixed = 0.5 * (images + images.roll(1, dims=0))
    noise = 0.25 * _normal(generator, images, side)
    drowned = F.interpolate(F.interpolate(images, size=side // 8, mode="area"), size=side, mode="bilinear") + noise
    way = torch.randint(3, (b, 1, 1, 1), generator=generator).to(images.device)
    return torch.where(way == 0, shuffled, torch.where(way == 1, mixed, drowned.clamp(0, 1)))


@torch.no_grad()
def autoencoded(images: UInt8[Tensor, "n h w 3"], autoencoder: AutoencoderKL, seed: int, batch: int = 128) -> UInt8[Tensor, "n h w 3"]:
    """Pictures encoded, their latents shaken a little, each with its own strength, and decoded: pictures of the generators' kind."""
    generator = torch.Generator().manual_seed(seed)
    deviation, device = 1 / autoencoder.config.scaling_factor, autoencoder.device
    parts = []
    for some in tqdm(images.split(batch), desc="through the autoencoder", mininterval=5):
        latents = autoencoder.encode(some.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator) * torch.rand(len(some), 1, 1, 1, generator=generator)
        decoded = autoencoder.decode(latents + LATENT_NOISE * deviation * noise.to(device)).sample
        parts.append(((decoded + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(parts)
