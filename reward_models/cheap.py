"""Rewards that cost nothing and need no weights, for first steps and tests: the size as a JPEG, and brightness."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from diffalign.reward_models.base import Images, RewardModel, Scores
from diffalign.reward_models.pixels import constant
from diffalign.reward_models.spec import Spec

LUMINANCE = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709, taken on the encoded values as they are


class JPEGSize(RewardModel):
    """DDPO's (in)compressibility: sign x kilobytes (1000 bytes) of the image as a baseline JPEG of a quality. No gradient."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.sign, self.quality = int(spec.options["sign"]), int(spec.options["quality"])

    @torch.no_grad()
    def score(self, images: Images, texts: Tensor | None) -> Scores:
        levels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self.sign * self._kilobytes(picture) for picture in map(Image.fromarray, levels)], device=images.device)

    def _kilobytes(self, picture: Image.Image) -> float:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=self.quality)
        return len(buffer.getvalue()) / 1000


class Brightness(RewardModel):
    """Mean luminance in [0, 1]; differentiable."""

    def score(self, images: Images, texts: Tensor | None) -> Scores:
        return (images.float() * constant(LUMINANCE, images.device, torch.float32)).sum(dim=1).mean(dim=(1, 2))
