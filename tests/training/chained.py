"""A generator known in closed form, with weights for every step, and rewards of its images; for objectives that sample."""

from __future__ import annotations

import copy

import torch

from diffalign.diffusion import Schedule, from_x0
from diffalign.noise import spread
from diffalign.training.contract import PromptBatch
from tests.test_sampling import Gaussian

SHAPE = (1, 4, 4)


class Chained(Gaussian):
    """Data are N(gain_i target, spread^2) at the i-th level, gain_i = gain + offsets[i]: a gradient tells which steps it went through.

    Images are the latents themselves. With spread 0 the prediction is gain_i target, whatever the input.
    """

    def __init__(self, prediction: str = "flow", spread: float = 0.0, steps: int = 4) -> None:
        super().__init__(prediction, spread)
        self.offsets = torch.nn.Parameter(torch.zeros(steps))

    def levels(self, timesteps):
        noise = timesteps / 1000
        return (1 - noise, noise) if self.prediction == "flow" else ((1 - noise.clamp_max(0.999) ** 2).sqrt(), noise.clamp_max(0.999))

    def schedule(self, steps=None, *, size=None) -> Schedule:
        times = torch.tensor([1000.0 * (1 - i / len(self.offsets)) for i in range(len(self.offsets))])
        signal, noise = self.levels(times)
        return Schedule(tuple(times.tolist()), (*signal.tolist(), 1.0), (*noise.tolist(), 0.0), self.prediction)

    def draw_timesteps(self, count, generator):
        return 1000 * (1 - torch.rand(count, generator=generator))

    def draw_noise(self, generators, size=None):
        return torch.stack([torch.randn(SHAPE, generator=g) for g in generators])

    def decode(self, latents, size=None):
        return latents

    def predict(self, x, timestep, texts, conditioning):
        times = torch.as_tensor(timestep, dtype=torch.float32).expand(len(x))
        self.calls.append(len(x))
        a, s = self.levels(times)
        step = (times.view(-1, 1) - torch.tensor(self.schedule().timesteps)).abs().argmin(1)
        target = spread((self.gain + self.offsets[step]) * texts["prompt_embeds"], x)
        weight = spread(a * self.spread**2 / (a**2 * self.spread**2 + s**2), x)
        return from_x0(x, target + weight * (x - spread(a, x) * target), a, s, self.prediction)


class Weights:
    """The contract's Denoiser over a backbone that is a network of its own."""

    def __init__(self, backbone) -> None:
        self.backbone = backbone

    def __call__(self, x, timestep, conditioning, guidance_scale=1.0):
        return self.backbone.denoise(x, timestep, conditioning, guidance_scale)

    def as_backbone(self):
        return self.backbone


def pair(prediction: str = "flow", spread: float = 0.0, steps: int = 4) -> tuple[Weights, Weights]:
    """A policy and its reference."""
    policy = Chained(prediction, spread, steps)
    return Weights(policy), Weights(copy.deepcopy(policy).requires_grad_(False))


def prompts(policy: Weights, targets: tuple[str, ...], seeds: tuple[int, ...]) -> PromptBatch:
    return PromptBatch(policy.backbone.encode(list(targets)), seeds)


def mean_value(images, prompts):
    return images.flatten(1).mean(1)


def towards(value: float):
    return lambda images, prompts: -(images.flatten(1).mean(1) - value).square()


def nothing(images, prompts):
    return 0 * images.flatten(1).sum(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_of(objective, policy, reference, batch, seed: int = 0):
    """The loss on a batch from scratch, and its figures."""
    return objective.loss(policy, reference, objective.collect(policy, batch, generator(seed)), generator(seed))


def gradients_of(objective, policy, reference, batch, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `gain`, and of every step's own offset; zeros where nothing arrived."""
    weights = [policy.backbone.gain, policy.backbone.offsets]
    loss, _ = loss_of(objective, policy, reference, batch, seed)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return tuple(torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True))


def trained(objective, policy, reference, batch_of, steps: int = 12, lr: float = 0.1) -> list[dict[str, float]]:
    """A few Adam steps; the figures of each."""
    optimizer = torch.optim.Adam([policy.backbone.gain], lr)
    log = []
    for step in range(steps):
        loss, figures = loss_of(objective, policy, reference, batch_of(step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(figures)
    return log
