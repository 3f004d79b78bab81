"""What a pipeline returns beyond stock: images with what is known of how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor

from diffalign.guidance import GuidanceReport
from diffalign.noise import NoiseDistribution
from diffalign.types import Cost, Trace


@dataclass
class AlignedOutput(BaseOutput):
    """A diffusers output. What does not apply is None."""

    images: Any
    """PIL images, or what output_type asked for; of a video model, its frames."""
    nsfw_content_detected: list[bool] | None = None
    seeds: list[int] | None = None
    """One for each image; None where the caller brought generators."""
    truncated: list[str | None] | None = None
    """For each image the end of its prompt that the model could not see, or None."""
    trace: Trace | None = None
    """What a search over noise did."""
    noise: Tensor | None = None
    """What it found, float32 of unit variance: latents=out.noise with seed=out.seeds makes these images again."""
    distribution: NoiseDistribution | None = None
    """Of noises, where the search learned one (FIND): latents=distribution.sample(seeds) makes more images of the same prompts."""
    initial_images: Any = None
    """Where it started; of the type of images."""
    guidance: GuidanceReport | None = None
    """Where a guidance method ran, what it cost; of the last generation, where there were several."""
    cost: Sequence[Cost] | None = None
    """Where a search ran, what it spent on each image: evaluations, backward passes, reward calls, seconds, peak memory."""
