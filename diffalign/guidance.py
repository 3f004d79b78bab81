"""The vocabulary of guidance methods: what they are told of a trajectory, what they decide at each step, what it cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from diffalign.types import StepMethod

Branch = Literal["both", "conditional", "unconditional"]
"""What is evaluated of one sample at one step; classifier-free guidance evaluates both."""


@dataclass(frozen=True)
class GuidanceRun:
    """One denoising trajectory, as a guidance method sees it before the first step.

    samples: images that are made. timesteps: those ahead, one for each evaluation of the network. prediction: what the network predicts,
    "epsilon", "v_prediction", "sample", "flow" (velocity, noise - x0) or "unknown". signal, noise: a_i and s_i of step i, where the input
    of the network is a_i x0 + s_i epsilon; empty where unknown. guidance_scale: w in u + w (c - u), None where the pipeline does not tell.
    unconditional_alone: whether a step can do without the conditional branch. cosine_threshold: calibrated for this model, if it is.
    identity: what fitted coefficients depend on, as plain JSON data; may be called once the first step has been evaluated.
    """

    samples: int
    timesteps: tuple[float, ...]
    prediction: str
    signal: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    guidance_scale: float | None = None
    unconditional_alone: bool = True
    cosine_threshold: float | None = None
    identity: Callable[[], Mapping[str, Any]] = dict

    @property
    def steps(self) -> int:
        return len(self.timesteps)


class GuidancePolicy(Protocol):
    """The decisions of one trajectory. For every step, first `plan`, then `complete`.

    plan: what to evaluate, for each sample. complete: the conditional and the unconditional prediction of every sample, from `x` (the
    network's input, "b ...") and what was evaluated: `c` has the rows not planned "unconditional", `u` those not planned "conditional",
    in order. To guide a sample no further is to return its c as its u. Returning c and u themselves changes nothing, to the bit.
    switch: the following predictions come from another network. diagnostics: one list per sample each, as in Trace.
    """

    diagnostics: dict[str, list[list[float]]]

    def plan(self, step: int) -> Sequence[Branch]: ...

    def complete(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]: ...

    def switch(self) -> None: ...


class GuidanceMethod(StepMethod, Protocol):
    """A rule for where classifier-free guidance is worth its second evaluation. `begin` is called for every trajectory.

    settings: the method's own, as plain JSON data.
    """

    def begin(self, run: GuidanceRun) -> GuidancePolicy: ...

    def settings(self) -> dict[str, Any]: ...


@dataclass
class GuidanceReport:
    """What one trajectory cost. evaluations[i]: of the network, for sample i; full guidance makes 2 * steps. settings: the method's."""

    method: str
    steps: int
    evaluations: list[int]
    diagnostics: dict[str, list[list[float]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def saved(self) -> float:
        """The share of full guidance's evaluations that were not made, over all samples."""
        return 1 - sum(self.evaluations) / (2 * self.steps * len(self.evaluations))
