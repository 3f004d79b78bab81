"""What the training loop and the objectives agree on.

An objective never sees a module, an optimiser or a device. It is given denoisers: the policy, which learns, and the reference, which is the
policy as it was (the adapter switched off), without gradient. Everything random comes from the generator that it is handed, seeded by
the loop with (seed, step), so that a resumed run equals one that was not stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Backbone, Conditioning, Times


class Denoiser(Protocol):
    """A network at some weights: (x, timestep, conditioning, guidance scale) -> its output, as `Backbone.denoise`.

    `backbone` has the same weights in force only inside a call; its other methods (levels, draw_timesteps, decode, noise_shape) may be
    used freely. To roll out: `sampling.rollout(denoiser.as_backbone(), ...)`.
    """

    backbone: Backbone

    def __call__(
        self, x: Float[Tensor, "b ..."], timestep: Times, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Float[Tensor, "b ..."]: ...

    def as_backbone(self) -> Backbone:
        """The backbone with these weights in force in every call of `predict` and `denoise`."""
        ...


@dataclass(frozen=True)
class PairBatch:
    """Preferences: two clean latents of each prompt, the better one first."""

    winners: Float[Tensor, "b ..."]
    losers: Float[Tensor, "b ..."]
    conditioning: Conditioning
    """Of the winners; of the losers too where `losers_conditioning` is None."""
    losers_conditioning: Conditioning | None = None
    """Where the two images have captions of their own (DCPO)."""
    weights: Float[Tensor, " b"] | None = None
    """How much each pair counts; None: alike."""

    def __len__(self) -> int:
        return len(self.winners)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to make images of: what objectives that collect their own data begin with."""

    conditioning: Conditioning
    seeds: tuple[int, ...]
    """One for each prompt; everything random about its images comes from it."""

    def __len__(self) -> int:
        return len(self.seeds)


Batch = TypeVar("Batch")
Collected = TypeVar("Collected")
ScoreImages = Callable[[Float[Tensor, "b ..."], list[str]], Float[Tensor, " b"]]
"""score(images, prompts): a reward's total; with gradient where it is differentiable and gradients are enabled."""


class Objective(Protocol[Batch, Collected]):
    """One paper's loss, as frozen settings."""

    name: str

    def collect(self, policy: Denoiser, batch: Batch, generator: torch.Generator) -> Collected:
        """What the loss needs beyond the data: rollouts, rewards. Without gradient; the identity for objectives on data.

        The loop calls it once a batch, and may call `loss` on its result several times (`updates_per_batch`).
        """
        ...

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: Collected, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        """The loss, mean over samples, and figures to log. Its gradient reaches the policy's weights alone."""
        ...

    def settings(self) -> dict[str, Any]:
        """As plain JSON data, for cards and for resuming."""
        ...
