"""Zero-order search: try noises near the best one so far, move to one that scores better, narrow the search where none does.

Source: Ma et al., "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps", 2025 (2501.09732), section 3.2. It needs no
gradient. Neighbours lie on the pivot's own sphere, at a cosine t from it, so that they stay as likely as the pivot:

    n' = ||n|| (t n / ||n|| + sqrt(1 - t^2) w),   w a random unit vector orthogonal to n

n -> the pivot;  neighbours a round -> `neighbours`;  t -> `cosine`;  all rounds -> `budget`.

`walk=True` is its control: the pivot moves to a random neighbour every round whatever the reward says, at the same cost; what zero-order
search gains over it is what following the reward gains. Two differences from the public code: a round in which nobody is better narrows
the next one (`narrowing`), where the code repeats it for ever; and the search may begin at the best of some drawn noises (`starts`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.methods.checks import check_flag, check_integer, check_number
from diffalign.methods.search import score_noises, try_candidates
from diffalign.methods.tracking import Tracker, evaluation_limit
from diffalign.noise import sample_norm, seeded_noise, spread, tangent, with_norm
from diffalign.types import NoiseProblem, NoiseResult, Reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ZeroOrder:
    """ZeroOrder(reward, budget=50)."""

    name: ClassVar[str] = "zero-order"

    reward: Reward
    """Decides. It needs no gradient."""
    _: KW_ONLY
    budget: int = 50
    """Evaluations of the generator for each sample, >= 1."""
    seconds: float | None = None
    """> 0: search for so long instead; the budget then only says how the search begins. None: the budget bounds it."""
    neighbours: int = 4
    """Noises tried in a round, >= 1. Public code: 4."""
    cosine: float = 0.95
    """t in (-1, 1), between a noise and its neighbours. Public code: 0.95."""
    narrowing: float = 0.5
    """In (0, 1]: what the angle is multiplied by after a round in which nobody was better; 1 never narrows. Public code: 1."""
    starts: int | None = None
    """Begin at the best of so many noises, >= 1, the given one included. None: a quarter of the budget. Public code: 1."""
    walk: bool = False
    """Move every round, to a random neighbour. Paper: no."""
    batch_size: int | None = None
    """Images made at once, >= 1; None: what the model's preset says is good. Memory and speed only."""

    def __post_init__(self) -> None:
        for name in ("budget", "neighbours"):
            check_integer(name, getattr(self, name), 1)
        for name in ("starts", "batch_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.seconds is not None:
            check_number("seconds", self.seconds, 0.0, above=True)
        check_number("cosine", self.cosine, math.nextafter(-1.0, 0.0), math.nextafter(1.0, 0.0))
        check_number("narrowing", self.narrowing, 0.0, 1.0, above=True)
        check_flag("walk", self.walk)

    @classmethod
    def random_walk(cls, reward: Reward, *, budget: int = 50) -> ZeroOrder:
        """The control: the same steps, blind to the reward."""
        return cls(reward, budget=budget, walk=True, starts=1)

    @torch.no_grad()
    def search(self, problem: NoiseProblem) -> NoiseResult:
        """Every sample on its own. A neighbour whose score is not finite is never chosen."""
        tracker = Tracker(problem, self.seconds)
        self.reward.prepare(problem.prompts)
        starts = min(max(self.budget // 4, 1) if self.starts is None else self.starts, self.budget)
        try_candidates(problem, tracker, self.reward, starts, self.batch_size, self.name)
        b, made = len(problem.noise), starts
        pivot = tracker.noise.clone()
        angle = torch.full((b,), math.acos(self.cosine), device=pivot.device)
        limit = evaluation_limit(self.budget, self.seconds)
        while made < limit and not tracker.out_of_time:
            count = min(self.neighbours, limit - made)
            before = [running[-1] for running in tracker.running]
            tried = torch.stack([self.neighbour(pivot, angle, problem.seeds, made + k) for k in range(count)])
            self._try(problem, tracker, tried, angle)
            made += count
            better = torch.tensor([running[-1] > old for running, old in zip(tracker.running, before, strict=True)], device=pivot.device)
            pivot = tried[0] if self.walk else torch.where(spread(better, pivot), tracker.noise, pivot)
            if not self.walk:
                angle = torch.where(better, angle, angle * self.narrowing)
        return tracker.result(self, starts=starts)

    @staticmethod
    def neighbour(pivot: Float[Tensor, "b ..."], angle: Float[Tensor, " b"], seeds: list[int], draw: int) -> Float[Tensor, "b ..."]:
        """Draw number `draw` of a noise at `angle` from each pivot, on its sphere."""
        radius = sample_norm(pivot)
        across = with_norm(tangent(seeded_noise(pivot.shape[1:], seeds, draw, pivot.device), pivot), radius)
        return spread(angle.cos(), pivot) * pivot + spread(angle.sin(), pivot) * across

    def _try(self, problem: NoiseProblem, tracker: Tracker, tried: Float[Tensor, "k b ..."], angle: Float[Tensor, " b"]) -> None:
        """Makes, scores and records one round."""
        rows, noise = list(range(len(problem.noise))) * len(tried), tried.flatten(0, 1)
        size = self.batch_size or max(problem.batch_size or 0, len(problem.noise))
        score_noises(problem, tracker, self.reward, rows, noise, {"angle": angle.repeat(len(tried))}, size)
