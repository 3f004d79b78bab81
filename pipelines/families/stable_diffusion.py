"""The Stable Diffusion family: SD 1.5, SD 2.1, SD-Turbo and the two shapes models. One U-Net, one CLIP text encoder, one KL autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffalign.pipelines import inputs, state
from diffalign.pipelines.aligned import AlignedPipeline
from diffalign.pipelines.outputs import Conditioning
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor


class AlignedStableDiffusionPipeline(AlignedPipeline, StableDiffusionPipeline):
    """StableDiffusionPipeline with plugins=, seed= and a differentiable noise -> image path; see pipelines/aligned.py."""

    stock_class = StableDiffusionPipeline
    denoiser = "unet"
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
        clip_skip: int | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """Prompt embeddings and, always, the unconditional ones: one more pass of a small encoder, and every guidance scale works.

        negative_prompt: one for all, or one for each prompt. cross_attention_kwargs: only its "scale" is read, for LoRA in the encoder.
        """
        prompts = inputs.check_prompts(prompts if isinstance(prompts, str) else list(prompts))
        if clip_skip is not None and not hasattr(self.text_encoder, "text_model"):
            raise ValueError(f"clip_skip={clip_skip} does not work with this version of transformers (huggingface/diffusers reads a module "
                             "that CLIPTextModel no longer has); leave it out")  # fmt: skip
        one = negative_prompt is None or isinstance(negative_prompt, str)
        negatives = [negative_prompt or ""] * len(prompts) if one else inputs.check_prompts(list(negative_prompt))
        if len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt has {len(negatives)} entries for {len(prompts)} samples; give one for each, or one string")
        with state.without_stock_truncation_warnings(self.stock_class.__module__):
            embeddings, unconditional = self.encode_prompt(
                prompts,
                self._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=negatives,
                lora_scale=(cross_attention_kwargs or {}).get("scale"),
                clip_skip=clip_skip,
            )
        tensors = {"prompt_embeds": embeddings, "negative_prompt_embeds": unconditional}
        return Conditioning(tuple(prompts), tensors)

    def noise_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(channels, height / 8, width / 8) for the usual autoencoder. Like the stock call, ignores one side given without the other."""
        size = self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        if height and width:
            if height % 8 or width % 8:
                raise ValueError(f"height and width must be divisible by 8, got {height} and {width}")
            rows, columns = height // self.vae_scale_factor, width // self.vae_scale_factor
        return (self.unet.config.in_channels, rows, columns)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Scaled latents to float32 images in [0, 1]; the operations, and their dtype up to the clamp, are those of the stock call."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1).float()
