"""The Stable Diffusion 3 family: SD3, SD3.5 and its Turbo, and the shapes-flow model. One transformer that predicts a flow.

Two CLIP encoders and T5 read the prompt; T5 may be missing, and zeros then stand in its place. The network is told the pooled output
of both CLIP encoders too. Latents are scaled and shifted, and the steps may be shifted by the size of the image (`mu`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning, Size, Times
from diffalign.pipelines import state
from diffalign.pipelines.aligned import AlignedPipeline
from diffalign.pipelines.backbone import NOTHING, times

T5_TOKENS = 256  # what the stock call lets T5 read where it is told nothing


class AlignedStableDiffusion3Pipeline(AlignedPipeline, StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline with plugins=, seed= and the Backbone."""

    stock_class = StableDiffusion3Pipeline
    # a folder that was saved without T5 has no files for it; the stock class wants to be told so: from_pretrained(..., text_encoder_3=None)
    _optional_components: ClassVar[list[str]] = [*StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3"]
    search_arguments: ClassVar[frozenset[str]] = frozenset(
        {"height", "width", "num_inference_steps", "sigmas", "mu", "guidance_scale", "joint_attention_kwargs", "skip_guidance_layers"}
        | {"skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"}
    )
    encode_arguments: ClassVar[frozenset[str]] = frozenset({"clip_skip", "max_sequence_length", "joint_attention_kwargs"})

    @property
    def multiple(self) -> int:
        """Pixels to one patch of latents: 16 for the published models."""
        return self.vae_scale_factor * self.patch_size

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        unconditional: bool = True,
        size: Size | None = None,
        embedded_scale: float | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """max_sequence_length: T5's. joint_attention_kwargs: only its "scale" is read, for LoRA in the encoders."""
        prompts, negatives = self.checked_prompts(prompts, negative_prompt)
        with state.without_stock_truncation_warnings(self.stock_class.__module__):
            embeddings, negative, pooled, negative_pooled = self.encode_prompt(
                prompts,
                prompts,
                prompts,
                device=self._execution_device,
                do_classifier_free_guidance=unconditional,
                negative_prompt=negatives if unconditional else None,
                clip_skip=clip_skip,
                max_sequence_length=max_sequence_length or self._t5_tokens(),
                lora_scale=(joint_attention_kwargs or {}).get("scale"),
            )
        tensors = {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}
        if unconditional:
            tensors |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
        return Conditioning(tuple(prompts), tensors, size)

    def predict(
        self, x: Float[Tensor, "b c h w"], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        return self.transformer(
            hidden_states=x.to(self.transformer.dtype),
            timestep=times(timestep, x),
            encoder_hidden_states=texts["prompt_embeds"],
            pooled_projections=texts["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def noise_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """(channels, height / 8, width / 8) for the usual autoencoder; 16 channels in the published models."""
        size = size or self.default_size()
        return (self.transformer.config.in_channels, size.height // self.vae_scale_factor, size.width // self.vae_scale_factor)

    def scheduler_arguments(self, size: Size) -> dict[str, Any]:
        if not self.scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, rows, columns = self.noise_shape(size)
        known = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.16}
        limits = (self.scheduler.config.get(name, value) for name, value in known.items())
        return {"mu": calculate_shift((rows // self.patch_size) * (columns // self.patch_size), *limits)}

    def decode(self, latents: Float[Tensor, "b c h w"], size: Size | None = None) -> Float[Tensor, "b 3 H W"]:
        """The operations, and their dtype up to the clamp, are those of the stock call."""
        scaled = (latents.to(self.vae.dtype) / self.vae.config.scaling_factor) + self.vae.config.shift_factor
        images = self.vae.decode(scaled, return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1).float()

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        latents = self.vae.encode((images * 2 - 1).to(self.vae.device, self.vae.dtype)).latent_dist.mean
        return (latents.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def text_limits(self, arguments: Mapping[str, Any] = NOTHING) -> Sequence[tuple[Any, int]]:
        both = [(tokenizer, self.tokenizer_max_length) for tokenizer in (self.tokenizer, self.tokenizer_2)]
        limit = arguments.get("max_sequence_length") or self._t5_tokens()
        return both if self.text_encoder_3 is None else [*both, (self.tokenizer_3, limit)]

    def _t5_tokens(self) -> int:
        return self.defaults.get("max_sequence_length", T5_TOKENS)
