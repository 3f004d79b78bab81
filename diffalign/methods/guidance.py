"""What the guidance methods share: predictions in other spaces, their cosine, and policies whose steps are fixed beforehand.

Notation, here and in the methods' files: c, u are the network's outputs with the prompt and with the negative (or empty) one, w is the
guidance scale, and the sampler is given g = u + w (c - u) = c + (w - 1) d with d = c - u. A step without its second evaluation returns c
for u, and then g = c whatever w is, and whatever the pipeline does to g afterwards (guidance_rescale is neutral).

What a prediction means for x0 is in diffalign/diffusion.py; velocity is v = (a eps - s x0).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import to_x0
from diffalign.guidance import Branch, GuidancePolicy, GuidanceRun
from diffalign.noise import sample_dot

SPACES = ("auto", "x0", "velocity", "model_output")


def resolve_space(space: str, prediction: str) -> str:
    """ "auto" is x0 for networks that predict epsilon, and what the network predicts otherwise.

    Epsilon is the one prediction whose two branches begin alike for every prompt, since x is nearly all noise then: their cosine is near 1
    at the first step and a threshold would stop guidance there.
    """
    if space == "auto":
        return "x0" if prediction == "epsilon" else "model_output"
    if (space, prediction) in (("x0", "sample"), ("velocity", "v_prediction"), ("velocity", "flow")):
        return "model_output"
    if space != "model_output" and prediction == "unknown":
        raise ValueError(f"space {space!r} needs to know what the network predicts, and this scheduler does not say; use 'model_output'")
    return space


def direction(
    output: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."], signal: float, noise: float, prediction: str, space: str
) -> Float[Tensor, "b ..."]:
    """The prediction in `space` (resolved), float32, up to a positive factor, which a cosine ignores: nothing is divided by the signal."""
    output, x = output.float(), x.float()
    if space == "model_output":
        return output
    if prediction == "epsilon":
        return x - noise * output if space == "x0" else output - noise * x  # a x0, and a v = eps - s x
    if space == "velocity":
        return signal * x - output  # from x0: s v = a x - x0, when a^2 + s^2 = 1
    return to_x0(x, output, signal, noise, prediction)


def cosine(a: Float[Tensor, "b ..."], b: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Of each sample over all its entries, in float32: bfloat16 has no number between 0.996 and 1."""
    tiny = torch.finfo(torch.float32).tiny
    return sample_dot(a, b) / (sample_dot(a, a) * sample_dot(b, b)).sqrt().clamp_min(tiny)


class Guidance:
    """Base of the guidance methods. Subclasses are frozen dataclasses of their settings and give `begin`."""

    name: ClassVar[str]

    def begin(self, run: GuidanceRun) -> GuidancePolicy:
        raise NotImplementedError

    def attach(self, pipeline: Any) -> AbstractContextManager[Any]:
        """For `plugins=[...]`. TypeError for a stock pipeline, which `diffalign.guided(pipeline, method)` serves."""
        if not callable(getattr(pipeline, "guide", None)):
            raise TypeError(f"{type(pipeline).__name__} takes no plugins; write `with diffalign.guided(pipeline, method): pipeline(...)`")
        return pipeline.guide(self)

    def settings(self) -> dict[str, Any]:
        """As plain JSON data, for reports."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}


class PlannedPolicy:
    """A policy whose steps are fixed beforehand and which guides no further where there is no second evaluation.

    branches: one for each step. Subclasses override `estimate`.
    """

    def __init__(self, run: GuidanceRun, branches: Sequence[Branch]) -> None:
        if len(branches) != run.steps:
            raise ValueError(f"the plan has {len(branches)} steps and the run {run.steps}")
        self.run = run
        self.branches = tuple(branches)
        self.diagnostics: dict[str, list[list[float]]] = {}

    def plan(self, step: int) -> Sequence[Branch]:
        return [self.branches[step]] * self.run.samples

    def complete(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        if self.branches[step] == "both":
            self.observe(step, x, c, u)
            return c, u
        return c, self.estimate(step, x, c)

    def observe(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> None:
        """Both were evaluated."""

    def estimate(self, step: int, x: Tensor, c: Tensor) -> Tensor:
        """The unconditional prediction where only the conditional one was evaluated; c itself is no guidance."""
        return c

    def network_changed(self) -> None:
        """Nothing is remembered."""


def leading(fraction: float, steps: int) -> int:
    """How many steps the leading `fraction` of a run is, at least one: the first is where guidance does most."""
    return max(1, round(fraction * steps))


def guided_within(budget: float, steps: int) -> int:
    """How many steps can evaluate both branches within a budget, a share of full guidance's 2 * steps. ValueError where none can."""
    guided = int(budget * 2 * steps + 1e-9) - steps
    if guided < 1:
        raise ValueError(f"budget must be at least {(steps + 1) / (2 * steps):g}, for one guided step of {steps}, got {budget:g}.")
    return guided


def require_scale(run: GuidanceRun, what: str) -> float:
    """w. ValueError where the pipeline keeps it to itself and nobody told, or where it says that there is no guidance."""
    if run.guidance_scale is None:
        raise ValueError(f"{what} needs the guidance scale, which this pipeline does not tell; pass guidance_scale= to guided() too")
    if run.guidance_scale <= 1:
        raise ValueError(f"{what} needs a guidance scale above 1, got {run.guidance_scale:g}")
    return run.guidance_scale


# ---- what fitted coefficients belong to ------------------------------------------------------------------------------------------


def require_same_identity(what: str, made_for: Mapping[str, Any], found: Mapping[str, Any], ignore: Collection[str] = ()) -> None:
    """Raises ValueError naming every field in which a run differs from the one that `what` was made on, with both values where short."""
    reasons = [
        f"{name}: {_shown(made_for.get(name))} when it was made, {_shown(found.get(name))} now"
        for name in sorted({*made_for, *found} - set(ignore))
        if not _alike(made_for.get(name), found.get(name))
    ]
    if reasons:
        raise ValueError(f"{what} does not fit this run ({'; '.join(reasons)}); make it anew with these settings, or use 'adaptive'.")


def _alike(a: Any, b: Any) -> bool:
    """Equal; numbers within 1e-4, lists of numbers within 1 % of their norm: text encoders round differently from batch to batch."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and all(isinstance(each, int | float) for each in [*a, *b]):
        return len(a) == len(b) and math.dist(a, b) <= 0.01 * max(math.hypot(*a), 1e-6)
    return a == b


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} numbers" if len(value) > 4 else str(list(value))
    return "not stated" if value is None else str(value)
