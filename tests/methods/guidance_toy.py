"""A world where guidance is exact: classes are Gaussians, so both branches are known in closed form; DDIM on Stable Diffusion's schedule.

The loop treats a method as the hook on a real pipeline does, and counts evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.guidance import GuidanceRun
from diffalign.methods.guidance import Guidance

DIMENSIONS, CLASSES, SPREAD = 16, 64, 0.3


@dataclass
class Toy:
    """`steps` of DDIM at guidance scale `scale`. prediction: what the network is taken to predict."""

    steps: int = 20
    scale: float = 5.0
    prediction: str = "epsilon"
    means: Tensor = field(default_factory=lambda: torch.randn(CLASSES, DIMENSIONS, generator=torch.Generator().manual_seed(3)))
    network: str = "toy"

    def __post_init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        squares = torch.cumprod(1 - betas, 0)
        self.timesteps = tuple(float(t) for t in range(1000 - 1000 // self.steps // 2, 0, -(1000 // self.steps)))[: self.steps]
        self.signal = tuple(float(squares[int(t)].sqrt()) for t in self.timesteps)
        self.noise = tuple(float((1 - squares[int(t)]).sqrt()) for t in self.timesteps)

    def denoised(self, x: Tensor, step: int, classes: Tensor | None) -> Tensor:
        """E[x0 | x], of one class for each sample or of all."""
        a, s = self.signal[step], self.noise[step]
        variance = a * a * SPREAD**2 + s * s
        centred = x[:, None, :] - a * self.means
        each = self.means + a * SPREAD**2 / variance * centred
        if classes is not None:
            return each[torch.arange(len(x)), classes]
        weights = torch.softmax(-(centred**2).sum(-1) / (2 * variance), dim=1)
        return (weights[..., None] * each).sum(1)

    def predict(self, x: Tensor, step: int, classes: Tensor | None) -> Tensor:
        a, s = self.signal[step], self.noise[step]
        x0 = self.denoised(x, step, classes)
        return {"epsilon": (x - a * x0) / s, "sample": x0, "v_prediction": (a * x - x0) / s}[self.prediction]

    def run(self, method: Guidance | None, samples: int = 8, seed: int = 0, rows: list[int] | None = None) -> tuple[Tensor, list[int], Any]:
        """End points, evaluations of each sample, and the policy. rows: make only these of the samples."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, DIMENSIONS, generator=generator)
        classes = torch.randint(CLASSES, (samples,), generator=generator)
        if rows is not None:
            x, classes = x[rows], classes[rows]
        run = GuidanceRun(
            samples=len(x),
            timesteps=self.timesteps,
            prediction=self.prediction,
            signal=self.signal,
            noise=self.noise,
            guidance_scale=self.scale,
            identity=lambda: {"network": self.network, "timesteps": list(self.timesteps), "guidance_scale": self.scale, "negative": [0.0]},
        )
        policy = method.begin(run) if method is not None else None
        evaluations = [0] * len(x)
        for step in range(self.steps):
            plan = policy.plan(step) if policy else ["both"] * len(x)
            for i, branch in enumerate(plan):
                evaluations[i] += 2 if branch == "both" else 1
            c = self.predict(x, step, classes)[[branch != "unconditional" for branch in plan]]
            u = self.predict(x, step, None)[[branch != "conditional" for branch in plan]]
            if policy:
                c, u = policy.complete(step, x, c, u)
            x = self.step(x, u + self.scale * (c - u), step)
        return x, evaluations, policy

    def step(self, x: Tensor, output: Tensor, step: int) -> Tensor:
        a, s = self.signal[step], self.noise[step]
        if self.prediction == "epsilon":
            x0, eps = (x - s * output) / a, output
        elif self.prediction == "sample":
            x0, eps = output, (x - a * output) / s
        else:
            x0, eps = a * x - s * output, a * output + s * x
        last = step == self.steps - 1
        return x0 if last else self.signal[step + 1] * x0 + self.noise[step + 1] * eps


def relative_error(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())
