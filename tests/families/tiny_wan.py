"""Wan 2.1 in miniature: text to video, with its causal autoencoder, UMT5, and UniPC over a shifted flow."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.families.parts import finish, tiny_t5_tokenizer, wake

UMT5_WIDTH = 24


def transformer(**more: Any) -> WanTransformer3DModel:
    settings = {"in_channels": 16, "out_channels": 16, **more}
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=UMT5_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **settings,
    )


def autoencoder(**more: Any) -> AutoencoderKLWan:
    """Latents' mean and std are those of Wan 2.1, which are the class's defaults."""
    return AutoencoderKLWan(**{"base_dim": 4, "z_dim": 16, "num_res_blocks": 1, **more})


def parts() -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and the networks but for a second transformer."""
    tokenizer = tiny_t5_tokenizer()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=UMT5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, {"vae": autoencoder(), "text_encoder": UMT5EncoderModel(config), "transformer": wake(transformer())}


def scheduler(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    """As published (from memory): second order, bh2, over sigmas of the flow."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def build(cls: type, dtype: Any) -> Any:
    tokenizer, networks = parts()
    return cls(**finish(networks, dtype), tokenizer=tokenizer, scheduler=scheduler())


ROWS = (
    {
        "preset": "wan2.1-1.3b",
        "build": build,
        "call": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 5.0},
        "other_size": {"height": 32, "width": 48, "num_frames": 9},
        "first_order": False,
        "reload_atol": 1e-5,  # decoding multiplies latents by up to 3.3; with the weights of the file copied to the old places it is 0
    },
)
