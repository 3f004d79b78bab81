"""`shapes`: the multi-step model. Stable Diffusion's architecture at toy size, eps-prediction, one empty prompt in ten for guidance.

As in Stable Diffusion the text encoder was trained before (`text.py`) and stays frozen here.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffalign.diffusion import add_noise
from diffalign.rules import RELATIONS
from diffalign.shapes.train import data, loop, text

CONFIG = loop.LoopConfig(steps=8000, lr=1e-3, seed=13, ema_decay=0.9995, warmup=300)
BATCH = 32
SCENES = 40_000
RELATION_WEIGHT = 3.0  # how much likelier a caption that says where things stand is drawn than another short one
EMPTY_PROMPTS = 0.1
JUDGED_STEPS = 20
MIN_SNR_GAMMA = 5.0  # Hang et al., "Efficient Diffusion Training via Min-SNR Weighting" (arXiv 2303.09556)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text.WIDTH,
        attention_head_dim=4,  # diffusers' misnomer: the number of heads
        norm_num_groups=16,
    )


def build_scheduler(**changes: object) -> DDIMScheduler:
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # unused by "trailing"; the stock pipeline warns of anything else
        "prediction_type": "epsilon",
    }
    return DDIMScheduler(**settings | changes)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, device: str) -> Float[Tensor, "n 8 8 8"]:
    """Scaled latents (posterior means) of 8-bit images, on the CPU."""
    parts = [vae.encode(data.to_model_range(batch).to(device)).latent_dist.mean.cpu() for batch in images.split(256)]
    return torch.cat(parts) * vae.config.scaling_factor


def caption_choice(generator: torch.Generator, count: int) -> Tensor:
    """Which caption of each scene to show: a long one for one scene in ten, otherwise one of the short ones."""
    short = torch.randint(data.CAPTIONS_PER_SCENE - 1, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.1, data.CAPTIONS_PER_SCENE - 1, short)


def caption_weights(captions: list[list[str]]) -> Float[Tensor, "n k"]:
    """How likely each caption of each scene is drawn for a step, not normalised.

    The last caption of a scene is the long one, drawn a third as often as a short one. Relations are the hardest thing to learn,
    and chance names one in every fifth caption only.
    """
    weights = torch.tensor([[RELATION_WEIGHT if any(r in c for r in RELATIONS) else 1.0 for c in group] for group in captions])
    weights[:, -1] = 1 / 3
    return weights


def min_snr_weight(alphas: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """min(snr, gamma) / snr at cumulative alphas: what an eps-loss is multiplied by."""
    snr = alphas / (1 - alphas)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def train(
    run: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    config: loop.LoopConfig = CONFIG,
    scenes: int = SCENES,
    device: str = "cpu",
) -> UNet2DConditionModel:
    """Train (or resume) the U-Net; returns it with averaged weights."""
    torch.manual_seed(config.seed)
    unet = build_unet().to(device, memory_format=torch.channels_last)
    vae, encoder = vae.to(device), encoder.to(device).eval()
    trainee = loop.Trainee({"unet": unet}, config, run / "base.safetensors")
    dataset = data.draw(scenes, config.seed)
    latents = encode_images(vae, dataset.images, device)
    ids = data.tokenize(tokenizer, dataset.captions)
    empty = data.tokenize(tokenizer, [[""]])[0, 0]
    weights = caption_weights(dataset.captions)
    alphas = build_scheduler().alphas_cumprod

    def loss_of(step: int, generator: torch.Generator):
        drawn = torch.multinomial(weights.flatten(), BATCH, replacement=True, generator=generator)
        index = drawn // weights.shape[1]
        tokens = ids[index, drawn % weights.shape[1]]
        tokens = torch.where(torch.rand(BATCH, 1, generator=generator) < EMPTY_PROMPTS, empty, tokens)
        t = torch.randint(len(alphas), (BATCH,), generator=generator)
        noise = torch.randn(latents[index].shape, generator=generator)
        noisy = add_noise(latents[index], noise, alphas[t].sqrt(), (1 - alphas[t]).sqrt())
        with torch.no_grad():
            states = encoder(tokens.to(device)).last_hidden_state
        noisy = noisy.to(device, memory_format=torch.channels_last)
        predicted = unet(noisy, t.to(device), states).sample
        error = F.mse_loss(predicted, noise.to(device), reduction="none").mean(dim=(1, 2, 3))
        loss = (error * min_snr_weight(alphas[t]).to(device)).mean()
        return loss, {"mse": error.mean().item()}

    loop.train(trainee, loss_of, "shapes")
    trainee.use_average()
    return unet.eval()
