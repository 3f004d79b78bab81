"""What images cost: seconds, evaluations of the denoising network, calls of the reward, peak memory.

An evaluation is one forward pass of the network for one latent: a guided step makes two for an image, a step of a search as many as a
whole generation. Gradients are not evaluations: a search counts its backward passes, each of which costs about two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from diffalign.methods.tracking import peak_memory_mb


class Meter:
    """`with Meter(pipeline) as meter: pipeline(...)`; afterwards `meter.costs(evaluations)` of each image of the batch."""

    def __init__(self, pipeline: Any) -> None:
        self.network = getattr(pipeline, pipeline.denoiser)
        self.device = torch.device(pipeline.device)
        self.seconds, self.network_evaluations = 0.0, 0

    def __enter__(self) -> Meter:
        self._handle = self.network.register_forward_pre_hook(self._count, with_kwargs=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._began
        self._handle.remove()

    def _count(self, network: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        latents = arguments[0] if arguments else named.get("sample", named.get("hidden_states"))
        self.network_evaluations += len(latents)

    def costs(
        self, images: int, evaluations: Sequence[int] | None = None, backward_passes: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Each image's cost: of the time an equal share, of the network's evaluations one by its own `evaluations` of the reward.

        evaluations: None where no search ran. Samples that stopped early made fewer images, hence fewer passes of the network.
        backward_passes: of each image, as the search counted them; None where none ran or nobody counted.
        """
        backward = backward_passes or [None if evaluations else 0] * images
        weights = list(evaluations or [1] * images)
        passes = [round(self.network_evaluations * weight / sum(weights), 4) for weight in weights]
        return [
            {
                "seconds": round(self.seconds / images, 4),
                "nfe": int(nfe) if nfe == int(nfe) else nfe,
                "backward_passes": gradients,
                "reward_calls": weight if evaluations else 0,
                "peak_memory_mb": peak_memory_mb(self.device),
            }
            for nfe, weight, gradients in zip(passes, weights, backward, strict=True)
        ]
