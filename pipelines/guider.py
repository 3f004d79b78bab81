"""Adaptive guidance for modular pipelines, as a guider: `pipeline.update_components(guider=AdaptiveGuider.of(method, pipeline.scheduler))`.

diffusers' guiders evaluate the branches one by one, and ask before every step how many there are; so the method's decision is the number of
conditions. One batch has one decision. The policy is the same as under guidance_hook.py.

A guider of diffusers remembers its last step, and the text encoder's block asks it, before the loop, whether a negative prompt is wanted:
one that stopped guiding early would answer no in the next call. This one forgets at the last step; `reset()` is for a run that broke off.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg
from torch import Tensor, nn

from diffalign.types import GuidanceMethod, GuidancePolicy, GuidanceReport, GuidanceRun
from pipelines.guidance_schedule import levels, prediction_of
from pipelines.guidance_tensors import network_input


class AdaptiveGuider(ClassifierFreeGuidance):
    """Classifier-free guidance under a guidance method, given when it is made or set later as `guider.method`.

    scheduler: the pipeline's, which no guider is told; what a prediction means depends on it. Neither is part of the guider's config: a
    guider that was saved and loaded guides in full until `method` and `scheduler` are set. report: of the last finished run.
    """

    @register_to_config
    def __init__(self, guidance_scale: float = 7.5, guidance_rescale: float = 0.0, use_original_formulation: bool = False) -> None:
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation)
        self.method: GuidanceMethod | None = None
        self.scheduler: Any = None
        self.report: GuidanceReport | None = None
        self.reset()

    @classmethod
    def of(cls, method: GuidanceMethod, scheduler: Any, guidance_scale: float = 7.5, guidance_rescale: float = 0.0) -> AdaptiveGuider:
        """A guider with its method."""
        guider = cls(guidance_scale, guidance_rescale)
        guider.method, guider.scheduler = method, scheduler
        return guider

    def reset(self) -> None:
        """Forgets the run. Call it after a run that ended in an exception."""
        self._step = self._num_inference_steps = None
        self._policy: GuidancePolicy | None = None
        self._cost = 0
        self._x: Tensor | None = None
        self._watch: Any = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        if step == 0:
            self.reset()
        super().set_state(step, num_inference_steps, timestep)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Notes what the network is given, which no guider is told."""
        super().prepare_models(denoiser)
        if self.method is not None:
            self._watch = denoiser.register_forward_pre_hook(self._note, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        super().cleanup_models(denoiser)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if self.method is None or not super()._is_cfg_enabled():
            return super().forward(pred_cond, pred_uncond)
        samples = len(pred_cond)
        if self._policy is None:
            self._policy = self.method.begin(self._run(samples))
        self._cost += 1 if pred_uncond is None else 2
        # where some samples want both, all have both; the policy is given what it planned
        rows = [row for row, branch in enumerate(self._policy.plan(self._step)) if branch == "both"]
        u = pred_cond[:0] if not rows else (pred_uncond if len(rows) == samples else pred_uncond[rows])
        c, u = self._policy.complete(self._step, self._x[:, : pred_cond.shape[1]], pred_cond, u)
        pred = (c if self.use_original_formulation else u) + self.guidance_scale * (c - u)
        if self.guidance_rescale > 0.0:
            pred = rescale_noise_cfg(pred, c, self.guidance_rescale)
        if self._step == self._num_inference_steps - 1:
            cost, diagnostics = [self._cost] * samples, self._policy.diagnostics
            self.report = GuidanceReport(self.method.name, self._num_inference_steps, cost, diagnostics, self.method.settings())
            self.reset()
        return GuiderOutput(pred=pred, pred_cond=c, pred_uncond=u)

    def _is_cfg_enabled(self) -> bool:
        enabled = super()._is_cfg_enabled()
        if not enabled or self._policy is None:
            return enabled
        plan = set(self._policy.plan(self._step))
        if "unconditional" in plan:
            raise ValueError("guiders evaluate the conditional branch in any case, so no step can do without it")
        return "both" in plan

    def _run(self, samples: int) -> GuidanceRun:
        if self.scheduler is None:
            raise ValueError("the guider must know the scheduler: make it as AdaptiveGuider.of(method, pipeline.scheduler)")
        timesteps = tuple(torch.as_tensor(self.scheduler.timesteps).tolist())[-self._num_inference_steps :]
        signal, noise = levels(self.scheduler, timesteps)
        return GuidanceRun(
            samples=samples,
            timesteps=timesteps,
            prediction=prediction_of(self.scheduler),
            signal=signal,
            noise=noise,
            guidance_scale=self.guidance_scale + 1 if self.use_original_formulation else self.guidance_scale,
            unconditional_alone=False,
        )

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._x = network_input(args, kwargs)
