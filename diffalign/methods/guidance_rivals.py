"""Three simpler ways to spend less on guidance, as rivals of Adaptive Guidance in the same harness.

FixedFraction: guide the first p T of T steps. Step AG, Zhang et al. 2025 (2506.08351), who hold that the cosine adds nothing to it.
IntervalGuidance: guide where the noise level lies in (low, high]. Kynkaanniemi et al., NeurIPS 2024 (2404.07724).
DeltaReuse: after p T steps keep the last d = c - u, so g = c + (w - 1) d. The "CFG gating" of FastVideo (pull request 1372) and sglang.

Notation in guidance.py. The fourth rival needs no code: fewer steps at an equal number of evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.guidance import Branch, GuidanceRun
from diffalign.methods.checks import check_integer, check_number
from diffalign.methods.guidance import Guidance, PlannedPolicy, leading


@dataclass(frozen=True, kw_only=True)
class FixedFraction(Guidance):
    """FixedFraction(fraction=0.5): evaluations saved are (1 - fraction) / 2."""

    name: ClassVar[str] = "fixed"

    fraction: float = 0.5
    """p in [0, 1], of the steps, at least one. Step AG: 0.4 to 0.6, by model."""

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, 0.0, 1.0)

    def begin(self, run: GuidanceRun) -> PlannedPolicy:
        guided = leading(self.fraction, run.steps)
        return PlannedPolicy(run, ["both" if step < guided else "conditional" for step in range(run.steps)])


@dataclass(frozen=True, kw_only=True)
class IntervalGuidance(Guidance):
    """IntervalGuidance(low=0.28, high=5.42), in the ratio of noise to signal s / a of a step, which is sigma of EDM.

    The pipeline's own guidance scale is used inside; the paper raises it (16 for SDXL), since guidance acts on fewer steps.
    """

    name: ClassVar[str] = "interval"

    low: float = 0.28
    """>= 0, not included. Paper, SDXL: 0.28."""
    high: float = 5.42
    """Above low, included; inf guides from the first step. Paper, SDXL: 5.42."""

    def __post_init__(self) -> None:
        check_number("low", self.low, 0.0)
        if self.high != math.inf:
            check_number("high", self.high, self.low, above=True)

    def begin(self, run: GuidanceRun) -> PlannedPolicy:
        """Raises ValueError where the scheduler does not tell its noise, or no step lies in the interval."""
        if not run.noise:
            raise ValueError("interval guidance needs the noise level of every step, which this scheduler does not tell; use 'fixed'")
        levels = [noise / signal if signal > 0 else math.inf for signal, noise in zip(run.signal, run.noise, strict=True)]
        inside = [self.low < level <= self.high for level in levels]
        if not any(inside):
            raise ValueError(f"none of the {run.steps} steps has a noise level in ({self.low:g}, {self.high:g}]; "
                             f"they run from {levels[0]:.3g} to {levels[-1]:.3g}")  # fmt: skip
        return PlannedPolicy(run, ["both" if each else "conditional" for each in inside])


@dataclass(frozen=True, kw_only=True)
class DeltaReuse(Guidance):
    """DeltaReuse(fraction=0.5, refresh=None)."""

    name: ClassVar[str] = "reuse"

    fraction: float = 0.5
    """p in [0, 1] of the steps, at least one, is guided in full. FastVideo: 0.5."""
    refresh: int | None = None
    """>= 2: evaluate both at every refresh-th step afterwards. None: never. FastVideo: never."""

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, 0.0, 1.0)
        if self.refresh is not None:
            check_integer("refresh", self.refresh, 2)

    def begin(self, run: GuidanceRun) -> ReusePolicy:
        guided = leading(self.fraction, run.steps)

        def branch(step: int) -> Branch:
            again = self.refresh is not None and (step - guided + 1) % self.refresh == 0
            return "both" if step < guided or again else "conditional"

        return ReusePolicy(run, [branch(step) for step in range(run.steps)])


class ReusePolicy(PlannedPolicy):
    """Remembers the last guidance difference. After a change of network it evaluates once more."""

    delta: Tensor | None = None

    def plan(self, step: int) -> Sequence[Branch]:
        if self.delta is None:
            self.branches = (*self.branches[:step], "both", *self.branches[step + 1 :])
        return super().plan(step)

    def observe(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> None:
        self.delta = c.detach() - u.detach()

    def estimate(self, step: int, x: Tensor, c: Tensor) -> Tensor:
        return c - self.delta

    def network_changed(self) -> None:
        self.delta = None
