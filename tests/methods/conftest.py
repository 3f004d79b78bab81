"""A toy world for the methods: generators and rewards small enough to be worked by hand, in the vocabulary of diffalign.types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from diffalign.types import NoiseProblem, RewardScores


def plane_generate(noise: Tensor, rows: Sequence[int]) -> Tensor:
    """Noise "k 2" is shown as it is, as an image "k 3 1 2": what a reward says of the image it says of the noise."""
    return noise[:, None, None, :].expand(-1, 3, 1, 2)


class PlaneReward:
    """R = -scale/2 |x - c|^2 for the prompt "c1 c2": gradient scale (c - x), greatest at x = c. `norm` is watched."""

    name = "plane"
    differentiable = True

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.prepared: list[str] = []

    def prepare(self, prompts: Sequence[str]) -> None:
        self.prepared = list(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardScores:
        x = images[:, 0, 0, :]
        c = torch.tensor([[float(value) for value in prompt.split()] for prompt in prompts])
        total = -self.scale / 2 * (x - c).square().sum(1)
        return RewardScores(total=total, parts={"near": total}, watched={"norm": x.detach().norm(dim=1)})


_MAP = torch.randn(18, 48, generator=torch.Generator().manual_seed(0)) / 18**0.5


def curved_generate(noise: Tensor, rows: Sequence[int]) -> Tensor:
    """A smooth, bent map from latents "k 2 3 3" to images "k 3 4 4" in [0, 1]."""
    return torch.sigmoid(2 * torch.sin(noise.flatten(1) @ _MAP.to(noise.dtype))).view(-1, 3, 4, 4)


class CurvedReward:
    """Two parts, each the likeness of the image to a pattern that the prompt (an integer) seeds; total = parts summed, times scale."""

    name = "curved"
    differentiable = True

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def prepare(self, prompts: Sequence[str]) -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardScores:
        patterns = torch.stack([torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(int(prompt))) for prompt in prompts])
        parts = 1 - (images.float()[:, None] - patterns).square().mean((2, 3, 4))
        return RewardScores(self.scale * parts.sum(1), {"first": parts[:, 0], "second": parts[:, 1]})


@pytest.fixture
def plane() -> SimpleNamespace:
    def problem(noise: Sequence[Sequence[float]], goals: Sequence[str], **changes) -> NoiseProblem:
        given = {"noise": torch.tensor(noise), "prompts": list(goals), "seeds": list(range(len(goals))), "generate": plane_generate}
        return NoiseProblem(**{**given, **changes})

    return SimpleNamespace(problem=problem, reward=PlaneReward, generate=plane_generate)


@pytest.fixture
def curved() -> SimpleNamespace:
    def problem(samples: Sequence[int], generate: Callable = curved_generate, **changes) -> NoiseProblem:
        """Sample s has its own noise, prompt and seed, whichever batch it is in."""
        noise = torch.stack([torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(s)) for s in samples])
        given = {"noise": noise, "prompts": [str(100 + s) for s in samples], "seeds": list(samples), "generate": generate}
        return NoiseProblem(**{**given, **changes})

    return SimpleNamespace(problem=problem, reward=CurvedReward, generate=curved_generate)
