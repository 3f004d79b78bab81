"""GenEval's judge as a reward model: what Flow-GRPO and others train on. A model tuned or searched with it is in-domain for GenEval.

    detector            1 where GenEval's rules call the image correct, else 0
    detector-partial    Flow-GRPO's partial credit (geneval_reward.py): at most 1, possibly negative

Prompts must be of GenEval's kind, since its rules need to know what to look for: "a photo of a red dog", "a photo of three cups", "a photo
of a cat left of a bench". Neither score has a gradient. Flow-GRPO's server compresses images as JPEG first; here they are judged as is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.benchmarks.geneval.partial_credit import UPSTREAM, partial_credit
from diffalign.benchmarks.geneval.prompts import parse
from diffalign.benchmarks.geneval.scorer import Colors, Detector, remembering
from diffalign.rules import judge

NAMES = ("detector", "detector-partial")
BATCH = 8  # images the detector is shown at once


@dataclass
class DetectorReward:
    """metadata: rows of prompts that are not of GenEval's kind, or that mean something else there: prompt -> {"tag", "include", ...}."""

    detector: Detector
    colors: Colors
    name: str = "detector"
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}; got {self.name!r}")

    def prepare(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that GenEval's rules cannot judge."""
        for prompt in prompts:
            self.row(prompt)

    def row(self, prompt: str) -> Mapping[str, Any]:
        return self.metadata[prompt] if prompt in self.metadata else parse(prompt)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1], rounded to 8 bits as a file would be. Raises ValueError for wrong shapes and values."""
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(f"reward {self.name!r} takes images (b, 3, h, w) and b prompts; got {tuple(images.shape)} and {len(prompts)}")
        if not torch.isfinite(images).all():
            raise ValueError(f"reward {self.name!r}: images has values that are not finite")
        if images.requires_grad and torch.is_grad_enabled():
            raise TypeError(f"reward {self.name!r} has no gradient; score detached images, or use a method that needs none (best-of-n)")
        rows = [self.row(prompt) for prompt in prompts]
        pixels = list((images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        scores: list[float] = []
        for start in range(0, len(pixels), BATCH):
            batch = slice(start, start + BATCH)
            scores += map(self._score, pixels[batch], rows[batch], self.detector(pixels[batch]))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, image: np.ndarray, row: Mapping[str, Any], found: Mapping[str, Sequence[Any]]) -> float:
        colors = remembering(self.colors, image)
        if self.name == "detector":
            return float(judge(row, found, colors, UPSTREAM).correct)
        return partial_credit(row, found, colors).score
