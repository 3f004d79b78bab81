"""Best-of-N: draw N noises for each prompt, make every image, keep the one that the reward likes best.

Source: Karthik et al. 2023 (ImageSelect, arXiv 2305.13308); as "random search" in Ma et al. 2025 (arXiv 2501.09732). It
needs no gradient, hence any reward, and is the baseline at equal budget that every method here is measured against.

    eps* = argmax_{k < N} R(G(eps_k, p), p),   eps_0 = the given noise,  eps_k ~ N(0, I)

N -> `budget`, R -> `reward`, G -> `problem.generate`, p -> `problem.prompts`, eps -> `problem.noise`.

Difference from ImageSelect's code: candidate k of sample i comes from a generator of its own, seeded with (seeds[i], k),
so the result depends neither on the batch nor on the order of prompts; and candidate 0 is the given noise, so N = 1 is
doing nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.methods.checks import check_integer, check_number, formerly
from diffalign.methods.tracking import Tracker, evaluation_limit
from diffalign.noise import seeded_noise
from diffalign.types import NoiseProblem, NoiseResult, Reward

logger = logging.getLogger(__name__)


@formerly(evaluations="budget", iterations="budget")
@dataclass(frozen=True, eq=False)
class BestOfN:
    """BestOfN(reward, budget=50)."""

    name: ClassVar[str] = "best-of-n"

    reward: Reward
    """Chooses. It needs no gradient."""
    _: KW_ONLY
    budget: int = 50
    """N >= 1, candidates of each sample, the given noise included. ImageSelect's demo: 10; ReNO's budget: 50."""
    seconds: float | None = None
    """> 0: draw for so long instead of N times. None: the budget bounds the search."""
    batch_size: int | None = None
    """Images made at once, >= 1; None: what the model's preset says is good. Memory and speed only."""

    def __post_init__(self) -> None:
        check_integer("budget", self.budget, 1)
        if self.seconds is not None:
            check_number("seconds", self.seconds, 0.0, above=True)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size, 1)

    def search(self, problem: NoiseProblem) -> NoiseResult:
        """The best of N candidates of every sample. A candidate whose score is not finite is never chosen; a warning names it."""
        tracker = Tracker(problem, self.seconds)
        self.reward.prepare(problem.prompts)
        try_candidates(problem, tracker, self.reward, evaluation_limit(self.budget, self.seconds), self.batch_size, self.name)
        return tracker.result(self)


@torch.no_grad()
def try_candidates(problem: NoiseProblem, tracker: Tracker, reward: Reward, count: int, batch_size: int | None, name: str) -> None:
    """Makes and scores `count` noises of every sample, the given one first, and enters them in `tracker`; `name` is for warnings.

    batch_size: images made at once; without one, what the problem suggests. It ends early where the tracker is out of time.
    """
    given = problem.noise.detach().float()
    b = len(given)
    pairs = ((k, i) for k in range(count) for i in range(b))
    size = batch_size or max(problem.batch_size or 0, b)
    while not tracker.out_of_time and (chunk := list(islice(pairs, size))):
        rows = [i for _, i in chunk]
        noise = torch.stack(
            [given[i] if k == 0 else seeded_noise(given.shape[1:], [problem.seeds[i]], k, given.device)[0] for k, i in chunk]
        )
        images = problem.generate(noise, rows)
        scores = reward(images, [problem.prompts[i] for i in rows])
        totals = tracker.record(rows, noise, images, scores)["total"]
        for (k, i), total in zip(chunk, totals, strict=True):
            if not math.isfinite(total):
                logger.warning("%s: %s has reward %s at candidate %d, which is left out.", name, tracker.describe(i), total, k)


def score_noises(
    problem: NoiseProblem, tracker: Tracker, reward: Reward, rows: list[int], noise: Tensor, diagnostics: Mapping[str, Tensor], size: int
) -> list[float]:
    """Makes, scores and enters noises of samples `rows`, `size` images at once; returns their totals."""
    totals: list[float] = []
    for at in range(0, len(rows), size):
        part = slice(at, at + size)
        images = problem.generate(noise[part], rows[part])
        scores = reward(images, [problem.prompts[row] for row in rows[part]])
        told = {name: values[part] for name, values in diagnostics.items()}
        totals += tracker.record(rows[part], noise[part], images, scores, told)["total"]
    return totals
