"""Stock pipelines of seven families around tiny real networks of random weights, without text encoders or autoencoders.

A prompt is a number, and stands for random embeddings drawn from it; every call returns latents. The same family has the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

TOKENS, WIDTH = 4, 8


@dataclass(frozen=True)
class Family:
    """build: network and scheduler -> pipeline. embeddings: argument -> shape, each also with "negative_". scale: the guidance argument."""

    name: str
    network: Callable[[], torch.nn.Module]
    build: Callable[[torch.nn.Module], diffusers.DiffusionPipeline]
    embeddings: dict[str, tuple[int, ...]]
    arguments: dict[str, Any] = field(default_factory=dict)
    scale: str = "guidance_scale"
    attribute: str = "transformer"
    latent: tuple[int, ...] = (4, 8, 8)
    images: str = "images"
    two_calls: bool = False

    def pipeline(self) -> diffusers.DiffusionPipeline:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = self.network().eval().requires_grad_(False)
            for parameter in network.parameters():  # some start at zero, where the prompt would not matter
                if parameter.dim() > 1:
                    parameter.normal_(0, (parameter[0].numel()) ** -0.5)
        pipeline = self.build(network)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def conditioning(self, prompts: Sequence[int]) -> dict[str, Any]:
        """Embeddings of the prompts, and of one negative prompt for all."""
        given = {}
        for prefix, numbers in (("", prompts), ("negative_", [-1] * len(prompts))):
            for name, shape in self.embeddings.items():
                place = name.replace("prompt", f"{prefix}prompt", 1) if name.startswith("prompt") else prefix + name
                given[place] = torch.stack([draw(shape, number, name) for number in numbers])
        return given

    def __call__(
        self, pipeline: Any, prompts: Sequence[int], steps: int = 6, seeds: Sequence[int] | None = None, scale: float = 4.0, **more: Any
    ) -> Tensor:
        seeds = list(prompts) if seeds is None else list(seeds)
        noise = torch.stack([draw(self.latent, seed, "noise") for seed in seeds])
        call = {"num_inference_steps": steps, self.scale: scale, "latents": noise, "output_type": "latent"}
        return pipeline(**{**call, **self.arguments, **self.conditioning(prompts), **more})[0]


def draw(shape: Sequence[int], number: int, name: str) -> Tensor:
    if name.endswith("mask"):
        return torch.ones(shape, dtype=torch.long)
    generator = torch.Generator().manual_seed(1000 + 7919 * (number + 1) + len(name))
    return torch.randn(tuple(shape), generator=generator)


def unet(**more: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _stable_diffusion(network: torch.nn.Module) -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=network,
        scheduler=diffusers.DDIMScheduler(**VP, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(network: torch.nn.Module) -> diffusers.DiffusionPipeline:
    scheduler = diffusers.EulerDiscreteScheduler(**VP, steps_offset=1)
    none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return diffusers.StableDiffusionXLPipeline(**none, unet=network, scheduler=scheduler, add_watermarker=False)


def _sd3(network: torch.nn.Module) -> diffusers.DiffusionPipeline:
    texts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(transformer=network, scheduler=scheduler, vae=None, **dict.fromkeys(texts))


def _pixart(network: torch.nn.Module) -> diffusers.DiffusionPipeline:
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return diffusers.PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=network, scheduler=scheduler)


def _sana(network: torch.nn.Module) -> diffusers.DiffusionPipeline:
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=network, scheduler=scheduler)


def _flux(network: torch.nn.Module) -> diffusers.DiffusionPipeline:
    none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return diffusers.FluxPipeline(transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **none)


def _wan(network: torch.nn.Module) -> diffusers.DiffusionPipeline:
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=network, scheduler=scheduler)


def sd3_transformer() -> torch.nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=WIDTH, pos_embed_max_size=8,
    )  # fmt: skip


def _pixart_transformer() -> torch.nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=16,
        sample_size=8, patch_size=2, caption_channels=WIDTH,
    )  # fmt: skip


def _sana_transformer() -> torch.nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH, sample_size=8, patch_size=1,
    )  # fmt: skip


def _flux_transformer() -> torch.nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _wan_transformer() -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH,
        freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def _sdxl_unet() -> torch.nn.Module:
    return unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
    )  # fmt: skip


TEXT = {"prompt_embeds": (TOKENS, WIDTH)}
SMALL = {"height": 64, "width": 64}
PIXART = {"use_resolution_binning": False, "negative_prompt": None}

FAMILIES = {
    family.name: family
    for family in (
        Family("sd", unet, _stable_diffusion, TEXT, SMALL, attribute="unet"),
        Family("sdxl", _sdxl_unet, _sdxl, {**TEXT, "pooled_prompt_embeds": (WIDTH,)}, SMALL, attribute="unet"),
        Family("sd3", sd3_transformer, _sd3, {**TEXT, "pooled_prompt_embeds": (WIDTH,)}, SMALL),
        Family("pixart", _pixart_transformer, _pixart, {**TEXT, "prompt_attention_mask": (TOKENS,)}, {**SMALL, **PIXART}),
        Family("sana", _sana_transformer, _sana, {**TEXT, "prompt_attention_mask": (TOKENS,)},
               {"height": 256, "width": 256, "use_resolution_binning": False, "negative_prompt": None}),
        Family("flux", _flux_transformer, _flux, {**TEXT, "pooled_prompt_embeds": (WIDTH,)}, SMALL, scale="true_cfg_scale",
               latent=(16, 16), two_calls=True),
        Family("wan", _wan_transformer, _wan, TEXT, {"height": 32, "width": 32, "num_frames": 5}, latent=(4, 2, 4, 4), two_calls=True),
    )
}  # fmt: skip
