"""The autoencoder of the shapes world: an ordinary AutoencoderKL, 64 x 64 pixels to 8 x 8 x 8 latents.

Two stages. "autoencoder" trains both halves and fixes the latents. "decoder" then trains the decoder alone, with five times the weight
on shapes and their edges, to draw a clean picture from latents that are a little wrong, as those of a generator are: noisy, and in places
drawn towards the latents of the same scene in other colours (`disturbed`). Latents do not change, so models trained on them stay valid.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from torch import Tensor

from diffalign.shapes.scenes import COLORS, GROUND, Scene, Thing, render
from diffalign.shapes.train import data, loop

CONFIG = loop.LoopConfig(steps=2800, lr=3e-3, seed=11, ema_decay=0.995)
BATCH = 16
SCENES = 12_000
KL_WEIGHT = 1e-6
DECODER_CONFIG = loop.LoopConfig(steps=3000, lr=2e-3, seed=15, ema_decay=0.995, warmup=50)
FOREGROUND_WEIGHT = 4.0  # added to the 1 that every pixel has, where a shape is within two pixels

NOISE = 0.25  # largest deviation of the noise on a latent of unit deviation
MIXING = 0.45  # largest share of the other colours in a latent: less than half, so that the right one can be told
CLEAN = 0.25  # share of latents that are left as they are, but for noise of deviation 0.05


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def train(run: Path, config: loop.LoopConfig = CONFIG, scenes: int = SCENES, device: str = "cpu") -> AutoencoderKL:
    """Train (or resume), set `scaling_factor` so that latents have unit standard deviation, return the averaged model."""
    torch.manual_seed(config.seed)
    model = build().to(device)
    trainee = loop.Trainee({"vae": model}, config, run / "autoencoder.safetensors")
    dataset = data.draw(scenes, config.seed)

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(dataset.images), (BATCH,), generator=generator)
        x = data.to_model_range(dataset.images[index]).to(device)
        posterior = model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        reconstruction = model.decode(posterior.mean + posterior.std * noise).sample
        error = F.l1_loss(reconstruction, x)
        loss = error + F.mse_loss(reconstruction, x) + KL_WEIGHT * posterior.kl().mean()
        return loss, {"l1": error.item()}

    loop.train(trainee, loss_of, "autoencoder")
    trainee.use_average()
    model.eval()
    with torch.no_grad():
        parts = dataset.images[:2048].split(256)
        latents = torch.cat([model.encode(data.to_model_range(part).to(device)).latent_dist.mean for part in parts])
    model.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return model


def train_decoder(
    run: Path, model: AutoencoderKL, config: loop.LoopConfig = DECODER_CONFIG, scenes: int = SCENES, device: str = "cpu"
) -> AutoencoderKL:
    """Train (or resume) the decoder on the frozen encoder's latents; returns the model with the averaged decoder."""
    torch.manual_seed(config.seed)
    model = model.to(device).requires_grad_(False)
    halves = {"decoder": model.decoder.requires_grad_(True), "post_quant_conv": model.post_quant_conv.requires_grad_(True)}
    trainee = loop.Trainee(halves, config, run / "decoder.safetensors")
    dataset = data.draw(scenes, config.seed)
    repainted = repaint(dataset.scenes, config.seed)

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(dataset.images), (BATCH,), generator=generator)
        x, other = (data.to_model_range(images[index]).to(device) for images in (dataset.images, repainted))
        with torch.no_grad():
            latents, others = (model.encode(images).latent_dist.mean for images in (x, other))
        latents = disturbed(latents, others, 1 / model.config.scaling_factor, generator)
        error = (model.decode(latents).sample - x).abs()
        ground = data.to_model_range(torch.tensor(GROUND, dtype=torch.uint8).view(1, 1, 1, 3)).to(device)
        shape = ((x - ground).abs().amax(dim=1, keepdim=True) > 0.05).float()
        weight = 1 + FOREGROUND_WEIGHT * F.max_pool2d(shape, 5, stride=1, padding=2)
        return (weight * (error + error.square())).mean(), {"l1": error.mean().item()}

    loop.train(trainee, loss_of, "decoder")
    trainee.use_average()
    return model.eval()


def repaint(scenes: list[Scene], seed: int) -> UInt8[Tensor, "n 64 64 3"]:
    """Every scene drawn again with each thing in another colour."""
    rng = np.random.default_rng([seed, 5])
    names = list(COLORS)

    def other(thing: Thing) -> Thing:
        return dataclasses.replace(thing, color=names[(names.index(thing.color) + int(rng.integers(1, len(names)))) % len(names)])

    return torch.from_numpy(np.stack([render(Scene(tuple(map(other, scene.things)))) for scene in scenes]))


def disturbed(
    latents: Float[Tensor, "b c h w"], others: Float[Tensor, "b c h w"], deviation: float, generator: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """Latents with noise, and in smooth patches drawn towards `others`, both by an amount drawn for each of them.

    deviation: of the latents; the amounts are in units of it.
    """
    b, device = len(latents), latents.device
    sigma, share, kept = torch.rand(3, b, 1, 1, 1, generator=generator)
    patches = F.interpolate(torch.rand(b, 1, 3, 3, generator=generator), latents.shape[2:], mode="bilinear", align_corners=True)
    clean = kept < CLEAN
    mixing = torch.where(clean, 0.0, MIXING * share * patches).to(device)
    sigma = torch.where(clean, 0.05, NOISE * sigma).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    return torch.lerp(latents, others, mixing) + deviation * sigma * noise
