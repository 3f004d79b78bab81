"""Stable Diffusion 3 in miniature: SD3, SD3.5 medium and large Turbo, and SD3 without T5 as people load it to save memory."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.families.parts import autoencoder, finish, tiny_t5_tokenizer, tiny_text_encoder_with_projection, tiny_tokenizer, wake

T5_WIDTH = 48
VAE = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}


def transformer(**more: Any) -> SD3Transformer2DModel:
    settings = {"sample_size": 8, "patch_size": 2, "pos_embed_max_size": 12, "joint_attention_dim": T5_WIDTH, **more}
    return SD3Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 24,
        **settings,
    )


def t5(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=T5_WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=2))


def build(with_t5: bool = True, shift: float = 3.0, **network: Any) -> Any:
    def make(cls: type, dtype: Any) -> Any:
        tokenizer, other, third = tiny_tokenizer(), tiny_tokenizer(), tiny_t5_tokenizer() if with_t5 else None
        other.pad_token = "!"  # as CLIP G's
        parts = {
            "vae": autoencoder(16, **VAE),
            "text_encoder": tiny_text_encoder_with_projection(len(tokenizer), 16, 16),
            "text_encoder_2": tiny_text_encoder_with_projection(len(tokenizer), 32, 24),
            "transformer": wake(transformer(**network)),
        }
        if third is not None:
            parts["text_encoder_3"] = t5(len(third))
        none = {} if with_t5 else {"text_encoder_3": None}
        return cls(**finish(parts, dtype), **none, tokenizer=tokenizer, tokenizer_2=other, tokenizer_3=third,
                   scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))  # fmt: skip

    return make


OTHER = {"height": 48, "width": 80}
RELOAD = 5e-6  # 16 channels of latents up to 4.6, guided; with the file's weights copied to the old places the difference is 0
ROWS = (
    {
        "preset": "sd3-medium",
        "build": build(),
        "call": {"num_inference_steps": 3, "guidance_scale": 7.0},
        "other_size": OTHER,
        "reload_atol": RELOAD,
    },
    {
        "preset": "sd3.5-medium",
        "build": build(qk_norm="rms_norm", dual_attention_layers=(0,)),
        "call": {"num_inference_steps": 3, "guidance_scale": 4.5},
        "other_size": OTHER,
        "reload_atol": RELOAD,
    },
    {
        "preset": "sd3.5-large-turbo",
        "build": build(qk_norm="rms_norm"),
        "call": {"num_inference_steps": 4, "guidance_scale": 0.0},
        "guided": False,
        "other_size": OTHER,
        "reload_atol": RELOAD,
    },
    {  # as shapes-flow: no T5, patches of one latent, no shift
        "preset": "sd3-medium",
        "name": "sd3-without-t5",
        "build": build(with_t5=False, shift=1.0, patch_size=1, joint_attention_dim=48, qk_norm="rms_norm"),
        "call": {"num_inference_steps": 3, "guidance_scale": 3.0},
        "other_size": {"height": 40, "width": 72},
        "reload_atol": RELOAD,
        "reload": {"text_encoder_3": None, "tokenizer_3": None},  # not optional to the stock class, which refuses the folder otherwise
    },
)
