"""Stable Diffusion in miniature: SD 1.5 (PNDM), SD 2.1 (velocity, DDIM), SD-Turbo (Euler, trailing), with their published schedulers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel

from tests.families.parts import WIDTH, autoencoder, finish, tiny_text_encoder, tiny_tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def unet(**more: Any) -> UNet2DConditionModel:
    settings = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH, "attention_head_dim": 2, **more}
    return UNet2DConditionModel(
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        **settings,
    )


def build(scheduler: Any):
    def make(cls: type, dtype: torch.dtype) -> Any:
        tokenizer = tiny_tokenizer()
        parts = {"vae": autoencoder(), "text_encoder": tiny_text_encoder(len(tokenizer)), "unet": unet()}
        return cls(**finish(parts, dtype), tokenizer=tokenizer, scheduler=scheduler(), safety_checker=None, feature_extractor=None,
                   requires_safety_checker=False)  # fmt: skip

    return make


OTHER = {"height": 48, "width": 80}
ROWS = (
    {
        "preset": "sd15",
        "build": build(lambda: PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False)),
        "call": {"num_inference_steps": 4, "guidance_scale": 7.5},
        "other_size": OTHER,
        "first_order": False,
    },
    {
        "preset": "sd21",
        "build": build(lambda: DDIMScheduler(**BETAS, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False)),
        "call": {"num_inference_steps": 4, "guidance_scale": 7.5},
        "other_size": OTHER,
    },
    {
        "preset": "sd-turbo",
        "build": build(lambda: EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")),
        "call": {"num_inference_steps": 1, "guidance_scale": 0.0},
        "guided": False,
        "other_size": OTHER,
    },
)
