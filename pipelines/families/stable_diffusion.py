"""The Stable Diffusion family: SD 1.x, SD 2.x, SD-Turbo and the shapes models. One U-Net, one CLIP text encoder, one KL autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning, Size, Times
from diffalign.pipelines import state
from diffalign.pipelines.aligned import AlignedPipeline
from diffalign.pipelines.backbone import NOTHING


class AlignedStableDiffusionPipeline(AlignedPipeline, StableDiffusionPipeline):
    """StableDiffusionPipeline with plugins=, seed= and the Backbone."""

    stock_class = StableDiffusionPipeline
    denoiser = "unet"
    sides_together = True
    search_arguments: ClassVar[frozenset[str]] = frozenset(
        {"height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "guidance_rescale", "eta"}
        | {"cross_attention_kwargs"}
    )
    encode_arguments: ClassVar[frozenset[str]] = frozenset({"clip_skip", "cross_attention_kwargs"})

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
        cross_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """cross_attention_kwargs: only its "scale" is read, for LoRA in the encoder."""
        prompts, negatives = self.checked_prompts(prompts, negative_prompt)
        if clip_skip is not None and not hasattr(self.text_encoder, "text_model"):
            raise ValueError(f"clip_skip={clip_skip} does not work with this version of transformers (huggingface/diffusers reads a module "
                             "that CLIPTextModel no longer has); leave it out")  # fmt: skip
        with state.without_stock_truncation_warnings(self.stock_class.__module__):
            embeddings, negative = self.encode_prompt(
                prompts,
                self._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=unconditional,
                negative_prompt=negatives if unconditional else None,
                lora_scale=(cross_attention_kwargs or {}).get("scale"),
                clip_skip=clip_skip,
            )
        tensors = {"prompt_embeds": embeddings}
        return Conditioning(tuple(prompts), {**tensors, "negative_prompt_embeds": negative} if unconditional else tensors, size)

    def predict(
        self, x: Float[Tensor, "b c h w"], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        states = texts["prompt_embeds"]
        return self.unet(x.to(self.unet.dtype), timestep, encoder_hidden_states=states, return_dict=False)[0]

    def noise_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """(channels, height / 8, width / 8) for the usual autoencoder."""
        size = size or self.default_size()
        return (self.unet.config.in_channels, size.height // self.vae_scale_factor, size.width // self.vae_scale_factor)

    def decode(self, latents: Float[Tensor, "b c h w"], size: Size | None = None) -> Float[Tensor, "b 3 H W"]:
        """The operations, and their dtype up to the clamp, are those of the stock call."""
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1).float()

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        latents = self.vae.encode((images * 2 - 1).to(self.vae.device, self.vae.dtype)).latent_dist.mean
        return latents.float() * self.vae.config.scaling_factor

    def text_limits(self, arguments: Mapping[str, Any] = NOTHING) -> Sequence[tuple[Any, int]]:
        return [(self.tokenizer, self.tokenizer.model_max_length)]
