"""SANA and SANA-Sprint in miniature: DPM-Solver++ on a flow of shift 3, and steps on the circle; Gemma 2 and a DC autoencoder whole.

The schedulers' settings, the networks' sample_size and the autoencoder's kinds of blocks are those of the published repositories, from
memory. The instruction that goes before every prompt is the stock call's own.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel, SCMScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.families.parts import WIDTH, finish, wake
from tests.reward_models.tiny_tokenizers import WORDS

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
LATENTS = 8


def gemma_tokenizer() -> GemmaTokenizer:
    """BPE over the instruction's words and every byte; "<bos>" in front and nothing at the end, as Gemma has it."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    trained.train_from_iterator(["\n".join(INSTRUCTION), WORDS], trainer)
    model = json.loads(trained.to_str())["model"]
    return GemmaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], add_bos_token=True)


def gemma(vocabulary: int) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2Model(config)


def dc_autoencoder() -> AutoencoderDC:
    """32 pixels to one latent each way; convolutions in the outer half, attention over several scales in the inner one."""
    widths = (8, 8, 8, 16, 16, 16)
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales = ((), (), (), (5,), (5,), (5,))
    return AutoencoderDC(
        latent_channels=LATENTS,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )


def transformer(**more: Any) -> SanaTransformer2DModel:
    settings = {"sample_size": 32, **more}
    return SanaTransformer2DModel(
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        **settings,
    )


def solver() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def circle() -> SCMScheduler:
    return SCMScheduler(prediction_type="trigflow", sigma_data=0.5)


def build(scheduler: Any, **network: Any) -> Any:
    def make(cls: type, dtype: torch.dtype) -> Any:
        tokenizer = gemma_tokenizer()
        parts = {"vae": dc_autoencoder(), "text_encoder": gemma(len(tokenizer)), "transformer": wake(transformer(**network))}
        return cls(**finish(parts, dtype), tokenizer=tokenizer, scheduler=scheduler())

    return make


EXACT = {"use_resolution_binning": False}
SMALL = {"height": 128, "width": 128, **EXACT}  # the published networks bin to 1024 pixels
OTHER = {"height": 96, "width": 160}
SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
ROWS = (
    {
        "preset": "sana",
        "build": build(solver),
        "call": {"num_inference_steps": 4, "guidance_scale": 4.5, **SMALL},
        "other_size": OTHER,
        "first_order": False,
    },
    {  # as Sana_1600M_512px, with SANA 1.5's scale of time: binned
        "preset": "sana",
        "name": "sana-512",
        "build": build(solver, sample_size=16, qk_norm="rms_norm_across_heads", timestep_scale=0.5),
        "call": {"num_inference_steps": 2, "guidance_scale": 4.5, "height": 512, "width": 512},
        "other_size": {"height": 301, "width": 433},
        "exact": EXACT,
        "first_order": False,
    },
    {
        "preset": "sana-sprint",
        "build": build(circle, **SPRINT),
        "call": {"num_inference_steps": 2, "guidance_scale": 4.5, **SMALL},
        "guided": False,
        "other_size": OTHER,
        "first_order": False,
    },
    {
        "preset": "sana-sprint",
        "name": "sana-sprint-1",
        "build": build(circle, **SPRINT),
        "call": {"num_inference_steps": 1, "intermediate_timesteps": None, "guidance_scale": 4.5, **SMALL},
        "guided": False,
        "other_size": OTHER,
    },
)
