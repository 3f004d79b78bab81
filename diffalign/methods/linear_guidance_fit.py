"""The fit of LinearAG (linear_guidance.py): a guidance method that guides in full and adds up what every regression needs.

    fit = LinearFit(LinearSettings())
    with pipeline.guide(fit): pipeline(prompts, seed=0)      # as often as wanted
    fit.solve().save(folder)

Kept are the products of all c_i and d_i of a run with one another, summed over samples: 2T x 2T numbers, from which the regression of any
step on any others is a change of basis. So one collection serves every plan, and the best plan within a budget can be chosen:

    min over the sets of K evaluated steps of   sum_t  h_t |d_t| r_t     with r_t the residual of predicting step t, 0 where it is evaluated

h_t is what a unit of error in the network's output at step t moves x by, along the sampler (`influence`): for epsilon the change of s / a.
A prediction sees the last `window` evaluated steps, so the minimum is found exactly, by dynamic programming over those: T^3 / 6 regressions
for a window of 2, which is seconds at 50 steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.guidance import GuidanceRun
from diffalign.methods.guidance import Guidance, PlannedPolicy, guided_within, leading, require_same_identity, require_scale
from diffalign.methods.linear_guidance import LinearCoefficients, LinearSettings, features

logger = logging.getLogger(__name__)

HELD_OUT_EVERY = 5  # every fifth sample is held out


@dataclass
class Sums:
    """Sums of products over samples and entries, for one step: Gram matrix of the columns, their products with d, |d|^2, entries."""

    gram: Float[Tensor, "m m"]
    right: Float[Tensor, " m"]
    target: float
    entries: int

    def solve(self, ridge: float) -> Float[Tensor, " m"]:
        """argmin_b |d - sum b_i f_i|^2 / |d|^2 + ridge |b'|^2, b' being the coefficients of columns and d scaled to unit RMS."""
        scale = (self.gram.diagonal() / max(self.entries, 1)).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        gram = self.gram / (scale[:, None] * scale[None, :] * max(self.entries, 1))
        right = self.right / (scale * max(self.entries, 1))
        gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
        # not `solve`: without ridge the matrix may be singular
        return torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution[:, 0] / scale

    def residual(self, coefficients: Float[Tensor, " m"]) -> float:
        """RMS of d - sum b_i f_i."""
        squared = self.target - 2 * float(coefficients @ self.right) + float(coefficients @ self.gram @ coefficients)
        return (max(squared, 0.0) / max(self.entries, 1)) ** 0.5


@dataclass
class Products:
    """Products of c_0 .. c_T-1, d_0 .. d_T-1 with one another, summed over samples and entries, in float64."""

    matrix: Float[Tensor, "k k"]
    """k = 2 T."""
    entries: int = 0

    @classmethod
    def zeros(cls, steps: int) -> Products:
        return cls(torch.zeros(2 * steps, 2 * steps, dtype=torch.float64))

    def add(self, trajectory: Float[Tensor, "k n"]) -> None:
        """One sample's, k = 2 T."""
        rows = trajectory.cpu().double()
        self.matrix, self.entries = self.matrix + rows @ rows.T, self.entries + rows.shape[1]

    def merge(self, other: Products) -> None:
        self.matrix, self.entries = self.matrix + other.matrix, self.entries + other.entries

    def sums(self, step: int, past: Sequence[int]) -> Sums:
        """For the regression of d at `step` on the features that evaluated steps `past`, latest first, give."""
        steps = len(self.matrix) // 2
        unit = torch.eye(2 * steps, dtype=self.matrix.dtype)
        basis = features(unit[step], [(unit[each], unit[steps + each]) for each in past])
        products = basis @ self.matrix
        return Sums(products @ basis.T, products[:, steps + step], float(self.matrix[steps + step, steps + step]), self.entries)

    def rms(self, step: int) -> float:
        """Of d."""
        place = len(self.matrix) // 2 + step
        return (float(self.matrix[place, place]) / max(self.entries, 1)) ** 0.5


class LinearFit(Guidance):
    """Collects over any number of runs, which must agree in everything that coefficients depend on. A broken-off run leaves no trace."""

    name: ClassVar[str] = "linear-fit"

    def __init__(self, settings: LinearSettings | None = None) -> None:
        self.plan_settings = settings or LinearSettings()
        self.samples = self.steps = 0
        self.identity: dict[str, Any] | None = None
        self.weights: list[float] = []

    def settings(self) -> dict[str, Any]:
        return {}

    def begin(self, run: GuidanceRun) -> CollectPolicy:
        require_scale(run, "LinearAG")
        return CollectPolicy(self, run)

    def merge(self, run: GuidanceRun, fitted: Products, held_out: Products) -> None:
        """Adds a finished run."""
        identity = dict(run.identity())
        if self.identity is None:
            self.identity, self.steps, self.weights = identity, run.steps, influence(run)
            self.fitted, self.held_out, self.all = (Products.zeros(run.steps) for _ in range(3))
        require_same_identity("what has been collected", self.identity, identity)
        self.fitted.merge(fitted)
        self.held_out.merge(held_out)
        for each in (fitted, held_out):
            self.all.merge(each)
        self.samples += run.samples

    def solve(self, settings: LinearSettings | None = None) -> LinearCoefficients:
        """The fit under these settings, or the fit's own. Raises ValueError before enough has been collected, or for too small a budget."""
        if self.samples < HELD_OUT_EVERY:
            raise ValueError(f"LinearAG needs at least {HELD_OUT_EVERY} samples, one of them held out; got {self.samples}.")
        settings = settings or self.plan_settings
        lead = leading(settings.share, self.steps)
        if settings.budget is not None:
            evaluated, predicted = self._choose(settings), range(self.steps)
        else:
            evaluated = self._published(settings, lead)
            predicted = range(self.steps if settings.tail == "estimate" else lead)
        by_step, residuals = {}, {}
        for step in sorted(set(predicted) - set(evaluated)):
            coefficients, residuals[step] = self._fit(step, _latest(evaluated, step, settings.window), settings.ridge)
            if residuals[step] <= 1:
                by_step[step] = coefficients
            else:
                logger.warning("LinearAG misses step %d by %.0f %% of the guidance; it will not be guided", step, 100 * residuals[step])
        branches = tuple("both" if step in evaluated else "conditional" for step in range(self.steps))
        held_out = self.samples // HELD_OUT_EVERY
        return LinearCoefficients(settings, branches, by_step, residuals, self.identity or {}, self.samples - held_out, held_out)

    def _fit(self, step: int, past: Sequence[int], ridge: float) -> tuple[Float[Tensor, " m"], float]:
        """Coefficients, and their residual on what was held out, in units of the guidance of all samples: late in a run a few samples may
        have nearly all of it, and whether those were held out is chance."""
        coefficients = self.fitted.sums(step, past).solve(ridge)
        missed, guidance = self.held_out.sums(step, past).residual(coefficients), self.all.rms(step)
        return coefficients, missed / guidance if guidance > 0 else 0.0

    def _published(self, settings: LinearSettings, lead: int) -> list[int]:
        """Every period-th step of the leading part, and those of it that cannot be predicted well enough from the ones before."""
        evaluated: list[int] = []
        for step in range(lead):
            missed = 0.0
            if step % settings.period:
                _, missed = self._fit(step, _latest(evaluated, step, settings.window), settings.ridge)
            if missed > settings.limit:
                logger.warning("LinearAG misses step %d by %.0f %% of the guidance; it will be evaluated", step, 100 * missed)
            if step % settings.period == 0 or missed > settings.limit:
                evaluated.append(step)
        return evaluated

    def _choose(self, settings: LinearSettings) -> list[int]:
        """The evaluated steps within the budget, the first among them, that leave the least error."""

        @cache
        def price(step: int, past: tuple[int, ...]) -> float:
            return self.weights[step] * self.all.rms(step) * min(1.0, self._fit(step, past, settings.ridge)[1])

        @cache
        def best(past: tuple[int, ...], left: int) -> tuple[float, tuple[int, ...]]:
            """The least error after the evaluated step past[0] with `left` more evaluated, and which those are."""
            if left == 0:
                return sum(price(step, past) for step in range(past[0] + 1, self.steps)), ()
            between, found = 0.0, (math.inf, ())
            for following in range(past[0] + 1, self.steps):
                after, more = best((following, *past)[: settings.window], left - 1)
                found = min(found, (between + after, (following, *more)))
                between += price(following, past)
            return found

        return [0, *best((0,), guided_within(settings.budget, self.steps) - 1)[1]]


def _latest(evaluated: Sequence[int], step: int, window: int) -> tuple[int, ...]:
    return tuple(sorted((each for each in evaluated if each < step), reverse=True)[:window])


def influence(run: GuidanceRun) -> list[float]:
    """h_t, up to a factor. x / a moves by epsilon d(s / a), whatever the network predicts. Where the schedule is unknown, 1."""
    if not run.noise or run.prediction == "unknown":
        return [1.0] * run.steps
    if run.prediction == "flow":  # x moves by v ds
        return [abs(now - later) for now, later in pairwise([*run.noise, 0.0])]
    levels = [s / max(a, 1e-6) for a, s in zip(run.signal, run.noise, strict=True)]
    of_epsilon = [abs(now - later) for now, later in pairwise([*levels, 0.0])]
    share = {"epsilon": lambda a, s: 1.0, "v_prediction": lambda a, s: a, "sample": lambda a, s: a / max(s, 1e-6)}[run.prediction]
    return [h * share(a, s) for h, a, s in zip(of_epsilon, run.signal, run.noise, strict=True)]


class CollectPolicy(PlannedPolicy):
    """One run with full guidance."""

    def __init__(self, fit: LinearFit, run: GuidanceRun) -> None:
        super().__init__(run, ["both"] * run.steps)
        self.fit = fit
        self.trajectory: list[tuple[Tensor, Tensor]] = []

    def observe(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> None:
        self.trajectory.append((c.detach(), (c - u).detach()))
        if step < self.run.steps - 1:
            return
        fitted, held_out = Products.zeros(self.run.steps), Products.zeros(self.run.steps)
        for row in range(self.run.samples):
            last = (self.fit.samples + row) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            each = torch.stack([pair[part][row].flatten() for part in (0, 1) for pair in self.trajectory])
            (held_out if last else fitted).add(each)
        self.fit.merge(self.run, fitted, held_out)

    def network_changed(self) -> None:
        raise ValueError("LinearAG is fitted to one network, and this pipeline changes its network during a run; use 'adaptive'.")
