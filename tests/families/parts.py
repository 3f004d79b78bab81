"""Tiny text encoders, tokenizers and autoencoders that several families share, and what makes random weights say something."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from tests.reward_models.tiny_tokenizers import t5_tokenizer
from tests.tiny import MAX_TOKENS, WIDTH, tiny_text_encoder, tiny_tokenizer

__all__ = [
    "WIDTH",
    "autoencoder",
    "finish",
    "tiny_t5_tokenizer",
    "tiny_text_encoder",
    "tiny_text_encoder_with_projection",
    "tiny_tokenizer",
    "wake",
]


def wake(module: nn.Module) -> nn.Module:
    """Matrices that start at zero (gates, last projections) get weights, or neither prompt nor noise would matter."""
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    return module


def autoencoder(channels: int = 4, **more: Any) -> AutoencoderKL:
    """8 pixels to one latent each way, as in the real models."""
    settings = {"scaling_factor": 0.18215, "latent_channels": channels, "sample_size": 32, "norm_num_groups": 4, **more}
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        **settings,
    )


def tiny_t5_tokenizer(limit: int = 512) -> PreTrainedTokenizerFast:
    """T5's kind of tokenizer over a few words and every character."""
    return PreTrainedTokenizerFast(
        tokenizer_object=t5_tokenizer(), model_max_length=limit, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_text_encoder_with_projection(vocabulary: int, width: int = WIDTH, projection: int = WIDTH) -> CLIPTextModelWithProjection:
    """Two layers, since the families that use it read the penultimate state."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModelWithProjection(config)


def finish(modules: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
    """In evaluation mode, in a dtype."""
    return {name: module.to(dtype).eval() for name, module in modules.items()}
