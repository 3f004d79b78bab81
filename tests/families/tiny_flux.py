"""FLUX.1 in miniature: schnell, dev with its guidance as an input, and dev with true classifier-free guidance beside that.

Scheduler and autoencoder are configured as published (from memory): schnell without shift, dev's shift grows with the image.
"""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.families.parts import WIDTH, autoencoder, finish, tiny_t5_tokenizer, tiny_text_encoder, tiny_tokenizer, wake

T5_WIDTH = 24
VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
SHIFTS = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False, **SHIFTS}
DEV = {"shift": 3.0, "use_dynamic_shifting": True, **SHIFTS}


def transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )


def build(guidance_embeds: bool, scheduler: dict[str, Any]) -> Any:
    def make(cls: type, dtype: Any) -> Any:
        tokenizer, words = tiny_tokenizer(), tiny_t5_tokenizer()
        config = T5Config(vocab_size=len(words), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        parts = {
            "vae": autoencoder(16, **VAE),
            "text_encoder": tiny_text_encoder(len(tokenizer)),
            "text_encoder_2": T5EncoderModel(config),
            "transformer": wake(transformer(guidance_embeds)),
        }
        return cls(**finish(parts, dtype), tokenizer=tokenizer, tokenizer_2=words, scheduler=FlowMatchEulerDiscreteScheduler(**scheduler))

    return make


SIZE = {"height": 64, "width": 64}
OTHER = {"height": 48, "width": 80}
RELOAD = 5e-6  # the latents are divided by 0.36 before decoding; with the weights of the file copied to the old places it is 0
ROWS = (
    {
        "preset": "flux-schnell",
        "build": build(False, SCHNELL),
        "call": {**SIZE, "num_inference_steps": 4, "guidance_scale": 0.0},
        "texts": {"max_sequence_length": 256},
        "guided": False,
        "other_size": OTHER,
        "reload_atol": RELOAD,
    },
    {
        "preset": "flux-dev",
        "build": build(True, DEV),
        "call": {**SIZE, "num_inference_steps": 3, "guidance_scale": 3.5},
        "guided": False,
        "other_size": OTHER,
        "reload_atol": RELOAD,
    },
    {
        "preset": "flux-dev",
        "name": "flux-dev-true-cfg",
        "build": build(True, DEV),
        "call": {**SIZE, "num_inference_steps": 3, "guidance_scale": 3.5, "true_cfg_scale": 4.0},
        "texts": {"negative_prompt": "green"},
        "other_size": OTHER,
        "reload_atol": RELOAD,
    },
)
