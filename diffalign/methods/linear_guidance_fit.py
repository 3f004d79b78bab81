"""The fit of LinearAG (linear_guidance.py): a guidance method that guides in full and adds up what the regression needs.

fit = LinearFit(LinearSettings())
with pipeline.guide(fit): pipeline(prompts, seed=0)      # as often as wanted
fit.solve().save(folder)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from diffalign.methods.guidance import Guidance, Planned, require_same_identity, require_scale
from diffalign.methods.linear_guidance import LinearCoefficients, LinearSettings, Sums, features
from diffalign.types import Branch, GuidanceRun

logger = logging.getLogger(__name__)

HELD_OUT_EVERY = 5  # every fifth sample is held out


class LinearFit(Guidance):
    """Collects over any number of runs, which must agree in everything that coefficients depend on. A broken-off run leaves no trace."""

    name: ClassVar[str] = "linear-fit"

    def __init__(self, settings: LinearSettings | None = None) -> None:
        self.plan_settings = settings or LinearSettings()
        self.samples = 0
        self.identity: dict[str, Any] | None = None
        self.branches: list[Branch] = []
        self.fitted: dict[int, Sums] = {}
        self.held_out: dict[int, Sums] = {}

    def settings(self) -> dict[str, Any]:
        return {}

    def begin(self, run: GuidanceRun) -> Collect:
        require_scale(run, "LinearAG")
        return Collect(self, run)

    def solve(self) -> LinearCoefficients:
        """Raises ValueError before enough has been collected. Steps that cannot be predicted well enough are planned to be evaluated."""
        if self.samples < HELD_OUT_EVERY:
            raise ValueError(f"LinearAG needs at least {HELD_OUT_EVERY} samples, one of them held out; got {self.samples}.")
        settings, branches = self.plan_settings, list(self.branches)
        by_step, residuals = {}, {}
        for step, sums in self.fitted.items():
            coefficients = sums.solve(settings.ridge)
            residuals[step] = self.held_out[step].residual(coefficients)
            if residuals[step] <= settings.limit:
                by_step[step] = coefficients
            else:
                branches[step] = "both"
                logger.warning("LinearAG misses step %d by %.0f %% of the guidance; it will be evaluated", step, 100 * residuals[step])
        held_out = self.samples // HELD_OUT_EVERY
        return LinearCoefficients(settings, tuple(branches), by_step, residuals, self.identity or {}, self.samples - held_out, held_out)

    def merge(self, run: GuidanceRun, fitted: dict[int, Sums], held_out: dict[int, Sums]) -> None:
        """Adds a finished run."""
        identity = dict(run.identity())
        if self.identity is None:
            self.identity, self.branches = identity, self.plan_settings.branches(run.steps)
        require_same_identity("what has been collected", self.identity, identity)
        for mine, new in ((self.fitted, fitted), (self.held_out, held_out)):
            for step, sums in new.items():
                if step in mine:
                    mine[step].merge(sums)
                else:
                    mine[step] = sums
        self.samples += run.samples


class Collect(Planned):
    """One run with full guidance."""

    def __init__(self, fit: LinearFit, run: GuidanceRun) -> None:
        super().__init__(run, ["both"] * run.steps)
        self.fit = fit
        self.evaluated = fit.plan_settings.branches(run.steps)
        self.predicted = set(fit.plan_settings.predicted(run.steps))
        numbers = range(fit.samples, fit.samples + run.samples)
        held = [number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for number in numbers]
        self.rows = [[row for row, out in enumerate(held) if out is wanted] for wanted in (False, True)]
        self.sums: Sequence[dict[int, Sums]] = ({}, {})
        self.past: list[tuple[Tensor, Tensor]] = []

    def observe(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> None:
        c, d = c.detach(), (c - u).detach()
        if step in self.predicted:
            columns = features(c, self.past)
            for rows, sums in zip(self.rows, self.sums, strict=True):
                sums[step] = Sums.zeros(len(columns))
                if rows:
                    sums[step].add(columns[:, rows], d[rows])
        if self.evaluated[step] == "both":
            self.past = [(c, d), *self.past][: self.fit.plan_settings.window]
        if step == self.run.steps - 1:
            self.fit.merge(self.run, *self.sums)

    def switch(self) -> None:
        raise ValueError("LinearAG is fitted to one network, and this pipeline changes its network during a run; use 'adaptive'.")
