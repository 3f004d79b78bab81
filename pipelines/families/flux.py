"""The FLUX.1 family: schnell and dev. One transformer that predicts a flow; CLIP gives the network one vector, T5 all the words.

Latents are packed: every 2 x 2 patch of the autoencoder's 16 channels is one token of 64, "b (h/16 w/16) 64". Noise has this form too,
but it is drawn unpacked and packed then, as the stock call does; drawn packed it would be another image. What the tokens do not tell,
height and width, comes from the size.

dev takes the guidance scale as an input of the network (`guidance_scale`). Classifier-free guidance is another thing, `true_cfg_scale`:
two calls of the network, the conditional one first. The stock call guides so only where a negative prompt is given, were it empty, and
runs unguided without a word otherwise. `plugins=()` does the same; a search refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning, Size, Times
from diffalign.pipelines import state
from diffalign.pipelines.aligned import AlignedPipeline
from diffalign.pipelines.backbone import NOTHING, times

# what the stock call takes where it is told nothing
T5_TOKENS = 512
EMBEDDED_SCALE = 3.5
SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


class AlignedFluxPipeline(AlignedPipeline, FluxPipeline):
    """FluxPipeline with plugins=, seed= and the Backbone."""

    stock_class = FluxPipeline
    scale_argument = "true_cfg_scale"
    two_calls = True
    multiple = 16
    search_arguments: ClassVar[frozenset[str]] = frozenset(
        {"height", "width", "num_inference_steps", "sigmas", "guidance_scale", "true_cfg_scale", "joint_attention_kwargs"}
        | {"max_sequence_length"}
    )
    encode_arguments: ClassVar[frozenset[str]] = frozenset({"max_sequence_length", "joint_attention_kwargs"})

    # ---- prompts ------------------------------------------------------------------------------------------------------------------

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
        joint_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """max_sequence_length: T5's. joint_attention_kwargs: only its "scale" is read, for LoRA in the encoders.

        embedded_scale: what the stock call would take where not given; None for schnell, whose network has no such input.
        """
        prompts, negatives = self.checked_prompts(prompts, negative_prompt)
        tensors = {}
        for prefix, texts in (("", prompts), ("negative_", negatives)) if unconditional else (("", prompts),):
            with state.without_stock_truncation_warnings(self.stock_class.__module__):
                embeddings, pooled, _ = self.encode_prompt(
                    texts,
                    device=self._execution_device,
                    max_sequence_length=max_sequence_length or self._t5_tokens(),
                    lora_scale=(joint_attention_kwargs or {}).get("scale"),
                )
            tensors |= {f"{prefix}prompt_embeds": embeddings, f"{prefix}pooled_prompt_embeds": pooled}
        scale = self.embedded_scale_of({"guidance_scale": embedded_scale})
        return Conditioning(tuple(prompts), tensors, size or self.default_size(), scale)

    def text_limits(self, arguments: Mapping[str, Any] = NOTHING) -> Sequence[tuple[Any, int]]:
        return [(self.tokenizer, self.tokenizer_max_length), (self.tokenizer_2, arguments.get("max_sequence_length") or self._t5_tokens())]

    def _t5_tokens(self) -> int:
        return self.defaults.get("max_sequence_length", T5_TOKENS)

    # ---- guidance -----------------------------------------------------------------------------------------------------------------

    def embedded_scale_of(self, arguments: Mapping[str, Any]) -> float | None:
        if not self.transformer.config.guidance_embeds:
            return None
        given = arguments.get("guidance_scale")
        return float(self.defaults.get("guidance_scale", EMBEDDED_SCALE) if given is None else given)

    def has_two_branches(self, arguments: Mapping[str, Any]) -> bool:
        guided = super().has_two_branches(arguments)
        if guided and arguments.get("negative_prompt") is None:
            raise ValueError(f"true_cfg_scale={arguments['true_cfg_scale']} needs a negative_prompt, without which FLUX runs unguided; "
                             'negative_prompt="" is the empty one')  # fmt: skip
        return guided

    # ---- the loop -----------------------------------------------------------------------------------------------------------------

    def predict(
        self, x: Float[Tensor, "b n c"], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b n c"]:
        """The time goes in as t / 1000, divided in the latents' dtype, which in half precision is another number than divided before."""
        x, words = x.to(self.transformer.dtype), texts["prompt_embeds"]
        size, scale = conditioning.size or self.default_size(), conditioning.embedded_scale
        rows, columns = size.height // self.multiple, size.width // self.multiple
        return self.transformer(
            hidden_states=x,
            timestep=times(timestep, x, x.dtype) / 1000,
            guidance=None if scale is None else torch.full((len(x),), scale, device=x.device, dtype=torch.float32),
            pooled_projections=texts["pooled_prompt_embeds"],
            encoder_hidden_states=words,
            txt_ids=torch.zeros(words.shape[1], 3, device=x.device, dtype=words.dtype),
            img_ids=self._prepare_latent_image_ids(len(x), rows, columns, x.device, words.dtype),
            return_dict=False,
        )[0]

    def scheduler_arguments(self, size: Size) -> dict[str, Any]:
        """The shift grows with the number of tokens; schedulers without dynamic shifting (schnell's) ignore it."""
        limits = (self.scheduler.config.get(name, value) for name, value in SHIFT.items())
        return {"mu": calculate_shift(self.noise_shape(size)[0], *limits)}

    def timed_scheduler(self, steps: int | None = None, *, size: Size | None = None, **given: Any) -> Any:
        """Levels 1 ... 1/n before the shift where `sigmas` are not given; a scheduler with flow sigmas of its own keeps those."""
        scheduled = self.with_defaults({"num_inference_steps": steps, **given})
        if self.scheduler.config.get("use_flow_sigmas"):
            given.pop("sigmas", None)
        elif scheduled.get("sigmas") is None:
            n = scheduled["num_inference_steps"]
            given["sigmas"] = np.linspace(1.0, 1 / n, n)
        return super().timed_scheduler(steps, size=size, **given)

    # ---- latents ------------------------------------------------------------------------------------------------------------------

    def native_size(self) -> dict[str, int]:
        side = self.default_sample_size * self.vae_scale_factor
        return {"height": side, "width": side}

    def noise_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """(height / 16 * width / 16, 64)."""
        size = size or self.default_size()
        return ((size.height // self.multiple) * (size.width // self.multiple), self.transformer.config.in_channels)

    def draw_noise(self, generators: Sequence[torch.Generator], size: Size | None = None) -> Float[Tensor, "b n c"]:
        """Drawn as "b c h w", then packed."""
        size = size or self.default_size()
        shape = (self.transformer.config.in_channels // 4, size.height // self.vae_scale_factor, size.width // self.vae_scale_factor)
        noise = randn_tensor((len(generators), *shape), generator=list(generators), device=self._execution_device, dtype=torch.float32)
        return self._packed(noise)

    def decode(self, latents: Float[Tensor, "b n c"], size: Size | None = None) -> Float[Tensor, "b 3 H W"]:
        """The operations, and their dtype up to the clamp, are those of the stock call."""
        size = size or self.default_size()
        unpacked = self._unpack_latents(latents.to(self.vae.dtype), size.height, size.width, self.vae_scale_factor)
        images = self.vae.decode((unpacked / self.vae.config.scaling_factor) + self.vae.config.shift_factor, return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1).float()

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n c"]:
        latents = self.vae.encode((images * 2 - 1).to(self.vae.device, self.vae.dtype)).latent_dist.mean
        return self._packed((latents.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor)

    def _packed(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n 4*c"]:
        return self._pack_latents(latents, *latents.shape)
