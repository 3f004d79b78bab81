"""The Wan family: Wan 2.1 and 2.2, text to video. One transformer over space and time that predicts a flow; UMT5 reads the prompt.

A size has frames, 4 k + 1 of them, and four of them share one latent: noise is "b 16 (f - 1)/4 + 1 h/8 w/8". Images of these models are
videos everywhere, "b f 3 h w": what a search's `generate` gives to rewards, what `decode` returns and `encode_images` takes. The stock
loop keeps latents in float32 whatever the network's dtype. The two branches are two calls of the network, the conditional one first.

Wan 2.2 hands low noise levels over to `transformer_2`; its small model is told the time of every token, here the same for all. The
autoencoder decodes frame by frame with a cache of features, which gradients pass through, and has no gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import WanPipeline
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning, Size, Times
from diffalign.pipelines import state
from diffalign.pipelines.aligned import AlignedPipeline
from diffalign.pipelines.backbone import NOTHING, times

TEXT_TOKENS = 512  # what the stock call takes where it is told nothing; its encode_prompt alone would take 226


class AlignedWanPipeline(AlignedPipeline, WanPipeline):
    """WanPipeline with plugins=, seed= and the Backbone."""

    stock_class = WanPipeline
    # not guidance_scale_2, a scale of its own for transformer_2: loops of ours know one scale
    search_arguments: ClassVar[frozenset[str]] = frozenset(
        {"height", "width", "num_frames", "num_inference_steps", "guidance_scale", "attention_kwargs"}
    )
    encode_arguments: ClassVar[frozenset[str]] = frozenset({"max_sequence_length"})
    latents_dtype = torch.float32
    per_prompt = "num_videos_per_prompt"
    output_field = "frames"
    output_type = "np"
    two_calls = True

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        unconditional: bool = True,
        size: Size | None = None,
        embedded_scale: float | None = None,
        max_sequence_length: int | None = None,
    ) -> Conditioning:
        prompts, negatives = self.checked_prompts(prompts, negative_prompt)
        with state.without_stock_truncation_warnings(self.stock_class.__module__):
            embeddings, negative = self.encode_prompt(
                prompts,
                negatives if unconditional else None,
                do_classifier_free_guidance=unconditional,
                max_sequence_length=max_sequence_length or self._text_tokens(),
                device=self._execution_device,
            )
        tensors = {"prompt_embeds": embeddings.to(self.transformer.dtype)}
        if unconditional:
            tensors["negative_prompt_embeds"] = negative.to(self.transformer.dtype)
        return Conditioning(tuple(prompts), tensors, size)

    def predict(
        self, x: Float[Tensor, "b c f h w"], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b c f h w"]:
        boundary = self.config.boundary_ratio
        told = times(timestep, x)
        first = [True] if boundary is None else (told >= boundary * self.scheduler.config.num_train_timesteps).tolist()
        if len(set(first)) > 1:
            raise ValueError("samples on both sides of Wan 2.2's boundary need different networks; give timesteps of one side at a time")
        network = self.transformer if first[0] else self.transformer_2
        if self.config.expand_timesteps:
            told = told[:, None].expand(-1, x[0, 0].numel() // 4)  # a token is 2 x 2 latents of one frame
        return network(
            hidden_states=x.to(self.transformer.dtype),
            timestep=told,
            encoder_hidden_states=texts["prompt_embeds"],
            return_dict=False,
        )[0]

    # ---- sizes --------------------------------------------------------------------------------------------------------------------

    @property
    def multiple(self) -> int:
        """Pixels to one patch of latents, and at least the 16 that the stock call insists on."""
        return max(16, self.vae_scale_factor_spatial * self.transformer.config.patch_size[1])

    def native_size(self) -> dict[str, int]:
        """What the stock call makes where it is told nothing: five seconds at 480 lines."""
        return {"height": 480, "width": 832, "frames": 81}

    def _check_size(self, size: Size) -> None:
        super()._check_size(size)
        together = self.vae_scale_factor_temporal
        if (size.frames - 1) % together:
            raise ValueError(f"num_frames must be {together} k + 1, as 1, {together + 1}, {2 * together + 1}, got {size.frames}")

    def noise_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """(16, (frames - 1) / 4 + 1, height / 8, width / 8) for the autoencoder of Wan 2.1."""
        size = size or self.default_size()
        frames = (size.frames - 1) // self.vae_scale_factor_temporal + 1
        rows, columns = (side // self.vae_scale_factor_spatial for side in (size.height, size.width))
        return (self.transformer.config.in_channels, frames, rows, columns)

    # ---- videos -------------------------------------------------------------------------------------------------------------------

    def decode(self, latents: Float[Tensor, "b c f h w"], size: Size | None = None) -> Float[Tensor, "b F 3 H W"]:
        """The operations, and their dtype up to the clamp, are those of the stock call."""
        latents = latents.to(self.vae.dtype)
        mean, std = self._statistics(latents)
        videos = self.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
        return (videos * 0.5 + 0.5).clamp(0, 1).float().transpose(1, 2)

    def encode_images(self, images: Float[Tensor, "b F 3 H W"]) -> Float[Tensor, "b c f h w"]:
        videos = (images * 2 - 1).transpose(1, 2).to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(videos).latent_dist.mean.float()
        mean, std = self._statistics(latents)
        return (latents - mean) * (1.0 / std)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every latent channel, as the autoencoder was measured."""
        values = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, std = (torch.tensor(value).view(1, -1, 1, 1, 1).to(like.device, like.dtype) for value in values)
        return mean, std

    def to_output(self, images: Float[Tensor, "b ..."], output_type: str) -> Any:
        if output_type == "latent":
            return images
        return self.video_processor.postprocess_video(images.transpose(1, 2), output_type, do_denormalize=[False] * images.shape[1])

    # ---- prompts and memory -------------------------------------------------------------------------------------------------------

    def text_limits(self, arguments: Mapping[str, Any] = NOTHING) -> Sequence[tuple[Any, int]]:
        return [(self.tokenizer, arguments.get("max_sequence_length") or self._text_tokens())]

    def _text_tokens(self) -> int:
        return self.defaults.get("max_sequence_length", TEXT_TOKENS)

    def enable_gradient_checkpointing(self) -> None:
        """Of the transformers: the autoencoder has none."""
        super().enable_gradient_checkpointing()
        if self.transformer_2 is not None:
            self.transformer_2.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """The ordinary backward pass again."""
        super().disable_gradient_checkpointing()
        if self.transformer_2 is not None:
            self.transformer_2.disable_gradient_checkpointing()
