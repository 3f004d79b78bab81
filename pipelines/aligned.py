"""AlignedPipeline: a stock diffusers pipeline whose call also takes plugins= and seed=.

Nothing of a family is here, that is backbone.py and families/; and nothing of a method, those are plugins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.guidance import GuidanceMethod, GuidanceReport
from diffalign.pipelines import inputs, state
from diffalign.pipelines.backbone import StockBackbone
from diffalign.pipelines.guidance import hook as guidance_hook
from diffalign.pipelines.outputs import AlignedOutput
from diffalign.pipelines.steered import SteeredLoop
from diffalign.types import NoiseMethod, NoiseProblem, Progress, StepMethod

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class AlignedPipeline(StockBackbone):
    """Mixin, to stand before the stock class: `class Aligned...(AlignedPipeline, StableDiffusionPipeline)`."""

    cosine_threshold: float | None = None
    """At which Adaptive Guidance stops guiding, calibrated for this model; set by presets."""
    batch_size: int | None = None
    """Images that a search may well make at once; set by presets."""

    # ---- the call ---------------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *positional: Any,
        plugins: Sequence[NoiseMethod | StepMethod] = (),
        seed: int | Sequence[int] | None = None,
        progress: Progress | None = None,
        **stock: Any,
    ) -> AlignedOutput | tuple[Any, ...]:
        """Generate images; everything the stock call takes works here too, and with plugins=() the result is the stock one to the bit.

        seed: sample i has a stream of its own, seeded with seed + i (or seed[i]); samples of one prompt lie side by side, as in the stock
        call. First the initial noise is drawn from it, then what the sampler draws at each step. `latents` replaces the initial noise and
        leaves the rest of the stream as it is, so that out.noise with out.seeds makes the same image again under every sampler. None
        draws fresh seeds, which the output reports. The stock equivalent is generator=[torch.Generator().manual_seed(s), ...].
        plugins: at most one search over noise, and any number of step methods. progress is called by a search after every evaluation. A
        search starts from `latents` where given, so out.noise can be improved further.

        Raises TypeError / ValueError naming the argument; see pipelines/inputs.py.
        """
        method, steps = inputs.sort_plugins(plugins)
        arguments = inputs.bind_stock(super().__call__, self.stock_class.__name__, prompt, positional, stock)
        self.with_defaults(arguments)
        prompts = None if arguments.get("prompt_embeds") is not None else inputs.check_prompts(arguments.get("prompt"))
        per_prompt = arguments.get(self.per_prompt) or 1
        count = per_prompt * (len(arguments["prompt_embeds"]) if prompts is None else len(prompts))
        if arguments.get("generator") is None:
            seeds = inputs.resolve_seeds(seed, count)
        elif seed is None and method is None:
            seeds = None
        else:
            reason = "a search over noise needs to know the seeds" if seed is None else "both were given"
            raise ValueError(f"pass seed= instead of generator=: {reason}")
        if method is not None and prompts is None:
            raise ValueError("prompt_embeds cannot be used with a search over noise, whose reward reads the prompt; pass prompt=")
        cut = None if prompts is None else self._report_cut_text(prompts, arguments)
        if method is not None:
            samples = [row for row in range(len(prompts)) for _ in range(per_prompt)]
            return self._search(method, steps, arguments, prompts, samples, seeds, cut, progress)
        if prompts is not None:
            arguments["prompt"] = prompts[0] if isinstance(prompt, str) else prompts
        if seeds is not None:
            generators = inputs.make_generators(seeds)
            if arguments.get("latents") is not None:
                self.draw_noise(generators, self.size_of(arguments))  # not used: `latents` stand for this part of the streams
            arguments["generator"] = generators[0] if count == 1 else generators
        if arguments.get("latents") is not None:
            # what a search returns is float32; the stock call would hand that to half-precision weights as it is
            arguments["latents"] = arguments["latents"].to(self.latents_dtype or getattr(self, self.denoiser).dtype)
        with ExitStack() as stack:
            stack.enter_context(state.without_stock_truncation_warnings(self.stock_class.__module__))
            attached = [stack.enter_context(step.attach(self)) for step in steps]
            output = super().__call__(**arguments)
        if isinstance(output, tuple):
            return output
        nsfw = getattr(output, "nsfw_content_detected", None)
        return AlignedOutput(getattr(output, self.output_field), nsfw, seeds, cut, guidance=_guidance_report(attached))

    def _search(
        self,
        method: NoiseMethod,
        steps: Sequence[StepMethod],
        arguments: dict[str, Any],
        prompts: list[str],
        samples: list[int],
        seeds: list[int],
        cut: list[str | None],
        progress: Progress | None,
    ) -> AlignedOutput | tuple[Any, ...]:
        """One NoiseMethod over this pipeline. Sample i is made from prompts[samples[i]]."""
        consumed = {"prompt", self.per_prompt, "negative_prompt", "latents", "output_type", "return_dict", "generator"}
        given = {name: value for name, value in arguments.items() if value is not None}
        inputs.refuse(given, self.search_arguments | self.encode_arguments | consumed, f"the search {method.name!r}")
        output_type = arguments.get("output_type") or self.output_type
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if getattr(self, "safety_checker", None) is not None:
            raise ValueError("a search over noise does not run the safety checker; load the pipeline with safety_checker=None")
        sampler = {name: given[name] for name in self.search_arguments & given.keys()}
        size = self.size_of(sampler)
        with ExitStack() as stack:
            # also inside a caller's no_grad or inference_mode (web servers use them) a search needs gradients of its own
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.callback(self.maybe_free_model_hooks)  # our own decode leaves an offloaded VAE on the accelerator
            for change in (state.frozen, state.silent_progress, state.own_scheduler):
                stack.enter_context(change(self))
            attached = [stack.enter_context(step.attach(self)) for step in steps]
            extra = {name: given[name] for name in self.encode_arguments & given.keys()}
            guided = self.has_two_branches(given)
            embedded = self.embedded_scale_of(sampler)
            conditioning = self.encode(
                prompts, arguments.get("negative_prompt"), unconditional=guided, size=size, embedded_scale=embedded, **extra
            ).rows(samples)
            generators = inputs.make_generators(seeds)
            drawn = self.draw_noise(generators, size)
            start = drawn if arguments.get("latents") is None else arguments["latents"]
            self._check_noise("latents", start, len(samples), size)
            noise = start.detach().clone().to(self._execution_device, torch.float32)
            # a sampler that draws noise at every step repeats the same noise in every evaluation, and goes on where the stock call would
            states = [generator.get_state() for generator in generators]

            def run(noise: Tensor, rows: Sequence[int], output_type: str) -> Tensor:
                own = [inputs.continue_generator(states[row]) for row in rows]
                return self.noise_to_images(noise, conditioning.rows(rows), sampler, own, output_type)

            def generate(noise: Float[Tensor, "k ..."], rows: Sequence[int]) -> Float[Tensor, "k *f 3 h w"]:
                return run(noise, rows, "pt")

            loop = None if attached else SteeredLoop(self, conditioning, sampler, size, seeds)  # plugins act on the stock loop
            result = method.search(
                NoiseProblem(noise, conditioning.prompts, seeds, generate, progress, self.batch_size, loop, conditioning)
            )
            best, first = result.images.detach(), result.initial_images.detach()
            if output_type == "latent" and result.noise is None:
                raise ValueError(f"output_type='latent' cannot be used with the search {method.name!r}, which returns images alone")
            if output_type == "latent":
                with torch.no_grad():
                    best, first = (run(each, range(len(samples)), "latent") for each in (result.noise, noise))
        images, initial = (self.to_output(each, output_type) for each in (best, first))
        if arguments.get("return_dict") is False:
            return images, None
        guidance = _guidance_report(attached)
        found = None if result.noise is None else result.noise.detach().float()
        return AlignedOutput(images, None, seeds, cut, result.trace, found, result.distribution, initial, guidance, result.cost)

    def guide(self, method: GuidanceMethod) -> AbstractContextManager[guidance_hook.Guided]:
        """Calls inside the block are guided by `method`; what `plugins=[method]` does for one call. See pipelines/guidance/hook.py."""
        return guidance_hook.guide(self, method, cosine_threshold=self.cosine_threshold)

    # ---- what is reported -------------------------------------------------------------------------------------------------------

    def _report_cut_text(self, prompts: list[str], arguments: Mapping[str, Any]) -> list[str | None]:
        limit, negative = self.text_limit(arguments), arguments.get("negative_prompt")
        cut = self.cut_text(prompts, arguments)
        inputs.warn_of_cut_text(prompts, cut, limit)
        if negative is not None:
            negative = inputs.check_prompts(negative, "negative_prompt")
            inputs.warn_of_cut_text(negative, self.cut_text(negative, arguments), limit, "negative prompt")
        return [text for text in cut for _ in range(arguments.get(self.per_prompt) or 1)]

    def to_json_string(self) -> str:
        """model_index.json, under the stock class's name, so that any diffusers installation loads what we save."""
        config = json.loads(super().to_json_string())
        return json.dumps({**config, "_class_name": self.stock_class.__name__}, indent=2, sort_keys=True) + "\n"


def _guidance_report(attached: Sequence[Any]) -> GuidanceReport | None:
    """The latest report of the guidance method among what step methods left behind, if one is."""
    reports = [each.report for each in attached if isinstance(each, guidance_hook.Guided)]
    return reports[-1] if reports else None
