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
    """One denoising trajectory, as a guidance method sees it before the first step."""

    samples: int
    """Images that are made."""
    timesteps: tuple[float, ...]
    """Those ahead, one for each evaluation of the network."""
    prediction: str
    """What the network predicts: one of diffusion.PREDICTIONS, or "unknown"."""
    signal: tuple[float, ...] = ()
    """a_i at each step, where the network's input is a_i x0 + s_i epsilon; empty where unknown."""
    noise: tuple[float, ...] = ()
    """s_i at each step; empty where unknown."""
    guidance_scale: float | None = None
    """w in u + w (c - u); None where the pipeline does not tell."""
    unconditional_alone: bool = True
    """Whether a step can do without the conditional branch."""
    cosine_threshold: float | None = None
    """Calibrated for this model, if it is."""
    identity: Callable[[], Mapping[str, Any]] = dict
    """What fitted coefficients depend on, as plain JSON data; may be called once the first step has been evaluated."""

    @property
    def steps(self) -> int:
        return len(self.timesteps)


class GuidancePolicy(Protocol):
    """The decisions of one trajectory. For every step, first `plan`, then `complete`."""

    diagnostics: dict[str, list[list[float]]]
    """One list per sample each, as in Trace."""

    def plan(self, step: int) -> Sequence[Branch]:
        """What to evaluate, for each sample."""
        ...

    def complete(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional prediction of every sample, from the network's input x "b ..." and what was evaluated.

        c has the rows not planned "unconditional", u those not planned "conditional", in order. To guide a sample no further is to return
        its c as its u. Returning c and u themselves changes nothing, to the bit.
        """
        ...

    def network_changed(self) -> None:
        """The following predictions come from another network."""
        ...


class GuidanceMethod(StepMethod, Protocol):
    """A rule for where classifier-free guidance is worth its second evaluation."""

    def begin(self, run: GuidanceRun) -> GuidancePolicy:
        """Called for every trajectory."""
        ...

    def settings(self) -> dict[str, Any]:
        """The method's own, as plain JSON data."""
        ...


@dataclass
class GuidanceReport:
    """What one trajectory cost."""

    method: str
    steps: int
    evaluations: list[int]
    """Of the network, for each sample; full guidance makes 2 * steps."""
    diagnostics: dict[str, list[list[float]]] = field(default_factory=dict)
    """Of the policy: one list per sample each, as in Trace."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The method's."""

    @property
    def saved(self) -> float:
        """The share of full guidance's evaluations that were not made, over all samples."""
        return 1 - sum(self.evaluations) / (2 * self.steps * len(self.evaluations))
