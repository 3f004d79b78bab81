"""What tests of objectives on rollouts share: the backbone known in closed form, as a policy and a reference, and tiny real ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from diffalign.training.contract import PromptBatch
from diffalign.training.rollouts import Rollouts
from tests.families.tiny import ROWS
from tests.test_sampling import Gaussian


class Toy(Gaussian):
    """A whole backbone: its images are its latents, 16 numbers around gain times the prompt's."""

    def schedule(self, steps=None, *, size=None):
        return super().schedule()

    def draw_noise(self, generators, size=None):
        return torch.stack([torch.randn(1, 4, 4, generator=generator) for generator in generators])

    def decode(self, latents, size=None):
        return latents


class Network:
    """A denoiser whose weights are always in force."""

    def __init__(self, backbone, module=None) -> None:
        self.backbone, self.module = backbone, module or backbone

    def __call__(self, x, timestep, conditioning, guidance_scale=1.0):
        return self.backbone.denoise(x, timestep, conditioning, guidance_scale)

    def as_backbone(self):
        return self.backbone


def toy(prediction: str = "flow", gain: float = 1.0) -> Network:
    backbone = Toy(prediction, spread=0.3)
    with torch.no_grad():
        backbone.gain.fill_(gain)
    return Network(backbone)


def frozen(policy: Network) -> Network:
    return Network(copy.deepcopy(policy.backbone).requires_grad_(False))


def prompts(policy: Network, *texts: str, first: int = 0) -> PromptBatch:
    return PromptBatch(policy.backbone.encode(list(texts)), tuple(first + i for i in range(len(texts))))


def mean_value(images, texts):
    """A reward of the toy: rises with gain for positive prompts."""
    return images.flatten(1).mean(1)


def luck(seed: int = 5):
    """A reward that has nothing to do with the images: what shuffling would leave."""
    generator = torch.Generator().manual_seed(seed)
    return lambda images, texts: torch.randn(len(images), generator=generator)


def train(objective, policy: Network, updates: int = 25, lr: float = 0.02, texts=("2", "3"), per_batch: int = 1) -> float:
    """How far the weight moves in some steps of Adam."""
    reference, before = frozen(policy), policy.backbone.gain.item()
    optimizer = torch.optim.Adam([policy.backbone.gain], lr=lr)
    for update in range(updates):
        generator = torch.Generator().manual_seed(update)
        collected = objective.collect(policy, prompts(policy, *texts, first=1000 * update), generator)
        for _ in range(per_batch):
            loss, _ = objective.loss(policy, reference, collected, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return policy.backbone.gain.item() - before


def by_luck(objective, rewards: str, runs: int = 6) -> float:
    """The same with scores drawn by lot, in half the steps, mean over runs: each wanders by about 0.08, their mean does not."""
    return sum(train(replace(objective, **{rewards: luck(seed)}), toy(), updates=12) for seed in range(runs)) / runs


REAL = ("sd15", "sd21", "sd3-medium")  # epsilon, v and flow
QUICK = Rollouts(images=2, steps=3, guidance_scale=3.0)


def real(name: str, texts=("a red circle", "two blue cups")) -> tuple[Network, PromptBatch]:
    """A complete tiny pipeline of that preset, its network in eval mode and trainable, the rest frozen; and a batch for it."""
    row = ROWS[name]
    pipe = row.pipeline(row.aligned_class())
    module = getattr(pipe, pipe.denoiser)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(part is module)
    conditioning = pipe.encode(list(texts), size=pipe.default_size())
    return Network(pipe, module), PromptBatch(conditioning, tuple(range(len(texts))))


def brightness(images, texts):
    return images.flatten(1).mean(1)


def gradients(objective, policy: Network, batch, reference: Network | None = None):
    """The loss of a batch just collected, and the gradient of every weight."""
    generator = torch.Generator().manual_seed(0)
    collected = objective.collect(policy, batch, generator)
    loss, figures = objective.loss(policy, reference or policy, collected, generator)
    policy.module.zero_grad(set_to_none=True)
    loss.backward()
    return loss, figures, {name: weight.grad for name, weight in policy.module.named_parameters()}


def assert_gradients(found) -> None:
    """Finite everywhere and nowhere all zero, but for a projection that SD3's last block has and does not use."""
    for name, gradient in found.items():
        if name.endswith(("1.attn.add_q_proj.weight", "1.attn.add_q_proj.bias")):
            continue
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
