"""What a pipeline takes and returns beyond stock: encoded prompts, and images with what is known of how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from diffalign.guidance import GuidanceReport
from diffalign.types import Trace


@dataclass(frozen=True)
class Conditioning:
    """Prompts, encoded once. `tensors` maps an argument of the stock call to its tensor, samples first."""

    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: Sequence[int]) -> Conditioning:
        """The conditioning of the samples `rows`, in that order; a sample may occur more than once."""
        if any(not 0 <= row < len(self) for row in rows):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}, got {list(rows)}")
        tensors = {name: tensor[torch.as_tensor(rows, device=tensor.device)] for name, tensor in self.tensors.items()}
        return Conditioning(tuple(self.prompts[row] for row in rows), tensors)


@dataclass
class AlignedOutput(BaseOutput):
    """A diffusers output. What does not apply is None.

    images: PIL images, or what output_type asked for. seeds: one for each image; None where the caller brought generators.
    truncated: for each image the end of its prompt that the model could not see, or None. Where a search over noise ran also:
    trace; noise (float32, unit variance: pass it as latents=); initial_images (of the type of images: where the search started).
    guidance: where a guidance method ran, what it cost; of the last generation, where there were several.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    seeds: list[int] | None = None
    truncated: list[str | None] | None = None
    trace: Trace | None = None
    noise: Tensor | None = None
    initial_images: Any = None
    guidance: GuidanceReport | None = None
