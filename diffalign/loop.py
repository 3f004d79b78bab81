"""What stands inside the denoising loop: the state that a step leaves, what a whole run made, and who can make runs.

`sampling.rollout` is the loop itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import Sampler, Schedule


@dataclass(frozen=True)
class LoopState:
    """Where a rollout stands after step `index`. Frozen: `on_step` returns another one to change what goes on."""

    index: int
    """The step that was just made, 0 ... n - 1."""
    x: Float[Tensor, "k ..."]
    """The state that the next step starts from."""
    before: Float[Tensor, "k ..."]
    """The state that this step started from."""
    mean: Float[Tensor, "k ..."]
    """Of the normal distribution that x was drawn from."""
    std: float
    """Its standard deviation; 0 where the step is deterministic, and then x is the mean."""
    x0: Float[Tensor, "k ..."]
    """The clean latents as predicted at this step; `backbone.decode` makes images of them."""
    rows: tuple[int, ...]
    """Which sample of the batch each row carries."""

    def take(self, indices: Sequence[int]) -> LoopState:
        """The same with its rows re-indexed: dropped, repeated, reordered."""
        if any(not 0 <= j < len(self.rows) for j in indices):
            raise IndexError(f"indices must lie in 0..{len(self.rows) - 1}, got {list(indices)}")
        chosen = torch.as_tensor(list(indices), device=self.x.device)
        tensors = {name: getattr(self, name)[chosen] for name in ("x", "before", "mean", "x0")}
        return replace(self, **tensors, rows=tuple(self.rows[j] for j in indices))


OnStep = Callable[[LoopState], LoopState | None]
"""Called after every step; None goes on unchanged."""


@dataclass
class Rollout:
    """What a rollout made. Lists are one entry a step, and empty unless `keep` names them."""

    latents: Float[Tensor, "k ..."]
    """The clean latents, for `backbone.decode`."""
    rows: tuple[int, ...]
    """Which sample of the batch each row carries; 0 ... b - 1 unless `on_step` re-indexed."""
    evaluations: list[int]
    """Of the network, for each row that was given; what a row that was dropped had cost stays counted."""
    states: list[Tensor] = field(default_factory=list)
    """n + 1 of them: the start, and the state after each step."""
    means: list[Tensor] = field(default_factory=list)
    stds: list[float] = field(default_factory=list)
    """Always kept; 0 for deterministic steps."""
    x0: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor | None] = field(default_factory=list)
    """Of each state given the one before, "k" in nats; None for deterministic steps."""


class DenoisingLoop(Protocol):
    """The loop of one search: prompts, guidance and schedule are settled, noise and what happens at each step are the method's."""

    steps: int
    """Of the schedule; a run evaluates each row so often, twice under guidance."""
    schedule: Schedule
    """The levels that it visits."""

    def run(
        self,
        noise: Float[Tensor, "k ..."],
        rows: Sequence[int],
        sampler: Sampler | None = None,
        on_step: OnStep | None = None,
        draws: Sequence[int] | None = None,
    ) -> Rollout:
        """Denoise; rows[j] says which sample noise[j] belongs to, and `Rollout.rows` and `LoopState.rows` number the noises given here.

        Row j's noise at the steps comes from its sample's seed and draws[j]; 0 for all without `draws`.
        """
        ...

    def decode(self, latents: Float[Tensor, "k ..."]) -> Float[Tensor, "k ..."]:
        """Images in [0, 1] from clean latents, such as `LoopState.x0` or `Rollout.latents`."""
        ...
