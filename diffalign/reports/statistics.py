"""Error bars that respect how the images were made: images of one prompt are alike, so the prompt is the unit, within each task.

- per task of verdicts: Clopper and Pearson's interval (1934), with the number of images replaced by the effective number that the spread
  between prompts implies;
- overall = the unweighted mean of the task means (GenEval's convention), and scores that reach the ends of [0, 1]: Wilson's interval with
  the effective number that the variance of the mean implies (`bounded_interval`), and Clopper and Pearson's where there is one task; they
  neither leave [0, 1] nor collapse where a few prompts agree, as resampling does;
- other scores: Student's t with Satterthwaite's degrees of freedom (1946);
- two methods on the same prompts and noises: an interval of each prompt's difference, and a sign-flip permutation test, whose null
  hypothesis is that a prompt's difference is as likely to have either sign. p = (1 + hits) / (1 + draws), two-sided;
- several p-values are corrected by Holm's step-down (1979).

By simulation the 95 % intervals of six tasks cover 0.93 or more from 2 prompts a task on, and near saturation. A single task's of one image
a prompt cover 0.95 or more at every rate, computed exactly; Wilson's cover 0.83 of 5 prompts at a rate of 0.04. The price is width, 0.33 on
average over rates and 5 to 60 prompts where Wilson's have 0.30. With several images a prompt they cover 0.92 or more by simulation
(tests/benchmarks/test_statistics.py).

Every function is a pure function of its arguments; the random ones take a seed. `values` may be 0/1 verdicts or scores.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, binomtest, t

from diffalign.intervals import wilson

DRAWS = 10_000
FEW_PROMPTS = 10  # of a task; below, an interval is a rough guide
PRIOR_PROMPTS = 2.0  # how many prompts the guess counts for that a task spreads as verdicts of its rate do
PRIOR_CHANGES = 1.0  # of a difference: half a prompt gained and half a prompt lost, since none seen does not mean none


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, and how much it rests on."""

    mean: float
    low: float
    high: float
    images: int
    prompts: int


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its 95 % interval and two-sided sign-flip p-value. `p_holm` only where several were tested at once."""

    mean: float
    low: float
    high: float
    p_value: float
    prompts: int
    p_holm: float | None = None


@dataclass(frozen=True)
class Discordance:
    """Images that only one of two methods got right."""

    gained: int
    lost: int
    p_value: float


def clopper_pearson(mean: float, n: float) -> tuple[float, float]:
    """The exact interval for a proportion seen in `n` independent trials: the rates at which so few, or so many, have a chance of 2.5 %.

    Covers 95 % or more at every rate. `n` need not be whole; at least 1.
    """
    if not 0 <= mean <= 1 or not n >= 1:
        raise ValueError(f"clopper_pearson needs a proportion in [0, 1] and n of at least 1; got mean {mean} and n {n}")
    hits, misses = mean * n, n - mean * n
    return (
        0.0 if mean == 0 else float(beta.ppf(0.025, hits, misses + 1)),
        1.0 if mean == 1 else float(beta.ppf(0.975, hits + 1, misses)),
    )


def effective_images(prompt_means: np.ndarray, images: int) -> float:
    """The number of independent images that would give the same variance as these prompts, between the number of prompts and of images."""
    prompts, mean = len(prompt_means), float(prompt_means.mean())
    if images == prompts or prompts < 2 or mean in (0.0, 1.0):
        return float(prompts)  # with no spread to learn from, images of a prompt count as one
    variance_of_mean = float(prompt_means.var(ddof=1)) / prompts
    if variance_of_mean == 0:
        return float(images)
    return min(max(mean * (1 - mean) / variance_of_mean, prompts), images)


def task_estimates(values: Sequence[float], prompts: Sequence[Hashable], tasks: Sequence[str]) -> dict[str, Estimate]:
    """The mean verdict of each task with its exact interval, tasks in order of first appearance. `values` are verdicts in [0, 1]."""
    clusters, counts = _by_task(values, prompts, tasks)
    out = {}
    for task, means in clusters.items():
        mean = float(means.mean())
        out[task] = Estimate(mean, *clopper_pearson(mean, effective_images(means, counts[task])), counts[task], len(means))
    return out


def task_means(values: Sequence[float], prompts: Sequence[Hashable], tasks: Sequence[str]) -> dict[str, Estimate]:
    """The mean score of each task with its interval, for scores that are no verdicts."""
    clusters, counts = _by_task(values, prompts, tasks)
    return {task: Estimate(float(means.mean()), *mean_interval([means]), counts[task], len(means)) for task, means in clusters.items()}


def discordance(verdicts: Sequence[float], baseline: Sequence[float]) -> Discordance:
    """On how many images two series of verdicts differ, with McNemar's exact test, which takes images as independent: descriptive only."""
    differences = _subtract(verdicts, baseline)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Discordance(gained, lost, p_value)


def overall_estimate(values: Sequence[float], prompts: Sequence[Hashable], tasks: Sequence[str]) -> Estimate:
    """The unweighted mean of the task means, with its interval."""
    clusters, counts = _by_task(values, prompts, tasks)
    mean = float(np.mean([means.mean() for means in clusters.values()]))
    return Estimate(mean, *mean_interval(list(clusters.values())), sum(counts.values()), sum(map(len, clusters.values())))


def mean_interval(strata: Sequence[np.ndarray]) -> tuple[float, float]:
    """Of the unweighted mean of stratum means; each stratum holds its prompts' means."""
    return bounded_interval(strata) if _reach_the_ends(np.concatenate(strata)) else t_interval(strata)


def bounded_interval(strata: Sequence[np.ndarray]) -> tuple[float, float]:
    """Wilson's interval of a stratified mean of numbers in [0, 1], the exact one of a single stratum's.

    The variance of the mean gives the number of prompts that verdicts of that mean would need to be as uncertain. A stratum's variance is
    averaged with what verdicts at its rate would have, `PRIOR_PROMPTS` strong, and that rate leans by as much on the overall mean: three
    prompts that agree are no proof that all would. Never more certain than that many prompts allow in independent verdicts at worst.
    """
    mean, variance = float(np.mean([s.mean() for s in strata])), 0.0
    for s in strata:
        n = len(s)
        rate = (n * s.mean() + PRIOR_PROMPTS * mean) / (n + PRIOR_PROMPTS)
        spread = s.var(ddof=1) if n > 1 else rate * (1 - rate)
        variance += float(n * spread + PRIOR_PROMPTS * rate * (1 - rate)) / (n + PRIOR_PROMPTS) / n / len(strata) ** 2
    least = len(strata) ** 2 / sum(1 / len(s) for s in strata)  # the prompts, where strata are equally large
    trials = max(mean * (1 - mean) / variance, least) if variance > 0 else least
    return clopper_pearson(mean, trials) if len(strata) == 1 else wilson(mean, trials)


def t_interval(strata: Sequence[np.ndarray], prior: float = 0.0) -> tuple[float, float]:
    """Of the unweighted mean of stratum means. A stratum of one prompt is taken to spread as all prompts do.

    prior: counts for as many prompts of variance 1 in each stratum; then the normal distribution's quantile is taken, since the variance
    is no longer an estimate alone. One prompt in all has no interval: both ends are its value.
    """
    mean, everything = float(np.mean([s.mean() for s in strata])), np.concatenate(strata)
    if len(everything) < 2 and not prior:
        return mean, mean
    whole = everything.var(ddof=1) if len(everything) > 1 else 0.0
    parts, freedom = [], []
    for s in strata:
        n = len(s)
        spread = s.var() if prior else s.var(ddof=1) if n > 1 else whole
        parts.append(float(n * spread + prior) / (n + prior) / n / len(strata) ** 2)
        freedom.append(n - 1 if n > 1 else len(everything) - 1)
    variance = sum(parts)
    if variance == 0:
        return mean, mean
    degrees = variance**2 / sum(part**2 / each for part, each in zip(parts, freedom, strict=True)) if not prior else math.inf
    half = math.sqrt(variance) * float(t.ppf(0.975, degrees))
    return mean - half, mean + half


def paired_difference(
    values: Sequence[float],
    baseline: Sequence[float],
    prompts: Sequence[Hashable],
    tasks: Sequence[str],
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """How much `values` exceed `baseline`, image by image on the same prompts and noises; overall = the unweighted mean over tasks."""
    clusters, _ = _by_task(_subtract(values, baseline), prompts, tasks)
    return _difference(list(clusters.values()), _reach_the_ends(np.asarray([values, baseline], dtype=float)), draws, seed)


def paired_task_differences(
    values: Sequence[float],
    baseline: Sequence[float],
    prompts: Sequence[Hashable],
    tasks: Sequence[str],
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Difference]:
    """`paired_difference` of each task alone, with Holm's correction over the tasks in `p_holm`."""
    clusters, _ = _by_task(_subtract(values, baseline), prompts, tasks)
    of_verdicts = _reach_the_ends(np.asarray([values, baseline], dtype=float))
    raw = {task: _difference([differences], of_verdicts, draws, seed) for task, differences in clusters.items()}
    corrected = holm({task: d.p_value for task, d in raw.items()})
    return {t: Difference(d.mean, d.low, d.high, d.p_value, d.prompts, corrected[t]) for t, d in raw.items()}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down: the i-th smallest of m is multiplied by m - i, made non-decreasing, and cut at 1."""
    out, running = {}, 0.0
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min((len(p_values) - i) * p, 1.0))
        out[name] = running
    return {name: out[name] for name in p_values}


def _subtract(values: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    if len(values) != len(baseline):
        raise ValueError(f"a paired comparison needs one baseline value per value; got {len(values)} and {len(baseline)}")
    return np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)


def _by_task(values: Sequence[float], prompts: Sequence[Hashable], tasks: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Each task's prompt means, and its number of images. Prompts count once each, whatever their number of images."""
    if not len(values) == len(prompts) == len(tasks):
        raise ValueError(f"values, prompts and tasks must be equally long; got {len(values)}, {len(prompts)} and {len(tasks)}")
    if not len(values):
        raise ValueError("there is nothing to estimate: no values were given")
    if not np.isfinite(np.asarray(values, dtype=float)).all():
        raise ValueError("values must be finite; got nan or inf")
    grouped: dict[str, dict[Hashable, list[float]]] = {}
    for value, prompt, task in zip(values, prompts, tasks, strict=True):
        grouped.setdefault(task, {}).setdefault(prompt, []).append(float(value))
    means = {task: np.array([np.mean(v) for v in by_prompt.values()]) for task, by_prompt in grouped.items()}
    return means, {task: sum(map(len, by_prompt.values())) for task, by_prompt in grouped.items()}


def _reach_the_ends(values: np.ndarray) -> bool:
    """Whether these are verdicts, or scores on a scale from 0 to 1 some of which are 0 or 1."""
    return bool(values.min() >= 0 and values.max() <= 1 and ((values == 0) | (values == 1)).any())


def _difference(strata: list[np.ndarray], of_verdicts: bool, draws: int, seed: int) -> Difference:
    """of_verdicts: whether both sides lie in [0, 1] and reach its ends, so that a difference is at most 1 and its spread too."""
    low, high = t_interval(strata, PRIOR_CHANGES if of_verdicts else 0.0)
    if of_verdicts:
        low, high = max(low, -1.0), min(high, 1.0)
    statistic = float(np.mean([s.mean() for s in strata]))
    return Difference(statistic, low, high, _sign_flip(strata, draws, seed), sum(map(len, strata)))


def _sign_flip(strata: list[np.ndarray], draws: int, seed: int) -> float:
    rng = np.random.default_rng([seed, 1])
    observed = abs(sum(s.mean() for s in strata))
    flipped = np.zeros(draws)
    for differences in strata:
        signs = rng.integers(0, 2, size=(draws, len(differences)), dtype=np.int8) * 2 - 1
        flipped += signs @ differences / len(differences)
    hits = int((np.abs(flipped) >= observed - 1e-12).sum())  # ties count as hits; the slack absorbs the order of summation
    return (1 + hits) / (1 + draws)
