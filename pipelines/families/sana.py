"""SANA and SANA-Sprint. One linear transformer, Gemma 2 for the prompt, a DC autoencoder of 32 pixels to one latent.

Gemma reads an instruction before the prompt, which asks it to elaborate; the network is given the states of the last 300 tokens. Latents
are float32 at every precision, and sizes are binned (pipelines/binning.py). SANA predicts a flow. With several images of several prompts
the stock encoder gives prompts each other's attention masks, and so does a plain call here; a search and `encode` do not.

SANA-Sprint is its student of one to four steps, on a circle: x = cos(t) x0 + sin(t) eps with t from pi / 2 to 0, and what is predicted
is v = cos(t) eps - sin(t) x0. The stock loop carries sigma_data x; the state here is x. The network itself speaks of flows, so its
input and output are turned into those of the circle and back. The guidance scale is one of its inputs.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from diffusers.pipelines.sana import pipeline_sana
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning, Size, Times
from diffalign.diffusion import Sampler, Schedule, Step
from diffalign.pipelines import inputs
from diffalign.pipelines.aligned import AlignedPipeline
from diffalign.pipelines.backbone import NOTHING, times
from diffalign.pipelines.binning import ARGUMENT as BINNING
from diffalign.pipelines.binning import ResolutionBinning
from diffalign.pipelines.schedule import StockSampler


class _Sana(ResolutionBinning, AlignedPipeline):
    """What teacher and student share."""

    encode_arguments: ClassVar[frozenset[str]] = frozenset(
        {"clean_caption", "max_sequence_length", "complex_human_instruction", "attention_kwargs"}
    )
    latents_dtype = torch.float32
    multiple = 32

    def decode(self, latents: Float[Tensor, "b c h w"], size: Size | None = None) -> Float[Tensor, "b 3 H W"]:
        """The operations, and their dtype up to the clamp, are those of the stock call. Without a size nothing is cropped."""
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return (self.cropped(images, size) * 0.5 + 0.5).clamp(0, 1).float()

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Images are taken at the size they have; see `made_size`. This autoencoder draws nothing."""
        latents = self.vae.encode((images * 2 - 1).to(self.vae.device, self.vae.dtype)).latent
        return latents.float() * self.vae.config.scaling_factor

    def native_size(self) -> dict[str, int]:
        """What the stock call makes where it is told nothing, whatever the network."""
        return {name: self._stock_default(name) for name in ("height", "width")}

    def text_arguments(
        self,
        clean_caption: bool | None,
        max_sequence_length: int | None,
        complex_human_instruction: Sequence[str] | None,
        attention_kwargs: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Arguments of `encode_prompt` from those of the stock call; None: as the stock call has it."""
        given = {
            "clean_caption": clean_caption,
            "max_sequence_length": max_sequence_length,
            "complex_human_instruction": complex_human_instruction,
        }
        arguments = {name: self._text_default(name) if value is None else value for name, value in given.items()}
        return {**arguments, "device": self._execution_device, "lora_scale": (attention_kwargs or {}).get("scale")}

    def text_limits(self, arguments: Mapping[str, Any] = NOTHING) -> Sequence[tuple[Any, int]]:
        """After the instruction, whose tokens do not count."""
        return [(self.tokenizer, arguments.get("max_sequence_length") or self._text_default("max_sequence_length"))]

    def cut_text(self, prompts: Sequence[str], arguments: Mapping[str, Any] = NOTHING) -> list[str | None]:
        """Counted as the stock call does, behind the instruction and in lower case; what is cut off is told as written."""
        instruction = arguments.get("complex_human_instruction")
        before = "\n".join(self._text_default("complex_human_instruction") if instruction is None else instruction)
        limit = self.text_limit(arguments)
        limit += len(self.tokenizer.encode(before)) - 2 if before else 0
        read = [prompt.lower().rstrip() if len(prompt.lower()) == len(prompt) else prompt for prompt in prompts]
        cuts = inputs.text_cut_off(self.tokenizer, [before + text for text in read], limit)
        return [cut and prompt[len(text) - len(cut) :] for prompt, text, cut in zip(prompts, read, cuts, strict=True)]

    def _text_default(self, name: str) -> Any:
        return self.defaults.get(name, self._stock_default(name))

    def _stock_default(self, name: str) -> Any:
        return inspect.signature(self.stock_class.__call__).parameters[name].default


class AlignedSanaPipeline(_Sana, SanaPipeline):
    """SanaPipeline with plugins=, seed= and the Backbone."""

    stock_class = SanaPipeline
    search_arguments: ClassVar[frozenset[str]] = frozenset(
        {"height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "eta", "attention_kwargs", BINNING}
    )
    fixed_arguments: ClassVar[Mapping[str, Any]] = MappingProxyType({"negative_prompt": None})  # its "" cannot go with embeddings
    bins: ClassVar[Mapping[int, Any]] = {
        16: pipeline_sana.ASPECT_RATIO_512_BIN,
        32: pipeline_sana.ASPECT_RATIO_1024_BIN,
        64: pipeline_sana.ASPECT_RATIO_2048_BIN,
        128: pipeline_sana.ASPECT_RATIO_4096_BIN,
    }

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
        complex_human_instruction: Sequence[str] | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """complex_human_instruction: lines, of which [] is none. attention_kwargs: only its "scale" is read, for LoRA in the encoder."""
        prompts, negatives = self.checked_prompts(prompts, negative_prompt)
        more = self.text_arguments(clean_caption, max_sequence_length, complex_human_instruction, attention_kwargs)
        embeddings, mask, negative, negative_mask = self.encode_prompt(prompts, unconditional, negative_prompt=negatives, **more)
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
            encoder_hidden_states=texts["prompt_embeds"].to(network.dtype),
            encoder_attention_mask=texts["prompt_attention_mask"],
            timestep=times(timestep, x) * network.config.timestep_scale,
            return_dict=False,
        )[0].float()
        learned_variance = network.config.out_channels // 2 == network.config.in_channels
        return output.chunk(2, dim=1)[0] if learned_variance else output


class AlignedSanaSprintPipeline(_Sana, SanaSprintPipeline):
    """SanaSprintPipeline with plugins=, seed= and the Backbone."""

    stock_class = SanaSprintPipeline
    search_arguments: ClassVar[frozenset[str]] = frozenset(
        {"height", "width", "num_inference_steps", "max_timesteps", "intermediate_timesteps", "guidance_scale", "eta"}
        | {"attention_kwargs", BINNING}
    )
    bins: ClassVar[Mapping[int, Any]] = {32: pipeline_sana.ASPECT_RATIO_1024_BIN}
    prediction = "v_prediction"  # on the circle: a = cos t, s = sin t

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
        return math.pi / 2 * (1 - torch.rand(count, generator=generator))

    def levels(self, timesteps: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        return timesteps.float().cos(), timesteps.float().sin()

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
        complex_human_instruction: Sequence[str] | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """There is no unconditional branch. Other arguments as for SANA; embedded_scale: `defaults` or the stock call's where None."""
        if negative_prompt:
            raise ValueError(f"negative_prompt={negative_prompt!r} has no effect on SANA-Sprint, which has one branch; leave it out")
        prompts, _ = self.checked_prompts(prompts, None)
        more = self.text_arguments(clean_caption, max_sequence_length, complex_human_instruction, attention_kwargs)
        embeddings, mask = self.encode_prompt(prompts, **more)
        scale = self.embedded_scale_of({}) if embedded_scale is None else embedded_scale
        return Conditioning(tuple(prompts), {"prompt_embeds": embeddings, "prompt_attention_mask": mask}, size, scale)

    def has_two_branches(self, arguments: Mapping[str, Any]) -> bool:
        return False

    def embedded_scale_of(self, arguments: Mapping[str, Any]) -> float:
        scale = arguments.get("guidance_scale")
        return self._text_default("guidance_scale") if scale is None else scale

    def predict(
        self, x: Float[Tensor, "b c h w"], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """The velocity on the circle. s: the flow's time of t; size: that of (s, 1 - s), by which its points lie off the circle."""
        network, states = self.transformer, texts["prompt_embeds"]
        t = times(timestep, x)
        told = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        s = told.view(-1, 1, 1, 1)
        size = torch.sqrt(s**2 + (1 - s) ** 2)
        seen = x * size
        scale = self.embedded_scale_of({"guidance_scale": conditioning.embedded_scale})
        guidance = torch.full((len(x),), scale, device=x.device, dtype=torch.float32).to(states.dtype)
        output = network(
            seen.to(network.dtype),
            encoder_hidden_states=states.to(network.dtype),
            encoder_attention_mask=texts["prompt_attention_mask"],
            guidance=guidance * network.config.guidance_embeds_scale,
            timestep=told,
            return_dict=False,
        )[0]
        return (((1 - 2 * s) * seen + (1 - 2 * s + 2 * s**2) * output) / size).float()

    def with_defaults(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The stock call's place for the middle of two steps is an error with any other number of them, so there it is given none."""
        arguments = super().with_defaults(arguments)
        if arguments.get("num_inference_steps") not in (None, 2):
            arguments.setdefault("intermediate_timesteps", None)
        return arguments

    def timed_scheduler(self, steps: int | None = None, *, size: Size | None = None, **given: Any) -> Any:
        """given: max_timesteps, intermediate_timesteps. The last timestep is where the run ends."""
        inputs.refuse(given, self.search_arguments, "SANA-Sprint's scheduler")
        arguments = {name: value for name, value in {"num_inference_steps": steps, **given}.items() if value is not None}
        arguments = self.with_defaults(arguments)
        names = ("num_inference_steps", "max_timesteps", "intermediate_timesteps")
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(
            **{name: arguments.get(name, self._stock_default(name)) for name in names},
            device=self._execution_device,
        )
        return scheduler

    def schedule(self, steps: int | None = None, *, size: Size | None = None, repeats: bool = False, **given: Any) -> Schedule:
        times = self.timed_scheduler(steps, size=size, **given).timesteps.tolist()
        return Schedule(tuple(times[:-1]), tuple(map(math.cos, times)), tuple(map(math.sin, times)), "v_prediction")

    def stock_sampler(self, scheduler: Any, generators: Sequence[torch.Generator] | None = None, **arguments: Any) -> Sampler:
        return _SprintSampler(scheduler, generators, **arguments)


class _SprintSampler(StockSampler):
    """Sprint's loop, whose latents are sigma_data times ours and which ends with the prediction of the clean ones."""

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        unit = self.scheduler.config.sigma_data
        after, x0 = self.scheduler.step(output * unit, self.scheduler.timesteps[i], x * unit, **self.arguments, return_dict=False)
        return Step((x0 if i == schedule.steps - 1 else after) / unit, 0.0, x0 / unit)
