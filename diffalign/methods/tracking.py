"""Bookkeeping of a search over noise: every score of every sample, the best image and noise so far, the start, and what it all cost.

One evaluation costs one transfer to the host, however many rewards and diagnostics there are.

A search is given one of two budgets: evaluations of the generator, or seconds. Under seconds it asks `out_of_time` between evaluations
and ends at the first one that is over; how far it came then depends on the machine and on whom a sample shares its batch with.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.types import Cost, Evaluation, NoiseMethod, NoiseProblem, NoiseResult, RewardScores, Trace

clock = time.perf_counter


class Tracker:
    """What a search has seen. `running[i]` is the best total of sample i after each evaluation, minus infinity before a finite one."""

    def __init__(self, problem: NoiseProblem, seconds: float | None = None) -> None:
        """seconds: after which `out_of_time` says so. Raises ValueError where the problem's prompts or seeds are not one per noise."""
        b = len(problem.noise)
        for name, given in (("prompts", problem.prompts), ("seeds", problem.seeds)):
            if isinstance(given, str) or len(given) != b:
                what = "one string" if isinstance(given, str) else f"{len(given)}"
                raise ValueError(f"{name} must hold one entry for each of the {b} noises, got {what}.")
        if b == 0:
            raise ValueError("noise is an empty batch; give at least one prompt.")
        self.problem = problem
        self.noise = problem.noise.detach().float().clone()
        self.images: Tensor | None = None
        self.initial_images: Tensor | None = None
        self.best = [0] * b
        self.running: list[list[float]] = [[] for _ in range(b)]
        self.rewards: dict[str, list[list[float]]] = {}
        self.diagnostics: dict[str, list[list[float]]] = {}
        self.seconds, self._began = seconds, clock()
        self._evaluations, self._backward_passes, self._reward_calls = [0.0] * b, [0] * b, [0] * b

    @property
    def out_of_time(self) -> bool:
        """Whether the seconds are spent, where there is such a bound; never before every sample has an image."""
        return self.seconds is not None and all(self.running) and clock() - self._began >= self.seconds

    def charge(self, rows: Sequence[int], evaluations: float = 0.0, backward_passes: int = 0, reward_calls: int = 0) -> None:
        """Counts so much for each of `rows`; an evaluation that is recorded counts by itself."""
        for row in rows:
            self._evaluations[row] += evaluations
            self._backward_passes[row] += backward_passes
            self._reward_calls[row] += reward_calls

    def record(
        self,
        rows: Sequence[int],
        noise: Float[Tensor, "k ..."],
        images: Float[Tensor, "k *f 3 h w"],
        scores: RewardScores,
        diagnostics: Mapping[str, Float[Tensor, " k"]] | None = None,
        evaluations: float = 1.0,
    ) -> dict[str, list[float]]:
        """Take in images of samples `rows` and tell `progress`; returns every column on the host.

        evaluations: what each image has cost, in whole generations; 0 where the method charges it by itself.

        A sample that appears more than once was evaluated so often: then the rows are sorted by evaluation.
        An image replaces the best only where its total is finite and strictly greater: ties go to the earliest.
        """
        self.charge(rows, evaluations, reward_calls=1)
        rewards = {"total": scores.total, **scores.parts, **scores.watched}
        columns = {**rewards, **(diagnostics or {})}
        device = scores.total.device
        table = torch.stack([column.detach().to(device, torch.float32) for column in columns.values()]).tolist()
        host = dict(zip(columns, table, strict=True))
        first: dict[int, int] = {}
        better: dict[int, int] = {}
        indices = []
        for j, row in enumerate(rows):
            total, running = host["total"][j], self.running[row]
            indices.append(len(running))
            if not running:
                first[row] = j
            if math.isfinite(total) and (not running or total > running[-1]):
                self.best[row] = len(running)
                better[row] = j
                running.append(total)
            else:
                running.append(running[-1] if running else -math.inf)
            for name, values in host.items():
                book = self.rewards if name in rewards else self.diagnostics
                book.setdefault(name, [[] for _ in self.running])[row].append(values[j])
        images = images.detach()
        if self.images is None:
            self.images = images.new_zeros(len(self.running), *images.shape[1:])
            self.initial_images = torch.zeros_like(self.images)
        if first:  # a first image is the best so far even where its score is not finite: something must be returned
            _copy(first, images, self.initial_images)
            _copy(first, images, self.images)
        if better:
            _copy(better, images, self.images)
            _copy(better, noise.detach().float(), self.noise)
        self._send(indices, rows, images, {name: host[name] for name in rewards})
        return host

    def _send(
        self, indices: Sequence[int], rows: Sequence[int], images: Float[Tensor, "k *f 3 h w"], scores: Mapping[str, Sequence[float]]
    ) -> None:
        """The events of what was just recorded, one for each evaluation that these rows belong to."""
        if self.problem.progress is None:
            return
        start = 0
        for index, group in groupby(indices):
            part = slice(start, start + len(list(group)))
            start = part.stop
            cut = {name: values[part] for name, values in scores.items()}
            self.problem.progress(Evaluation(index, list(rows[part]), cut, images[part]))

    def describe(self, row: int) -> str:
        """Sample `row` in words, for warnings."""
        prompt = self.problem.prompts[row]
        return f"sample {row} (prompt {prompt[:77] + '...' if len(prompt) > 80 else prompt!r}, seed {self.problem.seeds[row]})"

    def result(self, search: NoiseMethod, **resolved: Any) -> NoiseResult:
        """The best of every sample; to be asked for after the first `record`.

        The trace tells every setting of `search`, a dataclass; `resolved` are those that it has worked out itself.
        """
        settings = {f.name: getattr(search, f.name) for f in fields(search) if f.name not in ("reward", "ranges")} | resolved
        if getattr(search, "ranges", None) is not None:
            settings["ranges"] = search.ranges.name
        trace = Trace(search.name, self.rewards, self.best, self.diagnostics, settings)
        return NoiseResult(self.images, self.noise, self.initial_images, trace, cost=self.costs())

    def costs(self) -> list[Cost]:
        """What every sample has cost so far."""
        seconds, memory = (clock() - self._began) / len(self.running), peak_memory_mb(self.noise.device)
        counts = zip(self._evaluations, self._backward_passes, self._reward_calls, strict=True)
        return [Cost(evaluations, backward, calls, seconds, memory) for evaluations, backward, calls in counts]


def evaluation_limit(budget: int, seconds: float | None) -> int:
    """How many evaluations of a sample a search may make: its budget, or no end of them where seconds bound it instead."""
    return budget if seconds is None else sys.maxsize


def peak_memory_mb(device: torch.device) -> int | None:
    """Of an accelerator since its statistics were reset, of a CPU since the process began, in 2**20 bytes; None where none counts."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _copy(chosen: dict[int, int], source: Tensor, target: Tensor) -> None:
    """target[row] = source[j] for every row -> j."""
    rows = torch.tensor(list(chosen), device=target.device)
    target[rows] = source[torch.tensor(list(chosen.values()), device=source.device)].to(target.device)
