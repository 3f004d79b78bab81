"""The SDXL family: SDXL, its Turbo, Hyper, Lightning and DMD2. One U-Net, two CLIP text encoders, and the size as a condition.

The network is told the second encoder's pooled output and six numbers: the size of the original, where it was cropped, and the size
wanted. A negative prompt that is not given is zeros rather than an empty text. The autoencoder may need float32 (`force_upcast`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning, Size, Times
from diffalign.pipelines import state
from diffalign.pipelines.aligned import AlignedPipeline
from diffalign.pipelines.backbone import NOTHING


class AlignedStableDiffusionXLPipeline(AlignedPipeline, StableDiffusionXLPipeline):
    """StableDiffusionXLPipeline with plugins=, seed= and the Backbone."""

    stock_class = StableDiffusionXLPipeline
    denoiser = "unet"
    search_arguments: ClassVar[frozenset[str]] = frozenset(
        {"height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "guidance_rescale", "eta"}
        | {"original_size", "crops_coords_top_left", "target_size", "cross_attention_kwargs"}
        | {"negative_original_size", "negative_crops_coords_top_left", "negative_target_size"}
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
        """cross_attention_kwargs: only its "scale" is read, for LoRA in the encoders."""
        prompts, negatives = self.checked_prompts(prompts, negative_prompt)
        with state.without_stock_truncation_warnings(self.stock_class.__module__):
            embeddings, negative, pooled, negative_pooled = self.encode_prompt(
                prompts,
                device=self._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=unconditional,
                negative_prompt=negatives if unconditional and negative_prompt is not None else None,  # None is zeros, "" is a text
                lora_scale=(cross_attention_kwargs or {}).get("scale"),
                clip_skip=clip_skip,
            )
        tensors = {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}
        if unconditional:
            tensors |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
        return Conditioning(tuple(prompts), tensors, size, embedded_scale)

    def predict(
        self, x: Float[Tensor, "b c h w"], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Told that the original was of the size of the latents, and not cropped; other sizes are for the stock call."""
        states = texts["prompt_embeds"]
        size = [side * self.vae_scale_factor for side in x.shape[-2:]]
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=states.dtype, device=x.device).repeat(len(x), 1)
        return self.unet(
            x.to(self.unet.dtype),
            timestep,
            encoder_hidden_states=states,
            timestep_cond=self._embedded(conditioning.embedded_scale, x),
            added_cond_kwargs={"text_embeds": texts["pooled_prompt_embeds"], "time_ids": ids},
            return_dict=False,
        )[0]

    def embedded_scale_of(self, arguments: Mapping[str, Any]) -> float | None:
        """Of networks distilled to take it (LCM), which then evaluate one branch."""
        return None if self.unet.config.time_cond_proj_dim is None else arguments.get("guidance_scale", 5.0)

    def has_two_branches(self, arguments: Mapping[str, Any]) -> bool:
        return self.unet.config.time_cond_proj_dim is None and super().has_two_branches(arguments)

    def _embedded(self, scale: float | None, x: Tensor) -> Tensor | None:
        if scale is None:
            return None
        scales = torch.full((len(x),), scale - 1.0)
        return self.get_guidance_scale_embedding(scales, self.unet.config.time_cond_proj_dim).to(x.device, self.unet.dtype)

    def noise_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """(4, height / 8, width / 8)."""
        size = size or self.default_size()
        return (self.unet.config.in_channels, size.height // self.vae_scale_factor, size.width // self.vae_scale_factor)

    def decode(self, latents: Float[Tensor, "b c h w"], size: Size | None = None) -> Float[Tensor, "b 3 H W"]:
        """The operations, and their dtype up to the clamp, are those of the stock call."""
        with self._exact_autoencoder(latents) as vae:
            mean, std = self._statistics(latents.to(vae.dtype))
            images = vae.decode(latents.to(vae.dtype) * std / vae.config.scaling_factor + mean, return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1).float()

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        with self._exact_autoencoder(images) as vae:
            latents = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean.float()
        mean, std = self._statistics(latents)
        return (latents - mean) * self.vae.config.scaling_factor / std

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(mean, std) of the autoencoder's channels, where it states both."""
        stated = [self.vae.config.get(name) for name in ("latents_mean", "latents_std")]
        if None in stated:
            return 0.0, 1.0
        return tuple(torch.tensor(values).view(1, -1, 1, 1).to(like.device, like.dtype) for values in stated)

    @contextmanager
    def _exact_autoencoder(self, given: Tensor) -> Iterator[Any]:
        """The autoencoder, in float32 where its configuration says that it overflows in float16."""
        if not (self.vae.dtype == torch.float16 and self.vae.config.force_upcast):
            yield self.vae
        elif given.requires_grad and torch.is_grad_enabled():
            yield copy.deepcopy(self.vae).float()  # the backward pass comes when the weights themselves are float16 again
        else:
            try:
                yield self.vae.to(torch.float32)
            finally:
                self.vae.to(torch.float16)

    def text_limits(self, arguments: Mapping[str, Any] = NOTHING) -> Sequence[tuple[Any, int]]:
        return [(tokenizer, tokenizer.model_max_length) for tokenizer in (self.tokenizer, self.tokenizer_2) if tokenizer is not None]
