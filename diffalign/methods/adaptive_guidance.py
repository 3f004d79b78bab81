"""Adaptive Guidance: stop evaluating the unconditional branch of a sample once it agrees with the conditional one.

Paper: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025 (2312.12487).

    gamma_t = <c_t, u_t> / (|c_t| |u_t|);    guided while gamma < gamma_bar, conditional alone ever after:  g = c

c, u -> the two predictions; gamma -> `cosine`; gamma_bar -> `threshold`. The step that crosses the threshold has paid for both branches and
is still guided. T steps of which k are guided cost T + k evaluations instead of 2T, so half of them guided saves 25 %.

Differences from the paper, and why:

1. The cosine is taken where it can tell anything (`space`). For a network that predicts epsilon, x is nearly pure noise at the first steps
   and so are both predictions: their cosine starts near 1 whatever the prompt, falls, and rises again. A threshold on it fires at the
   first step. On the predictions of x0 the cosine rises from low values, as in the paper's curves.
2. `warm_up`: at least this share of the steps is guided, whatever the cosine.
3. `threshold` belongs to a space and a model: the paper's 0.991 is from its own models. Presets carry calibrated ones; `calibrate` finds
   the one for a budget from recorded cosines.
4. Each sample has its own latch (`decision="per_sample"`), never one cosine over the flattened batch: a sample's image does not depend on
   its batch mates. With "all" the batch stops together, at its slowest sample: two batch shapes instead of many, for compiled networks.
5. `refresh`: where guidance matters to the end (it does in the shapes world), dropping it shows. Then a stopped sample keeps its last
   difference, g = c + (w - 1) d, and evaluates both branches again at every refresh-th step, as FasterCache does (2410.19355: every 5th).
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.guidance import Branch, GuidanceRun
from diffalign.methods.checks import check_integer, check_number
from diffalign.methods.guidance import SPACES, Guidance, cosine, direction, leading, resolve_space

logger = logging.getLogger(__name__)

FALLBACK_THRESHOLD = 0.995
"""Used, with a warning, for a model without a calibrated one."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveGuidance(Guidance):
    """AdaptiveGuidance(threshold=None, space="auto", warm_up=0.2, patience=1, decision="per_sample", refresh=0)."""

    name: ClassVar[str] = "adaptive"

    threshold: float | None = None
    """gamma_bar in (-1, inf): above 1 never stops, and only records. None: the model's calibrated one. Paper: 0.991, in its own space."""
    space: Literal["auto", "x0", "velocity", "model_output"] = "auto"
    """Where the cosine is taken; auto: x0 for epsilon networks, else what the network predicts. Paper: not stated."""
    warm_up: float = 0.2
    """In [0, 1]: the share of steps, at least one, that is guided in any case. Paper: 0."""
    patience: int = 1
    """>= 1: guided steps in a row whose cosine must reach the threshold. Paper: 1."""
    decision: Literal["per_sample", "all"] = "per_sample"
    """Whether samples stop one by one or together. Paper: not stated."""
    refresh: int = 0
    """0: no guidance after the threshold. >= 2: the last difference, evaluated anew at every refresh-th step. Paper: 0."""

    def __post_init__(self) -> None:
        if self.threshold is not None and self.threshold != math.inf:
            check_number("threshold", self.threshold, -1.0, above=True)
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {self.space!r}.")
        check_number("warm_up", self.warm_up, 0.0, 1.0)
        check_integer("patience", self.patience, 1)
        if self.decision not in ("per_sample", "all"):
            raise ValueError(f"decision must be 'per_sample' or 'all', got {self.decision!r}.")
        check_refresh(self.refresh)

    def begin(self, run: GuidanceRun) -> LatchPolicy:
        threshold = self.threshold
        if threshold is None:
            threshold = run.cosine_threshold
        if threshold is None:
            threshold = FALLBACK_THRESHOLD
            logger.warning("no threshold is calibrated for this model; stopping guidance at a cosine of %g; pass threshold=", threshold)
        return LatchPolicy(self, run, threshold, resolve_space(self.space, run.prediction))


class LatchPolicy:
    """One trajectory's policy: which samples are still guided.

    diagnostics, for each sample: "cosine", one value for each step that evaluated both branches; "settled_after", the number of steps
    after which it reached the threshold, if it did.
    """

    def __init__(self, method: AdaptiveGuidance, run: GuidanceRun, threshold: float, space: str) -> None:
        self.method, self.run, self.threshold, self.space = method, run, threshold, space
        self.first = leading(method.warm_up, run.steps) - 1  # the earliest step that may be the last guided one
        self.streak = [0] * run.samples
        self.stopped = [False] * run.samples
        self.fresh_until = [0] * run.samples  # from that step on a stopped sample's difference is too old; with `refresh`
        self.delta: Tensor | None = None  # c - u of every sample where both were last evaluated; with `refresh`
        self.diagnostics: dict[str, list[list[float]]] = {
            "cosine": [[] for _ in range(run.samples)],
            "settled_after": [[] for _ in range(run.samples)],
        }

    def plan(self, step: int) -> Sequence[Branch]:
        if self.method.decision == "all" and not all(self.stopped):
            return ["both"] * self.run.samples
        stale = [bool(self.method.refresh) and step >= until for until in self.fresh_until]
        return ["conditional" if stopped and not old else "both" for stopped, old in zip(self.stopped, stale, strict=True)]

    def complete(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        rows = [row for row, branch in enumerate(self.plan(step)) if branch == "both"]
        if not rows:
            return c, self._estimate(c)
        alone = len(rows) < self.run.samples
        seen_x, seen_c = (x[rows], c[rows]) if alone else (x, c)
        for row, value in zip(rows, self._cosines(step, seen_x, seen_c, u), strict=True):
            self._judge(step, row, value)
        filled = u
        if alone:
            filled = c.clone() if self.delta is None else self._estimate(c)
            filled[rows] = u
        if self.method.refresh:
            self._keep(rows, (seen_c - u).detach())
        return c, filled

    def network_changed(self) -> None:
        """A latch stays: it says that the image is settled, which another network does not undo. A streak and a difference do not."""
        self.streak = [0] * self.run.samples
        self.fresh_until = [0] * self.run.samples

    def _estimate(self, c: Tensor) -> Tensor:
        return c if self.delta is None else c - self.delta

    def _keep(self, rows: list[int], delta: Tensor) -> None:
        if self.delta is None or len(rows) == self.run.samples:  # the first step evaluates every sample
            self.delta = delta
        else:
            self.delta = self.delta.clone()
            self.delta[rows] = delta

    def _cosines(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> list[float]:
        signal, noise = (self.run.signal[step], self.run.noise[step]) if self.space != "model_output" else (1.0, 0.0)
        a, b = (direction(each.detach(), x.detach(), signal, noise, self.run.prediction, self.space) for each in (c, u))
        return cosine(a, b).tolist()  # the one transfer to the host that a guided step costs

    def _judge(self, step: int, row: int, value: float) -> None:
        self.diagnostics["cosine"][row].append(value)
        self.fresh_until[row] = step + self.method.refresh
        self.streak[row] = self.streak[row] + 1 if value >= self.threshold else 0
        if step >= self.first and self.streak[row] >= self.method.patience and not self.stopped[row]:
            self.stopped[row] = True
            self.diagnostics["settled_after"][row].append(step + 1)


def check_refresh(refresh: int) -> None:
    """Raises ValueError for anything but 0 and whole numbers from 2."""
    check_integer("refresh", refresh, 0)
    if refresh == 1:
        raise ValueError("refresh must be 0 or at least 2, got 1, which is full guidance.")


def calibrate(cosines: Sequence[Sequence[float]], share: float = 0.5, warm_up: float = 0.2, refresh: int = 0) -> float:
    """The threshold at which this share of all steps evaluates both branches, on average.

    cosines: one list per sample, all of one length, recorded with AdaptiveGuidance(threshold=inf). share 0.5 saves 25 % of the evaluations.
    Where no threshold meets the share exactly, the next higher one. Raises ValueError where even the warm-up takes more than that.
    """
    steps = {len(series) for series in cosines}
    if len(steps) != 1 or not min(steps):
        raise ValueError("cosines must hold one list per sample, of equal length and not empty; record them with threshold=math.inf.")
    check_number("share", share, 0.0, 1.0, above=True)
    check_refresh(refresh)
    (total,) = steps
    first = leading(warm_up, total) - 1
    least = evaluated_share(cosines, -math.inf, first, refresh)
    if least > share:
        raise ValueError(f"share must be at least {least:g}, of the warm-up and what is refreshed after it, got {share:g}.")
    candidates = [*sorted({value for series in cosines for value in series[first:]}), math.inf]
    return candidates[bisect_left(candidates, share, key=lambda threshold: evaluated_share(cosines, threshold, first, refresh))]


def evaluated_share(cosines: Sequence[Sequence[float]], threshold: float, first: int, refresh: int = 0) -> float:
    """The mean share of steps that evaluate both branches; `first` is the index of the earliest step that may be the last guided one."""
    evaluated = 0
    for series in cosines:
        guided = 1 + next((i for i, value in enumerate(series) if i >= first and value >= threshold), len(series) - 1)
        evaluated += guided + ((len(series) - guided) // refresh if refresh else 0)
    return evaluated / sum(len(series) for series in cosines)  # of whole numbers, so that 0.4 is 0.4
