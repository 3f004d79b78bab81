"""The autoencoder of the shapes world: an ordinary AutoencoderKL, 64 x 64 pixels to 8 x 8 x 8 latents."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from diffalign.shapes.train import data, loop

CONFIG = loop.LoopConfig(steps=2800, lr=3e-3, seed=11, ema_decay=0.995)
BATCH = 16
SCENES = 12_000
KL_WEIGHT = 1e-6


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
        latents = torch.cat([model.encode(data.to_model_range(dataset.images[i : i + 256]).to(device)).latent_dist.mean for i in range(0, 2048, 256)])
    model.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return model
