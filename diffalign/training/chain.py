"""A few-step generator made of a denoiser: predict x0, noise it to the next level, predict again.

    x_0 = noise;   x0^_i = D(x_i, t_i, c);   x_{i+1} = a_{i+1} x0^_i + s_{i+1} (sqrt(1 - eta^2) eps^_i + eta xi)

eps^_i is the noise that x0^_i implies, xi fresh noise, (a, s) signal and noise of a level: a^2 + s^2 = 1 for variance-preserving
models, a = 1 - s for flows; one formula serves both. With the true eps in place of eps^, x_{i+1} has the mean and the variance of the
forward process for every eta: 0 is a deterministic DDIM step, 1 re-noises from scratch as consistency models do.

Everything that a sample draws comes from its own seed and the step's number, and no generator's state runs on between them. So a
chain can be stopped without gradient at a step and go on with gradient, and a batch equals its samples alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from diffalign.backbone import Backbone, Conditioning, Size
from diffalign.diffusion import DDIM, Sampler, Schedule, Step, to_x0
from diffalign.loop import LoopState
from diffalign.noise import spread
from diffalign.sampling import rollout
from diffalign.training.contract import Denoiser, PromptBatch

ETA, RENOISE, STEP, GUIDANCE, LOW_VARIANCE = range(1, 6)
"""What a stream is for; beside the sample's seed and the number of the draw it makes the stream's own seed."""


def streams(seeds: Sequence[int], purpose: int, draw: int = 0) -> list[torch.Generator]:
    """A generator for each sample, on the CPU, that depends on (its seed, purpose, draw) alone."""
    hashed = [np.random.SeedSequence([seed % 2**64, purpose, draw]).generate_state(1, np.uint64)[0] for seed in seeds]
    return [torch.Generator().manual_seed(int(state)) for state in hashed]


def normal_like(x: Float[Tensor, "b ..."], generators: Sequence[torch.Generator]) -> Float[Tensor, "b ..."]:
    """Unit noise of x's shape, float32, sample i from generators[i]."""
    return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)


def uniform(generators: Sequence[torch.Generator]) -> Float[Tensor, " b"]:
    """One number in [0, 1) from each generator."""
    return torch.cat([torch.rand(1, generator=g) for g in generators])


def random_steps(seeds: Sequence[int], first: int, steps: int) -> list[int]:
    """For each sample one of the steps first ... steps - 1, alike, from its seed."""
    first = min(first, steps - 1)
    return [min(first + int(u * (steps - first)), steps - 1) for u in uniform(streams(seeds, STEP)).tolist()]


# ---- steps -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomEta(Sampler):
    """The step above, with eta drawn uniformly between `low` and `high` for every sample and step."""

    seeds: tuple[int, ...]
    """One for each sample."""
    low: float = 0.0
    high: float = 1.0

    def eta(self, i: int) -> Float[Tensor, " b"]:
        """What was drawn for step i."""
        return self.low + (self.high - self.low) * uniform(streams(self.seeds, ETA, i))

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        x0, eps = schedule.to_x0(i, x, output), schedule.to_eps(i, x, output)
        eta = spread(self.eta(i).to(x0.device), x0)
        fresh = normal_like(x0, streams(self.seeds, RENOISE, i))
        mixed = (1 - eta.square()).sqrt() * eps + eta * fresh
        return Step(schedule.signal[i + 1] * x0 + schedule.noise[i + 1] * mixed, 0.0, x0)


@dataclass(frozen=True)
class SeededDDIM(Sampler):
    """DDIM whose noise comes from each sample's seed and the step's number; to the loop its steps are deterministic."""

    seeds: tuple[int, ...]
    """One for each sample."""
    eta: float = 0.0
    """In [0, 1], as DDIM's."""

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        step = DDIM(self.eta).step(schedule, i, x, output)
        if step.std == 0:
            return step
        return Step(step.mean + step.std * normal_like(step.mean, streams(self.seeds, RENOISE, i)), 0.0, step.x0)


def levels_of(backbone: Backbone, steps: int, timesteps: tuple[float, ...] | None, size: Size | None) -> Schedule:
    """The chain's levels: the stock schedule of so many steps, or those at `timesteps`, descending, and then the clean image."""
    if timesteps is None:
        return backbone.schedule(steps, size=size)
    signal, noise = backbone.levels(torch.tensor(timesteps))
    return Schedule(tuple(timesteps), (*signal.tolist(), 1.0), (*noise.tolist(), 0.0), backbone.prediction)


# ---- stopping and going on ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paused:
    """Samples in the middle of their chains, without gradient."""

    state: Float[Tensor, "b ..."]
    """x before step `steps[b]` of sample b; at step 0 the noise."""
    steps: tuple[int, ...]
    """The step that each sample makes next."""
    conditioning: Conditioning
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)


def pause(
    policy: Denoiser, batch: PromptBatch, schedule: Schedule, sampler: Sampler, steps: Sequence[int], guidance_scale: float = 1.0
) -> Paused:
    """Run sample b up to, not including, step steps[b], without gradient. Memory does not depend on how far that is."""
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    with torch.no_grad():
        noise = policy.backbone.draw_noise(generators, batch.conditioning.size)
        picked = sampler.begin(schedule, noise)
        stops = torch.as_tensor(list(steps), device=picked.device)

        def pick(state: LoopState) -> None:
            nonlocal picked
            picked = torch.where(spread(stops == state.index + 1, state.x), state.x, picked)

        if max(steps) > 0:
            rollout(policy.as_backbone(), noise, batch.conditioning, schedule, sampler,
                    guidance_scale=guidance_scale, on_step=pick, last=max(steps))  # fmt: skip
    return Paused(picked, tuple(steps), batch.conditioning, batch.seeds)


def finish(
    policy: Denoiser,
    paused: Paused,
    schedule: Schedule,
    sampler: Sampler,
    guidance_scale: float = 1.0,
    *,
    cuts: Sequence[int] | None = None,
    checkpoint: bool = False,
) -> LoopState:
    """The last step of a chain that goes on with gradient; all samples must have been paused at the same step.

    cuts: the first step of each sample whose gradient counts; what went before is a constant. checkpoint: see `rollout`.
    """
    first = paused.steps[0]
    if set(paused.steps) != {first}:
        raise ValueError(f"steps must be one number to go on together, got {sorted(set(paused.steps))}; pause all samples at the least")
    limits = torch.as_tensor(list(cuts or [first] * len(paused)), device=paused.state.device)
    kept: list[LoopState] = []

    def look(state: LoopState) -> LoopState | None:
        kept[:] = [state]
        cut = limits > state.index
        return replace(state, x=torch.where(spread(cut, state.x), state.x.detach(), state.x)) if cut.any() else None

    begun = replace(schedule, start=1.0)  # the state is begun already
    rollout(policy.as_backbone(), paused.state, paused.conditioning, begun, sampler, guidance_scale=guidance_scale,
            on_step=look, first=first, checkpoint=checkpoint)  # fmt: skip
    return kept[0]


def predict_x0(
    denoiser: Callable[..., Tensor],
    x: Float[Tensor, "b ..."],
    steps: Sequence[int],
    schedule: Schedule,
    conditioning: Conditioning,
    guidance_scale: float = 1.0,
    checkpoint: bool = False,
) -> Float[Tensor, "b ..."]:
    """The clean latents of one evaluation, each sample at its own step, float32. checkpoint: see `rollout`."""
    told, signal, noise = (torch.tensor([of[i] for i in steps]) for of in (schedule.timesteps, schedule.signal, schedule.noise))
    call = (x, told, conditioning, guidance_scale)
    output = checkpointed(denoiser, *call, use_reentrant=False) if checkpoint and torch.is_grad_enabled() else denoiser(*call)
    return to_x0(x, output, signal, noise, schedule.prediction)


def departure(x0: Float[Tensor, "b ..."], reference: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """The root mean square distance of each sample from the reference's prediction for the same input."""
    return (x0 - reference).square().flatten(1).mean(1).clamp_min(0).sqrt()


def anchor(x0: Float[Tensor, "b ..."], reference: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """||x0 - reference||^2 / (2 sqrt(d)): its gradient has the norm of the root mean square distance, whatever the size d."""
    return (x0 - reference).square().flatten(1).sum(1) / (2 * math.sqrt(x0[0].numel()))


# ---- settings ----------------------------------------------------------------------------------------------------------------


def check_steps(steps: int, timesteps: tuple[float, ...] | None) -> None:
    """ValueError unless there is at least one step, and as many timesteps as steps where they are given."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if timesteps is not None and (len(timesteps) != steps or list(timesteps) != sorted(set(timesteps), reverse=True)):
        raise ValueError(f"timesteps must be {steps} numbers, as many as steps, from noise to image; got {timesteps}")


def check_at_least_zero(name: str, value: float) -> None:
    """ValueError for what is negative or not finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def plain_settings(objective: Any) -> dict[str, Any]:
    """The objective's name and fields as plain JSON data; of a function, whether there is one."""

    def plain(value: Any) -> Any:
        if hasattr(value, "settings"):
            return value.settings()
        if is_dataclass(value):
            return asdict(value)
        return list(value) if isinstance(value, tuple) else True if callable(value) else value

    return {"name": objective.name, **{field.name: plain(getattr(objective, field.name)) for field in fields(objective)}}
