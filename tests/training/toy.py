"""A flow model of one linear layer, and pairs for it, so that a whole training run takes milliseconds."""

from __future__ import annotations

import torch

from diffalign.backbone import Conditioning
from diffalign.training.contract import PairBatch
from diffalign.training.data import seeded
from diffalign.training.policy import Adaptation, Policy

SHAPE = (1, 2, 2)


class Toy:
    """The network sees x, the time and the prompt, which is a number."""

    two_calls = False
    prediction = "flow"

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Linear(6, 4)

    def encode(self, prompts, negative_prompt=None, *, unconditional=True, size=None, embedded_scale=None):
        tensors = {"prompt_embeds": torch.tensor([[float(prompt or 0)] for prompt in prompts])}
        if unconditional:
            tensors["negative_prompt_embeds"] = torch.zeros(len(prompts), 1)
        return Conditioning(tuple(prompts), tensors, size)

    def encode_images(self, images):
        return images.mean(1, keepdim=True)[..., :2, :2]

    def draw_timesteps(self, count, generator):
        return 1000 * (1 - torch.rand(count, generator=generator))

    def levels(self, timesteps):
        return 1 - timesteps / 1000, timesteps / 1000

    def predict(self, x, timestep, texts, conditioning):
        times = torch.as_tensor(timestep, dtype=torch.float32).expand(len(x)).view(-1, 1) / 1000
        return self.net(torch.cat([x.flatten(1), times, texts["prompt_embeds"]], 1)).view(x.shape)

    def denoise(self, x, timestep, conditioning, guidance_scale=1.0):
        return self.predict(x, timestep, conditioning.conditional(), conditioning)


class ToyPairs:
    """Winners lie around +1, losers around -1; each depends on its position alone."""

    def __init__(self, backbone) -> None:
        self.backbone = backbone
        self.asked: list[list[int]] = []

    def take(self, positions):
        self.asked.append(list(positions))
        noise = torch.stack([torch.randn(2, *SHAPE, generator=seeded(7, position)) for position in positions])
        conditioning = self.backbone.encode([str(position % 3) for position in positions], unconditional=False)
        return PairBatch(1 + 0.1 * noise[:, 0], -1 + 0.1 * noise[:, 1], conditioning)


def toy_policy() -> Policy:
    return Policy(Toy(), "net", Adaptation(rank=None))


def same(first, second) -> bool:
    """Whether two dictionaries of tensors are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
