"""Builders of tiny real components: the classes users have, at a size that runs in milliseconds. Random weights, the same every time."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.pipelines.families.stable_diffusion import AlignedStableDiffusionPipeline

MAX_TOKENS = 32  # with the two marks; every letter is a token here, so a prompt of more than 30 letters is cut
WIDTH = 32


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with no merges but "re" and "ed": otherwise one token for each byte, so nothing is unknown."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "re", "ed</w>", "<|startoftext|>", "<|endoftext|>"]
    merges = [("r", "e"), ("e", "d</w>")]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS)


def tiny_text_encoder(vocabulary: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def tiny_vae() -> AutoencoderKL:
    """32x32 pixels to 4x16x16 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def tiny_scheduler(**changes: object) -> DDIMScheduler:
    """DDIM as the shapes models have it; prediction_type="sample" with one step is shapes-turbo."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,  # what StableDiffusionPipeline insists on
        "timestep_spacing": "trailing",
    }
    return DDIMScheduler(**{**settings, **changes})


def ancestral_scheduler() -> EulerAncestralDiscreteScheduler:
    """Draws noise at every step, as SDXL-Turbo's does."""
    return EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing")


def tiny_stable_diffusion(
    cls: type[StableDiffusionPipeline] = AlignedStableDiffusionPipeline, seed: int = 0, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of about 0.6 M random weights, 32x32 pixels. The same seed gives the same weights."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = {"vae": tiny_vae(), "text_encoder": tiny_text_encoder(len(tokenizer)), "unet": tiny_unet()}
    pipeline = cls(
        **{name: (module if dtype == torch.float32 else module.to(dtype)).eval() for name, module in modules.items()},
        tokenizer=tokenizer,
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
