"""PixArt in miniature: alpha and Sigma (DPM-Solver++), alpha with binned sizes, alpha's one-step DMD student (DDPM from t = 400).

The schedulers' settings are those of the published repositories, from memory; the networks keep sample_size, which decides on binning
and micro-conditions, and their eight channels of output.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.families.parts import WIDTH, autoencoder, finish, tiny_t5_tokenizer, wake

BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def transformer(**more: Any) -> PixArtTransformer2DModel:
    settings = {"sample_size": 128, "patch_size": 2, **more}
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,  # 24 channels: a third each for the time, the resolution and the aspect ratio
        cross_attention_dim=24,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        **settings,
    )


def solver() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**BETAS, algorithm_type="dpmsolver++", solver_order=2, lower_order_final=True)


def build(scheduler: Any = solver, factor: float = 0.18215, **network: Any) -> Any:
    def make(cls: type, dtype: torch.dtype) -> Any:
        tokenizer = tiny_t5_tokenizer()
        config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
        parts = {
            "vae": autoencoder(scaling_factor=factor),
            "text_encoder": T5EncoderModel(config),
            "transformer": wake(transformer(**network)),
        }
        return cls(**finish(parts, dtype), tokenizer=tokenizer, scheduler=scheduler())

    return make


EXACT = {"use_resolution_binning": False}
SMALL = {"height": 64, "width": 64, **EXACT}  # the published networks bin to 1024 pixels
OTHER = {"height": 48, "width": 80}
ROWS = (
    {
        "preset": "pixart-alpha",
        "build": build(),
        "call": {"num_inference_steps": 4, "guidance_scale": 4.5, **SMALL},
        "other_size": OTHER,
        "first_order": False,
    },
    {  # as PixArt-XL-2-256x256: binned, and no micro-conditions
        "preset": "pixart-alpha",
        "name": "pixart-alpha-256",
        "build": build(sample_size=32, patch_size=4),
        "call": {"num_inference_steps": 3, "guidance_scale": 4.5},
        "other_size": {"height": 201, "width": 333},
        "exact": EXACT,
        "first_order": False,
    },
    {
        "preset": "pixart-sigma",
        "build": build(factor=0.13025, use_additional_conditions=False),
        "call": {"num_inference_steps": 4, "guidance_scale": 4.5, **SMALL},
        "other_size": OTHER,
        "first_order": False,
    },
    {
        "preset": "pixart-dmd",
        "build": build(lambda: DDPMScheduler(**BETAS, variance_type="fixed_small", clip_sample=False), sample_size=64),
        "call": {"timesteps": [400], "guidance_scale": 1.0, **SMALL},
        "guided": False,
        "other_size": OTHER,
    },
)
