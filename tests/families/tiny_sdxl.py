"""SDXL in miniature: the base model, Turbo, Hyper (one step), Lightning (four steps) and DMD2 (four steps, each noised anew)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler

from tests.families import tiny_sd
from tests.families.parts import WIDTH, autoencoder, finish, tiny_text_encoder, tiny_text_encoder_with_projection, tiny_tokenizer

PROJECTION, TIME = 24, 8
UNET = {
    "cross_attention_dim": 2 * WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME,
    "projection_class_embeddings_input_dim": PROJECTION + 6 * TIME,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}
BASE = {**tiny_sd.BETAS, "timestep_spacing": "leading", "set_alpha_to_one": False, "clip_sample": False, "skip_prk_steps": True}


def base(scheduler: type = EulerDiscreteScheduler, **changes: Any) -> Any:
    """The base repository's scheduler, and another class made of its configuration as a preset does it."""
    own = EulerDiscreteScheduler.from_config({**BASE, "interpolation_type": "linear", "use_karras_sigmas": False})
    return scheduler.from_config(own.config, **changes)


def turbo() -> Any:
    return EulerAncestralDiscreteScheduler(**tiny_sd.BETAS, timestep_spacing="trailing")


def build(scheduler: Callable[[], Any], vae: dict[str, Any] | None = None, **network: Any) -> Any:
    def make(cls: type, dtype: Any) -> Any:
        tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
        other.pad_token = "!"  # as CLIP G's
        parts = {
            "vae": autoencoder(**{"scaling_factor": 0.13025, "force_upcast": True, **(vae or {})}),
            "text_encoder": tiny_text_encoder(len(tokenizer)),
            "text_encoder_2": tiny_text_encoder_with_projection(len(tokenizer), WIDTH, PROJECTION),
            "unet": tiny_sd.unet(**{**UNET, **network}),
        }
        return cls(**finish(parts, dtype), tokenizer=tokenizer, tokenizer_2=other, scheduler=scheduler(), add_watermarker=False)

    return make


OTHER = {"height": 48, "width": 80}
UNGUIDED = {"guided": False, "other_size": OTHER}
ROWS = (
    {
        "preset": "sdxl",
        "build": build(base),
        "call": {"num_inference_steps": 4, "guidance_scale": 5.0},
        "other_size": OTHER,
        "reload_atol": 3e-6,  # latents divided by 0.13: one value of 12288 is 1.04e-6 off, by the order of sums
    },
    {"preset": "sdxl-turbo", "build": build(turbo), "call": {"num_inference_steps": 1, "guidance_scale": 0.0}, **UNGUIDED},
    {
        "preset": "sdxl-turbo",
        "name": "sdxl-turbo-noising",  # more than one step draws noise
        "build": build(turbo),
        "call": {"num_inference_steps": 3, "guidance_scale": 0.0},
        "first_order": False,
        **UNGUIDED,
    },
    {
        "preset": "hyper-sdxl",
        "build": build(lambda: base(LCMScheduler)),
        "call": {"timesteps": [800], "guidance_scale": 0.0},
        **UNGUIDED,
    },
    {
        "preset": "sdxl-lightning",
        "build": build(lambda: base(timestep_spacing="trailing")),
        "call": {"num_inference_steps": 4, "guidance_scale": 0.0},
        **UNGUIDED,
    },
    {
        "preset": "sdxl-dmd2",
        "build": build(lambda: base(LCMScheduler)),
        "call": {"timesteps": [999, 749, 499, 249], "guidance_scale": 0.0},
        "first_order": False,
        **UNGUIDED,
    },
)
