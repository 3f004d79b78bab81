"""Guidance methods on any pipeline: one hook on the network that denoises, instead of a copy of the pipeline's loop.

    with guide(pipeline, method) as guided:
        images = pipeline(prompt).images
    guided.report.evaluations

Pipelines that put both branches in one batch: the hook leaves out the rows that the method does not want and returns a full batch all the
same. Where a sample is guided no further its unconditional half is its conditional prediction, so that u + w (c - u) = c for any w.
Pipelines that call the network twice: the second call is answered without the network. What is planned in full is passed through untouched.

A run is one pass over the scheduler's timesteps. Every call of a pipeline sets new ones, and with them everything here starts anew: nothing
is left from an earlier call, also if that ended in an exception. diffusers would not reset its own hooks on U-Nets, SD3, PixArt or Sana.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from diffalign.guidance import GuidanceMethod, GuidanceReport, GuidanceRun
from diffalign.pipelines.guidance.identity import identity_of
from diffalign.pipelines.guidance.layouts import Layout, layout_of
from diffalign.pipelines.guidance.tensors import Parts, network_input, prediction_in, take, with_prediction
from diffalign.pipelines.schedule import levels, prediction_of

logger = logging.getLogger(__name__)

HOOK = "diffalign_guidance"


@dataclass
class Guided:
    """What `guide` yields: a report of every finished run, the latest last."""

    reports: list[GuidanceReport] = field(default_factory=list)

    @property
    def report(self) -> GuidanceReport | None:
        return self.reports[-1] if self.reports else None


@contextmanager
def guide(
    pipeline: Any,
    method: GuidanceMethod,
    *,
    guidance_scale: float | None = None,
    cosine_threshold: float | None = None,
    layout: Layout | None = None,
) -> Iterator[Guided]:
    """Runs the calls of `pipeline` inside the block under `method`; the pipeline may be any of layouts.LAYOUTS.

    guidance_scale: as given to the calls, for pipelines that keep it to themselves (PixArt; FLUX, whose true_cfg_scale it is) and methods
    that need it. cosine_threshold: calibrated for this model. layout: for a pipeline class that the table lacks.

    Raises ValueError: a pipeline that cannot be served; a second method on the same pipeline; inside the block, from the pipeline's call,
    where guidance is off or the method refuses the run.
    """
    if not callable(getattr(method, "begin", None)):
        raise TypeError(f"method must be a guidance method such as AdaptiveGuidance(), got {method!r}")
    session = Session(pipeline, method, layout or layout_of(pipeline), guidance_scale, cosine_threshold)
    with ExitStack() as stack:
        for name in session.layout.networks:
            if (network := getattr(pipeline, name, None)) is not None:
                stack.enter_context(_hooked(network, session))
        if session.layout.guidance_from_encoder:
            stack.enter_context(_watched_encoder(pipeline, session))
        yield session.guided
        session.close()


@contextmanager
def _hooked(network: nn.Module, session: Session) -> Iterator[None]:
    had_registry, own_forward = hasattr(network, "_diffusers_hook"), "forward" in network.__dict__
    registry = HookRegistry.check_if_exists_or_initialize(network)
    if registry.get_hook(HOOK) is not None:
        raise ValueError(f"a guidance method is already at work on this pipeline; {session.method.name!r} cannot be added")
    hook = GuidanceHook(session)
    if getattr(network, "_compiled_call_impl", None) is not None:  # compiled in place: keep our decisions out of the graph
        hook.new_forward = torch.compiler.disable(hook.new_forward, recursive=False)
    registry.register_hook(hook, HOOK)
    try:
        yield
    finally:
        registry.remove_hook(HOOK, recurse=False)
        if not own_forward:
            network.__dict__.pop("forward", None)  # diffusers leaves a bound method behind, which deep copies keep bound to the original
        if not had_registry:
            del getattr(network, "_orig_mod", network)._diffusers_hook


@contextmanager
def _watched_encoder(pipeline: Any, session: Session) -> Iterator[None]:
    original = pipeline.encode_prompt
    signature = inspect.signature(original)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        session.told = bool(bound.arguments["do_classifier_free_guidance"])
        return original(*args, **kwargs)

    pipeline.encode_prompt = encode_prompt
    try:
        yield
    finally:
        del pipeline.encode_prompt


class GuidanceHook(ModelHook):
    """Hands calls of the network to the session. Stateful only so that diffusers tells it the cache context of each call."""

    _is_stateful = True

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.contexts = StateManager(BaseState)

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module  # there is nothing to reset: runs are told apart by their timesteps

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            context = self.contexts.context.name
        except ValueError:  # how a manager says that there is none
            context = None
        return self.session.forward(module, self.fn_ref.original_forward, context, args, kwargs)


@dataclass
class Pending:
    """The first of two calls: what is planned for the step, and what the conditional branch was."""

    plan: list[str]
    x: Tensor
    output: Any


class Session:
    """The runs inside one `guide` block."""

    def __init__(
        self, pipeline: Any, method: GuidanceMethod, layout: Layout, guidance_scale: float | None, cosine_threshold: float | None
    ) -> None:
        self.pipeline, self.method, self.layout = pipeline, method, layout
        self.guidance_scale, self.cosine_threshold = guidance_scale, cosine_threshold
        self.guided = Guided()
        self.told: bool | None = None  # what encode_prompt was told of guidance
        self.timesteps: Any = None  # the scheduler's own object: its identity is the run's
        self.run: GuidanceRun | None = None
        self.step = -1
        self.network: nn.Module | None = None
        self.negative: Tensor | None = None
        self.pending: Pending | None = None

    # ---- calls of the network ------------------------------------------------------------------------------------------------------

    def forward(self, network: nn.Module, call: Any, context: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.layout.two_calls:
            if context == "cond":
                return self._conditional(network, call, args, kwargs)
            if context == "uncond":
                return self._unconditional(call, args, kwargs)
        elif context in (None, "cond_uncond") and kwargs.get("skip_layers") is None:
            return self._both(network, call, args, kwargs)
        return call(*args, **kwargs)  # a further branch, as of skip-layer guidance

    def _both(self, network: nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call on twice the batch."""
        x = network_input(args, kwargs)
        if not self._guidance_is_on():
            raise ValueError(self._guidance_off())
        total, samples = len(x), len(x) // 2
        first, second = slice(0, samples), slice(samples, total)
        conditional, unconditional = (first, second) if self.layout.conditional_first else (second, first)
        self._advance(network, x[conditional], args, kwargs, take(_text(args, kwargs), unconditional, total))
        parts = Parts.of(self._plan(samples), samples)
        if parts.whole:
            output = call(*args, **kwargs)
        else:
            rows = parts.rows(conditional, unconditional, self.layout.conditional_first, x.device)
            output = call(*take(args, rows, total), **take(kwargs, rows, total))
        prediction = prediction_in(output)
        sizes = (len(parts.c), len(parts.u)) if self.layout.conditional_first else (len(parts.u), len(parts.c))
        halves = prediction.split(sizes)
        c, u = halves if self.layout.conditional_first else reversed(halves)
        new_c, new_u = self._complete(x[conditional], c, u, parts)
        if parts.whole and new_c is c and new_u is u:
            return output
        return with_prediction(output, torch.cat((new_c, new_u) if self.layout.conditional_first else (new_u, new_c)))

    def _conditional(self, network: nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first of two calls."""
        if self.pending is not None and self.pipeline.scheduler.timesteps is self.timesteps:
            raise ValueError(self._guidance_off())  # the step before had no second call
        x = network_input(args, kwargs)
        self._advance(network, x, args, kwargs, None)
        plan = self._plan(len(x))
        if "unconditional" in plan:
            raise ValueError(f"{type(self.pipeline).__name__} evaluates the conditional branch first, so no step can do without it")
        output = call(*args, **kwargs)
        self.pending = Pending(plan, x, output)
        return output

    def _unconditional(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The second of two calls, made only for the samples that want it."""
        if self.pending is None:
            return call(*args, **kwargs)
        pending, self.pending = self.pending, None
        samples = len(pending.x)
        self.negative = _text(args, kwargs)
        parts = Parts.of(pending.plan, samples)
        c = prediction_in(pending.output)
        output = pending.output
        if parts.whole:
            output = call(*args, **kwargs)
        elif parts.u:
            rows = torch.tensor(parts.u, device=c.device)
            output = call(*take(args, rows, samples), **take(kwargs, rows, samples))
        u = prediction_in(output) if parts.u else c[:0]
        new_c, new_u = self._complete(pending.x, c, u, parts)
        if new_c is not c:
            raise ValueError(f"{self.method.name!r} changes the conditional prediction, which {type(self.pipeline).__name__} has already")
        return output if new_u is u else with_prediction(output, new_u)

    # ---- the method ----------------------------------------------------------------------------------------------------------------

    def _plan(self, samples: int) -> list[str]:
        plan = list(self.policy.plan(self.step))
        if len(plan) != samples:
            raise ValueError(f"the method {self.method.name!r} planned {len(plan)} samples, and {samples} are being made")
        for row, branch in enumerate(plan):
            self.evaluations[row] += 2 if branch == "both" else 1
        return plan

    def _complete(self, x: Tensor, c: Tensor, u: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        """Both predictions of every sample. Channels that only one of input and output has (masks, learned variances) are kept from it."""
        channels = min(x.shape[1], c.shape[1])
        if x.shape[1] == c.shape[1]:
            new_c, new_u = self.policy.complete(self.step, x, c, u)
        else:
            new_c, new_u = self.policy.complete(self.step, x[:, :channels], c[:, :channels], u[:, :channels])
            if c.shape[1] > channels:
                extra_c, extra_u = parts.filled(c[:, channels:], u[:, channels:])
                new_c, new_u = torch.cat([new_c, extra_c], dim=1), torch.cat([new_u, extra_u], dim=1)
        if self.step == self.run.steps - 1:
            self._finish()
        return new_c, new_u

    # ---- runs ----------------------------------------------------------------------------------------------------------------------

    def _advance(self, network: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], negative: Tensor | None) -> None:
        timesteps = self.pipeline.scheduler.timesteps
        if self.run is None or timesteps is not self.timesteps or self.step + 1 >= self.run.steps:
            self._begin(network, timesteps, x, args, kwargs, negative)
            return
        self.step += 1
        if len(x) != self.run.samples:
            raise ValueError(f"the number of samples changed from {self.run.samples} to {len(x)} during a run")
        if network is not self.network:
            self.network = network
            self.policy.network_changed()

    def _begin(
        self, network: nn.Module, timesteps: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], negative: Tensor | None
    ) -> None:
        scheduler = self.pipeline.scheduler
        values = torch.as_tensor(timesteps).tolist()
        given = args[1] if len(args) > 1 else kwargs["timestep"]
        factor = self.layout.time_factor * getattr(network.config, "timestep_scale", 1.0)
        now = float(torch.as_tensor(given).max()) / factor
        start = min(range(len(values)), key=lambda i: abs(values[i] - now))  # image to image begins in the middle
        values = values[start:]
        scale = self.guidance_scale
        if scale is None and self.layout.scale is not None:
            scale = float(getattr(self.pipeline, self.layout.scale))
        signal, noise = levels(scheduler, values)

        def identity() -> dict[str, Any]:
            return identity_of(self.pipeline, network, timesteps=values, guidance_scale=scale, shape=x.shape[1:],
                               negative=self.negative, arguments=kwargs)  # fmt: skip

        self.timesteps, self.step, self.network, self.negative, self.pending = timesteps, 0, network, negative, None
        self.run = GuidanceRun(
            samples=len(x),
            timesteps=tuple(values),
            prediction=prediction_of(scheduler),
            signal=signal,
            noise=noise,
            guidance_scale=scale,
            unconditional_alone=not self.layout.two_calls,
            cosine_threshold=self.cosine_threshold,
            identity=identity,
        )
        self.evaluations = [0] * len(x)
        self.policy = self.method.begin(self.run)

    def _finish(self) -> None:
        report = GuidanceReport(self.method.name, self.step + 1, self.evaluations, self.policy.diagnostics, self.method.settings())
        self.guided.reports.append(report)

    def close(self) -> None:
        """At the end of a block without error: a run that was cut short (denoising_end) is reported too."""
        if self.run is None:
            logger.warning("nothing was denoised under the guidance method %r; was the pipeline called inside the block?", self.method.name)
        elif self.pending is not None:
            logger.warning(self._guidance_off())
        elif self.step < self.run.steps - 1:
            self._finish()

    def _guidance_is_on(self) -> bool:
        return bool(self.told if self.layout.guidance_from_encoder else self.pipeline.do_classifier_free_guidance)

    def _guidance_off(self) -> str:
        name, method = type(self.pipeline).__name__, self.method.name
        if self.layout.two_calls:
            return (f"{name} runs without classifier-free guidance, so {method!r} has nothing to save; give a negative prompt and a "
                    "guidance scale above 1 (FLUX: true_cfg_scale), or leave the method out")  # fmt: skip
        given = "" if self.layout.scale is None else f" (guidance_scale is {getattr(self.pipeline, self.layout.scale):g})"
        return (f"{name} runs without classifier-free guidance{given}, so {method!r} has nothing to save; give a guidance_scale above 1, "
                "or leave the method out, as for models distilled to do without guidance")  # fmt: skip


def _text(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    return args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
