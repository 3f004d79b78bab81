"""Optimised against watched: how far both kinds of reward have risen after each evaluation.

For sample i, b_i(t) is the evaluation with the greatest total among the first t + 1: the image that
would be returned if the search ended at t. With w the weights of the members, p_k = |w_k| / sum |w|,
and sigma the unit of each reward (one standard deviation on base samples)

    gain_k(t)      = mean over i of (r_k(b_i(t)) - r_k(0)) / sigma_k
    optimised(t)   = sum_k p_k sign(w_k) gain_k(t)
    watched(t)     = the mean of gain_k(t) over the watched rewards
    gap(t)         = optimised(t) - watched(t)

The shape is that of Gao et al.'s proxy and gold scores over the amount of optimisation (2210.10760),
with held-out rewards for gold. A gap is no proof of harm: a search finds what its rewards overrate
even where everybody gains. Harm is when watched rewards *fall*. With h_i(t) the watched mean of
sample i alone and T the last evaluation,

    d_i(t)  = h_i(t) - h_i(T)                                     how far t lies above the end
    z(t)    = sum_i d_i(t) / sqrt(sum_i d_i(t)^2)
    p(t)    = the share of signs s in {-1, 1}^n for which
              max over u of sum_i s_i d_i(u) / sqrt(sum_i d_i(u)^2) >= z(t)

We speak of over-optimisation where p(t) <= 5 % at some t from which watched has fallen by more than
LEAST, and the optimised rewards rose: "below their start" where t = 0 is such a t.

False alarms. The greatest of many evaluations lies above the last one by luck, so a test at the peak
alone cries wolf: two standard errors there did in 10 to 20 % of searches that the watched rewards
knew nothing of. Where watched scores are independent of the search, a sample's curve is as likely as
its mirror image, and p(t) counts the peaks that mirror images make; so at most 5 % of such runs are
called over-optimised, whatever the number of evaluations. That is exact for scores spread evenly to
both sides; simulated (tests/rewards/test_panel.py) it is 4.1 % for normal scores, 4.5 % for skewed
ones and 3.8 % for scores that wander. Each sample's sign is one fair coin, hence fewer than
LEAST_SAMPLES samples cannot reach 5 %, and we say so. A test of the end against the mean of the first
half, fixed in advance, finds an early peak about as often, but a late one in 13 % of runs where this
rule finds 67 % (40 samples, 50 evaluations, a fall of 0.8 from 70 % on). The rule is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from diffalign.rewards.calibration import Calibration

LEAST = 0.1  # units: a smaller fall is not worth a word
FALSE_ALARMS = 0.05  # of searches that the watched rewards are independent of, at most
LEAST_SAMPLES = 5  # 1 / 2^5 is the first to be below 5 %
ALL_SIGNS = 11  # samples up to which every pattern of signs is tried; beyond it, 2^11 drawn ones

BELOW_START = "over-optimised: the watched rewards fell below their start"
PAST_PEAK = "over-optimised: the watched rewards fell from their peak"
NO_SIGN = "no over-optimisation seen"
TOO_FEW = f"too few images to tell over-optimisation ({LEAST_SAMPLES} or more are needed)"


@dataclass(frozen=True)
class Panel:
    """Series over evaluations, in units of one standard deviation of each reward."""

    optimised: list[float]
    """optimised(t), 0 at the start."""
    watched: dict[str, list[float]]
    """gain_k(t) of every watched reward."""
    gap: list[float]
    """optimised(t) less the mean of the watched ones."""
    samples: int
    """How many samples count: those without a score that is missing or not finite."""
    peak: int
    """The first evaluation at which the watched mean was greatest."""
    fall: float
    """How far the watched mean is below its peak at the end, >= 0."""
    chance: float | None
    """The least p(t): how often luck alone makes such a fall look as sure. None for too few samples."""
    verdict: str
    """BELOW_START, PAST_PEAK, NO_SIGN or TOO_FEW."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def panel(
    samples: Sequence[Mapping[str, Any]], weights: Mapping[str, float], watched: Sequence[str], scales: Mapping[str, float]
) -> Panel | None:
    """From traces to curves; None where nothing can be said: no members, no watched rewards, no whole sample.

    samples: as `Trace.sample(i)` gives them; "rewards" has each reward's scores, one per evaluation.
        One that stopped early keeps its last image; one with a score that is None or not finite
        among those needed is not counted.
    weights: of the members.
    watched: names of the rewards that were not optimised.
    scales: each reward's unit. A reward without one, or whose unit is 0, is left out.
    """
    weights = {name: weight for name, weight in weights.items() if scales.get(name)}
    watched = [name for name in watched if scales.get(name)]
    if not weights or not watched:
        return None
    length = max((len(sample["rewards"]["total"]) for sample in samples), default=0)
    curves = [gains for sample in samples if (gains := _gains(sample["rewards"], [*weights, *watched], scales, length)) is not None]
    if not curves:
        return None
    size = sum(map(abs, weights.values()))
    optimised = [[sum(w / size * gains[k][t] for k, w in weights.items()) for t in range(length)] for gains in curves]
    held_out = [[sum(gains[k][t] for k in watched) / len(watched) for t in range(length)] for gains in curves]
    mean_optimised, mean_held_out = _mean(optimised), _mean(held_out)
    peak = max(range(length), key=lambda t: (mean_held_out[t], -t))
    chances = chances_of_falls(np.array(held_out)) if len(held_out) >= LEAST_SAMPLES else None
    return Panel(
        optimised=mean_optimised,
        watched={name: _mean([gains[name] for gains in curves]) for name in watched},
        gap=[a - b for a, b in zip(mean_optimised, mean_held_out, strict=True)],
        samples=len(curves),
        peak=peak,
        fall=mean_held_out[peak] - mean_held_out[-1],
        chance=None if chances is None else float(chances.min()),
        verdict=_verdict(mean_held_out, chances, rose=mean_optimised[-1] > 0),
    )


def chances_of_falls(curves: Float[np.ndarray, "n t"]) -> Float[np.ndarray, " t"]:
    """p(t) of n samples' watched means: how often mirrored curves have a peak as sure as the fall from t to the end."""
    above = curves - curves[:, -1:]
    size = np.sqrt((above**2).sum(0))
    unit = above / np.where(size > 0, size, 1.0)
    n = len(curves)
    if n <= ALL_SIGNS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), (2**ALL_SIGNS, n))
        signs[0] = 1.0  # what was seen is one of the patterns, so no chance is below 1 / 2^11
    peaks = (signs @ unit).max(1)
    return (peaks[:, None] >= unit.sum(0) - 1e-9).mean(0)


def calibrated_scales(calibration: Calibration, names: Sequence[str]) -> dict[str, float]:
    """The units of those rewards that the calibration knows in their native unit (a "logit" has none)."""
    known = {name: calibration.members.get(name) for name in names}
    return {name: calibration.scale(name) for name, member in known.items() if member is not None and member.transform == "none"}


def scales_of_starts(samples: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """The standard deviation of each reward over the samples' first images, which are base-model samples; none for fewer than two."""
    scales = {}
    for name in names:
        firsts = [sample["rewards"][name][0] for sample in samples if sample["rewards"].get(name)]
        firsts = [first for first in firsts if first is not None and math.isfinite(first)]
        if len(firsts) > 1:
            mean = sum(firsts) / len(firsts)
            scales[name] = math.sqrt(sum((first - mean) ** 2 for first in firsts) / (len(firsts) - 1))
    return scales


def _gains(
    rewards: Mapping[str, Sequence[float | None]], names: Sequence[str], scales: Mapping[str, float], length: int
) -> dict[str, list[float]] | None:
    """Each reward's gain of the image that would be returned after every evaluation; None where a number is missing."""
    path, best = [], 0
    for t, total in enumerate(rewards["total"]):
        if total is not None and math.isfinite(total) and (rewards["total"][best] is None or total > rewards["total"][best]):
            best = t
        path.append(best)
    path += [best] * (length - len(path))
    out = {}
    for name in names:
        series = rewards.get(name)
        if not series or any(series[t] is None or not math.isfinite(series[t]) for t in {0, *path}):
            return None
        out[name] = [(series[t] - series[0]) / scales[name] for t in path]
    return out


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _verdict(held_out: Sequence[float], chances: Float[np.ndarray, " t"] | None, rose: bool) -> str:
    if chances is None:
        return TOO_FEW
    fell = [gain - held_out[-1] > LEAST and chance <= FALSE_ALARMS for gain, chance in zip(held_out, chances, strict=True)]
    if not rose or not any(fell):
        return NO_SIGN
    return BELOW_START if fell[0] else PAST_PEAK
