"""Images found by climbing a reward: gradient ascent on the noise of a one-step generator, as ReNO does (arXiv 2406.04312).

Whatever fools a reward is what such a climb finds. Judged and given back to the trainer, these images close the holes:

    z <- sqrt(d) normalised(z + eta sqrt(d) grad r(G(z, c), c) / |grad|),

that is, a step of fixed length along the gradient, kept on the sphere where noise lives. The images kept of one climb are its start,
its end and some between, so that a prompt's group shows what the climb gained and what it broke.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffalign.shapes.train import data
from diffalign.shapes.train.judged import Maker

RewardOf = Callable[[Float[Tensor, "n 3 h w"], list[str]], Float[Tensor, " n"]]


@dataclass(frozen=True)
class ClimbConfig:
    """How far a climb goes."""

    steps: int = 12  # evaluations with a gradient
    length: float = 0.12  # eta: of a step, as a share of the noise's norm
    kept: tuple[int, ...] = (0, 4, 8, 12)  # images kept, by how many steps were taken before
    bfloat16: bool = True  # multiply in bfloat16


def climber(pipeline: StableDiffusionPipeline, reward: RewardOf, settings: ClimbConfig = ClimbConfig()) -> Maker:
    """A maker whose groups are whole climbs: of each prompt's images, every len(kept) are stations of one.

    pipeline: one step, prediction_type "sample", unguided. Raises ValueError where a group is not made of whole climbs.
    """
    unet, vae, device = pipeline.unet, pipeline.vae, pipeline.device
    for module in (unet, vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    last = pipeline.scheduler.config.num_train_timesteps - 1

    def decoded(noise: Tensor, states: Tensor) -> Float[Tensor, "n 3 h w"]:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            latents = unet(noise, last, states).sample
            images = vae.decode(latents / vae.config.scaling_factor).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def make(texts: list[str], generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
        stations = len(settings.kept)
        mine = texts[::stations]
        if [text for text in mine for _ in range(stations)] != texts:
            raise ValueError(f"a group must hold whole climbs of {stations} images; got {len(texts)} prompts that do not repeat so")
        ids = data.tokenize(pipeline.tokenizer, [mine])[0].to(device)
        with torch.no_grad():
            states = pipeline.text_encoder(ids).last_hidden_state
        side = unet.config.sample_size
        z = torch.randn(len(mine), unet.config.in_channels, side, side, generator=generator).to(device)
        kept = []
        for step in range(settings.steps + 1):
            z = z.detach().requires_grad_(True)
            images = decoded(z, states)
            if step in settings.kept:
                kept.append(images.detach().cpu())
            if step < settings.steps:
                (gradient,) = torch.autograd.grad(reward(images, mine).sum(), z)
                z = on_sphere(z.detach(), gradient, settings.length)
        return torch.stack(kept, dim=1).flatten(0, 1)

    return make


def on_sphere(z: Float[Tensor, "n ..."], gradient: Float[Tensor, "n ..."], length: float) -> Float[Tensor, "n ..."]:
    """z after a step of `length` sqrt(d) along the gradient, scaled back to norm sqrt(d); where there is no gradient, z unmoved."""
    flat, along = z.flatten(1), gradient.flatten(1)
    root = flat.shape[1] ** 0.5
    size = along.norm(dim=1, keepdim=True)
    moved = flat + length * root * along / size.clamp(min=1e-12)
    return (moved * (root / moved.norm(dim=1, keepdim=True))).where(size > 0, flat).view_as(z)
