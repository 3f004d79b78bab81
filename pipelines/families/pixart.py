"""PixArt: alpha, Sigma, and alpha's one-step DMD student. One transformer, one T5 encoder, one KL autoencoder.

The prompt goes in with its attention mask. The network predicts the noise and, in further channels, a variance that no sampler here
uses. Sizes are binned (pipelines/binning.py), and alpha's network of 1024 pixels is told the size and the aspect ratio that it makes.
With one step, alpha's stock call returns the scheduler's prediction of the clean latents: DMD starts from unit noise at t = 400.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning, Size, Times
from diffalign.diffusion import Sampler, Schedule, Step
from diffalign.pipelines import state
from diffalign.pipelines.aligned import AlignedPipeline
from diffalign.pipelines.backbone import NOTHING, times
from diffalign.pipelines.binning import ARGUMENT as BINNING
from diffalign.pipelines.binning import ResolutionBinning
from diffalign.pipelines.schedule import StockSampler


class _PixArt(ResolutionBinning, AlignedPipeline):
    """What both generations share."""

    search_arguments: ClassVar[frozenset[str]] = frozenset(
        {"height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "eta", BINNING}
    )
    encode_arguments: ClassVar[frozenset[str]] = frozenset({"clean_caption", "max_sequence_length"})
    fixed_arguments: ClassVar[Mapping[str, Any]] = MappingProxyType({"negative_prompt": None})  # its "" cannot go with embeddings
    text_tokens: ClassVar[int]
    """What the stock call lets T5 read where it is told nothing."""

    @property
    def multiple(self) -> int:
        """Pixels to one patch of latents: 16 for the published models."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        unconditional: bool = True,
        size: Size | None = None,
        embedded_scale: float | None = None,
        clean_caption: bool | None = None,
        max_sequence_length: int | None = None,
    ) -> Conditioning:
        """clean_caption: the stock call's True, which needs beautifulsoup4 and ftfy; without them prompts are put in lower case alone."""
        prompts, negatives = self.checked_prompts(prompts, negative_prompt)
        with state.without_stock_truncation_warnings(self.stock_class.__module__):
            embeddings, mask, negative, negative_mask = self.encode_prompt(
                prompts,
                unconditional,
                negative_prompt=negatives,
                device=self._execution_device,
                clean_caption=True if clean_caption is None else clean_caption,
                max_sequence_length=max_sequence_length or self._most_tokens(),
            )
        tensors = {"prompt_embeds": embeddings, "prompt_attention_mask": mask}
        if unconditional:
            tensors |= {"negative_prompt_embeds": negative, "negative_prompt_attention_mask": negative_mask}
        return Conditioning(tuple(prompts), tensors, size)

    def predict(
        self, x: Float[Tensor, "b c h w"], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        network = self.transformer
        output = network(
            x.to(network.dtype),
            encoder_hidden_states=texts["prompt_embeds"],
            encoder_attention_mask=texts["prompt_attention_mask"],
            timestep=times(timestep, x),
            added_cond_kwargs=self.micro_conditions(x, texts["prompt_embeds"].dtype),
            return_dict=False,
        )[0]
        learned_variance = network.config.out_channels // 2 == network.config.in_channels
        return output.chunk(2, dim=1)[0] if learned_variance else output

    def micro_conditions(self, x: Float[Tensor, "b c h w"], dtype: torch.dtype) -> dict[str, Tensor | None]:
        """What the network is told of the size beside the latents themselves."""
        return {"resolution": None, "aspect_ratio": None}

    def decode(self, latents: Float[Tensor, "b c h w"], size: Size | None = None) -> Float[Tensor, "b 3 H W"]:
        """The operations, and their dtype up to the clamp, are those of the stock call. Without a size nothing is cropped."""
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return (self.cropped(images, size) * 0.5 + 0.5).clamp(0, 1).float()

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Images are taken at the size they have; see `made_size`."""
        latents = self.vae.encode((images * 2 - 1).to(self.vae.device, self.vae.dtype)).latent_dist.mean
        return latents.float() * self.vae.config.scaling_factor

    def text_limits(self, arguments: Mapping[str, Any] = NOTHING) -> Sequence[tuple[Any, int]]:
        return [(self.tokenizer, arguments.get("max_sequence_length") or self._most_tokens())]

    def cut_text(self, prompts: Sequence[str], arguments: Mapping[str, Any] = NOTHING) -> list[str | None]:
        """T5 is given lower case, which takes other tokens; what is cut off is told as written."""
        read = [prompt.lower() if len(prompt.lower()) == len(prompt) else prompt for prompt in prompts]
        return [cut and prompt[-len(cut) :] for prompt, cut in zip(prompts, super().cut_text(read, arguments), strict=True)]

    def _most_tokens(self) -> int:
        return self.defaults.get("max_sequence_length", self.text_tokens)


class AlignedPixArtAlphaPipeline(_PixArt, PixArtAlphaPipeline):
    """PixArtAlphaPipeline with plugins=, seed= and the Backbone."""

    stock_class = PixArtAlphaPipeline
    text_tokens = 120
    bins: ClassVar[Mapping[int, Any]] = {
        32: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
        64: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
        128: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
    }

    def micro_conditions(self, x: Float[Tensor, "b c h w"], dtype: torch.dtype) -> dict[str, Tensor | None]:
        if self.transformer.config.sample_size != 128:
            return super().micro_conditions(x, dtype)
        height, width = (side * self.vae_scale_factor for side in x.shape[-2:])
        told = {"resolution": torch.tensor([height, width]), "aspect_ratio": torch.tensor([height / width])}
        return {name: each.repeat(len(x), 1).to(dtype=dtype, device=x.device) for name, each in told.items()}

    def stock_sampler(self, scheduler: Any, generators: Sequence[torch.Generator] | None = None, **arguments: Any) -> Sampler:
        return _AlphaSampler(scheduler, generators, **arguments)


class AlignedPixArtSigmaPipeline(_PixArt, PixArtSigmaPipeline):
    """PixArtSigmaPipeline with plugins=, seed= and the Backbone."""

    stock_class = PixArtSigmaPipeline
    text_tokens = 300
    bins: ClassVar[Mapping[int, Any]] = {
        **AlignedPixArtAlphaPipeline.bins,
        256: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
    }


class _AlphaSampler(StockSampler):
    """Alpha's loop: of a single step it takes the prediction of the clean latents, not the state after the step."""

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        if schedule.steps > 1:
            return super().step(schedule, i, x, output)
        x0 = self.scheduler.step(output, self.scheduler.timesteps[i], x, **self.arguments, return_dict=False)[1]
        return Step(x0, 0.0, x0)
