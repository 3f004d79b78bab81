"""The denoising loop of one search, as methods that steer it are given it (diffalign/loop.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning, Size
from diffalign.diffusion import Sampler, Schedule
from diffalign.loop import OnStep, Rollout
from diffalign.pipelines import inputs
from diffalign.sampling import rollout


class SteeredLoop:
    """`rollout` with prompts, guidance, size and schedule settled by a pipeline's call."""

    def __init__(self, backbone: Any, conditioning: Conditioning, arguments: Mapping[str, Any], size: Size, seeds: Sequence[int]) -> None:
        self.backbone, self.conditioning, self.arguments, self.size, self.seeds = backbone, conditioning, arguments, size, seeds
        self._schedule: Schedule | None = None

    @property
    def schedule(self) -> Schedule:
        """Made when first asked for: most searches never do, and not every scheduler tells its levels."""
        if self._schedule is None:
            given = {name: self.arguments[name] for name in inputs.SCHEDULE[1:] if name in self.arguments}
            self._schedule = self.backbone.schedule(self.arguments.get("num_inference_steps"), size=self.size, **given)
        return self._schedule

    @property
    def steps(self) -> int:
        return self.schedule.steps

    def run(
        self,
        noise: Float[Tensor, "k ..."],
        rows: Sequence[int],
        sampler: Sampler | None = None,
        on_step: OnStep | None = None,
        draws: Sequence[int] | None = None,
    ) -> Rollout:
        """The contract is that of diffalign.loop.DenoisingLoop."""
        draws = [0] * len(rows) if draws is None else list(draws)
        streams = [_stream(self.seeds[row], draw) for row, draw in zip(rows, draws, strict=True)]
        conditioning = self.conditioning.rows(rows)
        scale = self.arguments.get(self.backbone.scale_argument) or 1.0
        scale = scale if conditioning.has_unconditional else 1.0
        return rollout(
            self.backbone, noise, conditioning, self.schedule, sampler, guidance_scale=scale, on_step=on_step, generators=streams
        )

    def decode(self, latents: Float[Tensor, "k ..."]) -> Float[Tensor, "k ..."]:
        return self.backbone.decode(latents, self.size)


def _stream(seed: int, draw: int) -> torch.Generator:
    """The steps' noise of one row: of its own for every (seed, draw), and none of those that `seeded_noise` draws from."""
    hashed = int(np.random.SeedSequence([seed, draw, 1]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(hashed)
