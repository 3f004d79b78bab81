"""StockBackbone: what every family shares in being a Backbone (diffalign/backbone.py) on top of its stock diffusers pipeline.

A family file adds its facts, as class variables, and six methods: `encode`, `predict`, `noise_shape`, `decode`, `encode_images` and
`text_limits`. Everything else is here: sizes, noise, schedules, guidance, and the stock loop as a differentiable map from noise to
images. That loop is reused, never copied: `Pipeline.__call__.__wrapped__` is the stock call without its `no_grad`. It is given the
encoded prompts and the noise, and asked for latents; we decode those ourselves, because the stock decoder path detaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning, Size, Times
from diffalign.diffusion import Sampler, Schedule
from diffalign.pipelines import inputs
from diffalign.pipelines.schedule import StockSampler, levels, prediction_of, schedule_of, with_timesteps

NOTHING: Mapping[str, Any] = MappingProxyType({})
"""No arguments."""


class StockBackbone:
    """Mixin, to stand before the stock class."""

    stock_class: ClassVar[type]
    denoiser: ClassVar[str] = "transformer"
    """The component that denoises: "unet" or "transformer"."""
    search_arguments: ClassVar[frozenset[str]]
    """Stock arguments of the sampler itself, the same for every sample."""
    encode_arguments: ClassVar[frozenset[str]] = frozenset()
    """Stock arguments that only the text encoders need."""
    fixed_arguments: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Stock arguments that the way from noise to images needs beside embeddings."""
    scale_argument: ClassVar[str] = "guidance_scale"
    """The stock argument that is w in u + w (c - u)."""
    latents_dtype: ClassVar[torch.dtype | None] = None
    """In which the stock call holds latents; None: the network's."""
    per_prompt: ClassVar[str] = "num_images_per_prompt"
    output_field: ClassVar[str] = "images"
    output_type: ClassVar[str] = "pil"
    """What the stock call returns where it is not told."""
    two_calls: ClassVar[bool] = False
    multiple: ClassVar[int] = 8
    """Height and width must be multiples of this, in pixels."""
    sides_together: ClassVar[bool] = False
    """Whether the stock call ignores a height without a width, and the other way round."""
    defaults: Mapping[str, Any] = MappingProxyType({})
    """Stock arguments used where the caller gives none; set by presets."""

    # ---- what a family provides; the contracts are those of diffalign.backbone.Backbone ---------------------------------------------

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        unconditional: bool = True,
        size: Size | None = None,
        embedded_scale: float | None = None,
        **arguments: Any,
    ) -> Conditioning:
        """`arguments` are from `encode_arguments`."""
        raise NotImplementedError

    def predict(
        self, x: Float[Tensor, "b ..."], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b ..."]:
        """One plain evaluation of the network."""
        raise NotImplementedError

    def noise_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """Shape of one sample's noise."""
        raise NotImplementedError

    def decode(self, latents: Float[Tensor, "b ..."], size: Size | None = None) -> Float[Tensor, "b ..."]:
        """Latents, as the stock call returns them for output_type="latent", to float32 images in [0, 1]."""
        raise NotImplementedError

    def encode_images(self, images: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The way back, as far as the autoencoder goes."""
        raise NotImplementedError

    def text_limits(self, arguments: Mapping[str, Any] = NOTHING) -> Sequence[tuple[Any, int]]:
        """(tokenizer, most tokens) of every text encoder under a call's arguments; a text is cut where none of them reads on."""
        raise NotImplementedError

    @property
    def _execution_device(self) -> torch.device:
        """Where the network is. The stock property asks every component, which is a tenth of a small search's time, and would answer
        with wherever offloaded text encoders wait; it stays in charge where the network itself is offloaded.
        """
        network = getattr(self, self.denoiser)
        hooks = getattr(network, "_diffusers_hook", None)
        if hasattr(network, "_hf_hook") or (hooks is not None and hooks.get_hook("group_offloading") is not None):
            return super()._execution_device
        return network.device

    # ---- arguments, sizes and noise ---------------------------------------------------------------------------------------------

    def with_defaults(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Stock arguments, changed in place: what the caller left out is taken from `defaults`; a family adds what follows from others."""
        return inputs.fill_defaults(arguments, self.defaults)

    def default_size(self) -> Size:
        """What the model makes where nothing else is asked for."""
        given = {name: self.defaults[key] for name, key in SIZE_ARGUMENTS.items() if self.defaults.get(key) is not None}
        return Size(**{**self.native_size(), **given})

    def native_size(self) -> dict[str, int]:
        """Height and width (frames, for video) by the network's own configuration, in pixels."""
        size = getattr(self, self.denoiser).config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        return {"height": rows * self.vae_scale_factor, "width": columns * self.vae_scale_factor}

    def size_of(self, arguments: Mapping[str, Any]) -> Size:
        """The size that stock arguments ask for; the model's own where they are silent."""
        default = self.default_size()
        height, width = arguments.get("height"), arguments.get("width")
        if self.sides_together and (height is None or width is None):
            height = width = None
        frames = arguments.get("num_frames") or default.frames
        size = Size(default.height if height is None else height, default.width if width is None else width, frames)
        self._check_size(size)
        return size

    def _check_size(self, size: Size) -> None:
        if size.height % self.multiple or size.width % self.multiple:
            raise ValueError(f"height and width must be divisible by {self.multiple}, got {size.height} and {size.width}")

    def draw_noise(self, generators: Sequence[torch.Generator], size: Size | None = None) -> Float[Tensor, "b ..."]:
        """Unit-variance float32 noise, sample i from generators[i]: what the stock call draws from such a list, before rounding to half."""
        shape = (len(generators), *self.noise_shape(size))
        return randn_tensor(shape, generator=list(generators), device=self._execution_device, dtype=torch.float32)

    # ---- inside the loop --------------------------------------------------------------------------------------------------------

    def schedule(self, steps: int | None = None, *, size: Size | None = None, repeats: bool = False, **given: Any) -> Schedule:
        """The levels that the stock call visits; `given` may hold timesteps, sigmas or mu. `repeats`: see schedule_of."""
        return schedule_of(self.timed_scheduler(steps, size=size, **given), repeats)

    def timed_scheduler(self, steps: int | None = None, *, size: Size | None = None, **given: Any) -> Any:
        """A copy of the scheduler, set as the stock call sets it; where `steps` and `given` are silent, `defaults` speak."""
        scheduled = self.with_defaults({"num_inference_steps": steps, **given})
        steps, timesteps, sigmas = (scheduled.get(name) for name in inputs.SCHEDULE)
        more = self.scheduler_arguments(size or self.default_size())
        more.update({name: value for name, value in given.items() if name not in inputs.SCHEDULE and value is not None})
        return with_timesteps(self.scheduler, steps, self._execution_device, timesteps=timesteps, sigmas=sigmas, **more)

    def scheduler_arguments(self, size: Size) -> dict[str, Any]:
        """What else the stock call tells its scheduler when it sets the timesteps, such as the shift by size (mu)."""
        return {}

    @property
    def prediction(self) -> str:
        """What the network predicts, as the scheduler says."""
        return prediction_of(self.scheduler)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
        """Uniform over what the model was trained on."""
        steps = self.scheduler.config.num_train_timesteps
        if self.prediction == "flow":
            return steps * (1 - torch.rand(count, generator=generator))
        return torch.randint(steps, (count,), generator=generator).float()

    def levels(self, timesteps: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """(signal, noise) at training timesteps, float32 on the CPU."""
        signal, noise = levels(self.scheduler, timesteps.tolist())
        if not signal:
            raise ValueError(
                f"the levels of {type(self.scheduler).__name__} are not known; give the pipeline a DDIM or flow-matching scheduler"
            )
        return torch.tensor(signal), torch.tensor(noise)

    def stock_sampler(self, scheduler: Any, generators: Sequence[torch.Generator] | None = None, **arguments: Any) -> Sampler:
        """The stock loop's own arithmetic, for `rollout` along `schedule(..., repeats=True)`; scheduler: from `timed_scheduler`."""
        return StockSampler(scheduler, generators, **arguments)

    def has_two_branches(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the stock call evaluates the unconditional branch too, given these stock arguments, negative_prompt among them."""
        return (arguments.get(self.scale_argument) or 0) > 1

    def embedded_scale_of(self, arguments: Mapping[str, Any]) -> float | None:
        """The guidance scale that the network takes as an input, from stock arguments; None for most families."""
        return None

    def denoise(
        self, x: Float[Tensor, "b ..."], timestep: Times, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Float[Tensor, "b ..."]:
        """The network's output under guidance, evaluated the way the stock loop does it."""
        if guidance_scale <= 1:
            return self.predict(x, timestep, conditioning.conditional(), conditioning)
        texts, negative = conditioning.conditional(), conditioning.unconditional()
        if self.two_calls:
            c = self.predict(x, timestep, texts, conditioning)
            u = self.predict(x, timestep, negative, conditioning)
        else:
            both = {name: torch.cat([negative[name], texts[name]]) for name in texts}
            twice = torch.cat([timestep, timestep]) if isinstance(timestep, Tensor) else timestep
            u, c = self.predict(torch.cat([x, x]), twice, both, conditioning).chunk(2)
        return u + guidance_scale * (c - u)

    # ---- memory -----------------------------------------------------------------------------------------------------------------

    def enable_gradient_checkpointing(self) -> None:
        """Backward passes recompute the blocks of the network and the decoder instead of storing their activations; also in eval mode.

        Memory for about a third more time. The gradient stays the same. ValueError where the network cannot do it.
        """
        getattr(self, self.denoiser).enable_gradient_checkpointing()
        if getattr(self.vae, "_supports_gradient_checkpointing", False):
            self.vae.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """The ordinary backward pass again."""
        for module in (getattr(self, self.denoiser), self.vae):
            if getattr(module, "_supports_gradient_checkpointing", False):
                module.disable_gradient_checkpointing()

    # ---- noise to images, through the stock loop ----------------------------------------------------------------------------------

    def noise_to_images(
        self,
        noise: Float[Tensor, "b ..."],
        conditioning: Conditioning,
        arguments: Mapping[str, Any] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        output_type: str = "pt",
    ) -> Float[Tensor, "b ..."]:
        """Float32 images in [0, 1] (or latents, for output_type "latent") from unit-variance noise; differentiable in everything.

        arguments: stock arguments from `search_arguments`; the conditioning's embedded scale and `defaults` fill in the rest. generators:
        one for each sample, for samplers that draw noise at every step. Gradients also reach parameters that require them; a search
        freezes those first.
        """
        embedded = {} if conditioning.embedded_scale is None else {"guidance_scale": conditioning.embedded_scale}
        arguments = self.with_defaults({**embedded, **(arguments or {})})
        inputs.refuse(arguments, self.search_arguments, "noise_to_images")
        size = self.size_of(arguments)
        self._check_noise("noise", noise, len(conditioning), size)
        network = getattr(self, self.denoiser)
        if noise.requires_grad and torch.is_grad_enabled() and hasattr(network, "_hf_hook"):
            raise RuntimeError("gradients cannot flow through CPU offloading, which moves the weights away before the backward pass; "
                               "load the pipeline without it or use a method that needs no gradient")  # fmt: skip
        call = getattr(self.stock_class.__call__, "__wrapped__", None)
        if call is None:
            raise RuntimeError(f"{self.stock_class.__name__}.__call__ has no __wrapped__ in this version of diffusers; use diffusers 0.42")
        latents = call(
            self,
            prompt=None,
            **self.fixed_arguments,
            **conditioning.tensors,
            **arguments,
            latents=noise.to(self._execution_device, self.latents_dtype or network.dtype),
            generator=None if generators is None else list(generators),
            output_type="latent",
            return_dict=False,
        )[0]
        return latents if output_type == "latent" else self.decode(latents, size)

    def to_output(self, images: Float[Tensor, "b ..."], output_type: str) -> Any:
        """Images in [0, 1] in the form that the stock call returns for that output_type; latents as they are, for "latent"."""
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))

    def _check_noise(self, name: str, noise: Tensor, count: int, size: Size) -> None:
        expected = (count, *self.noise_shape(size))
        if tuple(noise.shape) != expected:
            raise ValueError(f"{name} must have shape {expected} for these prompts and this size, got {tuple(noise.shape)}")

    # ---- prompts ----------------------------------------------------------------------------------------------------------------

    def checked_prompts(self, prompts: Sequence[str], negative_prompt: str | Sequence[str] | None) -> tuple[list[str], list[str]]:
        """Prompts and as many negative ones. ValueError where their numbers differ, TypeError for what is not text."""
        prompts = inputs.check_prompts(prompts if isinstance(prompts, str) else list(prompts))
        one = negative_prompt is None or isinstance(negative_prompt, str)
        negatives = [negative_prompt or ""] * len(prompts) if one else inputs.check_prompts(list(negative_prompt))
        if len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt has {len(negatives)} entries for {len(prompts)} samples; give one for each, or one string")
        return prompts, negatives

    def cut_text(self, prompts: Sequence[str], arguments: Mapping[str, Any] = NOTHING) -> list[str | None]:
        """For each prompt the end that no text encoder reads, as written; None where one of them reads all of it."""
        ends = [inputs.text_cut_off(tokenizer, prompts, limit) for tokenizer, limit in self.text_limits(arguments)]
        return [None if None in cut else min(cut, key=len) for cut in zip(*ends, strict=True)]

    def text_limit(self, arguments: Mapping[str, Any] = NOTHING) -> int:
        """The most tokens that any of the text encoders reads."""
        return max(limit for _, limit in self.text_limits(arguments))


SIZE_ARGUMENTS = {"height": "height", "width": "width", "frames": "num_frames"}
"""Field of Size -> argument of the stock call."""


def times(timestep: Times, x: Float[Tensor, "b ..."], dtype: torch.dtype = torch.float32) -> Float[Tensor, " b"]:
    """One time for each sample, on its device."""
    if isinstance(timestep, Tensor):
        return timestep.to(x.device, dtype)
    return torch.full((len(x),), timestep, device=x.device, dtype=dtype)
