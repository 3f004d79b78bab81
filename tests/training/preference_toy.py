"""What the tests of preference objectives share: data and networks known in closed form, and tiny real ones."""

from __future__ import annotations

import copy

import torch

from diffalign.diffusion import from_x0_and_eps
from diffalign.noise import spread
from diffalign.training.contract import PairBatch
from tests.families.tiny import ROWS
from tests.test_sampling import Gaussian

SHAPE = (1, 4, 4)


class Toy(Gaussian):
    """Data are N(gain times the prompt's number, spread^2) at every level; the network is the best there is. A prompt is its number."""

    def levels(self, timesteps):
        share = timesteps.clamp(0, 1000) / 1000
        noise = share if self.prediction == "flow" else 0.03 + 0.965 * share
        return (1 - noise if self.prediction == "flow" else (1 - noise**2).sqrt()), noise

    def draw_timesteps(self, count, generator):
        if self.prediction == "flow":
            return 1000 * (1 - torch.rand(count, generator=generator))
        return torch.randint(1000, (count,), generator=generator).float()

    def predict(self, x, timestep, texts, conditioning):
        self.calls.append(timestep.clone())
        a, s = (spread(each, x) for each in self.levels(timestep))
        target = spread(self.gain * texts["prompt_embeds"], x)
        variance = a**2 * self.spread**2 + s**2
        x0 = target + a * self.spread**2 / variance * (x - a * target)
        return from_x0_and_eps(x0, s / variance * (x - a * target), a.flatten(), s.flatten(), self.prediction)


class Network:
    """A denoiser whose weights are always in force."""

    def __init__(self, backbone) -> None:
        self.backbone = backbone

    def __call__(self, x, timestep, conditioning, guidance_scale=1.0):
        return self.backbone.denoise(x, timestep, conditioning, guidance_scale)

    def as_backbone(self):
        return self.backbone


def toy(prediction: str = "epsilon", gain: float = 1.0, width: float = 0.3) -> Network:
    backbone = Toy(prediction, spread=width)
    with torch.no_grad():
        backbone.gain.fill_(gain)
    return Network(backbone)


def frozen(policy: Network) -> Network:
    """The policy as it is, without gradient."""
    return Network(copy.deepcopy(policy.backbone).requires_grad_(False))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs(count: int = 3, seed: int = 0, winner: float = 3.0, loser: float = 1.0, captions: bool = False) -> PairBatch:
    """Of the prompt "2": winners lie around one number, losers around another; with captions, each is told its own."""
    generator = seeded(seed)
    images = torch.randn(2, count, *SHAPE, generator=generator) * 0.3
    encode = Gaussian().encode
    texts = (encode([f"{winner}"] * count), encode([f"{loser}"] * count)) if captions else (encode(["2"] * count), None)
    return PairBatch(images[0] + winner, images[1] + loser, *texts)


def swapped(batch: PairBatch) -> PairBatch:
    return PairBatch(batch.losers, batch.winners, batch.losers_conditioning or batch.conditioning,
                     batch.losers_conditioning and batch.conditioning, batch.weights)  # fmt: skip


def train(objective, policy: Network, batches, lr: float = 0.01) -> list[float]:
    """Steps of Adam on all that the toy can learn; the losses."""
    reference = frozen(policy)
    optimizer = torch.optim.Adam([policy.backbone.gain], lr=lr)
    losses = []
    for step, batch in enumerate(batches):
        generator = seeded(step)
        loss, _ = objective.loss(policy, reference, objective.collect(policy, batch, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Scripted:
    """A denoiser that returns the numbers it was given, whatever it sees: constant images, winners first."""

    def __init__(self, *outputs: float) -> None:
        self.backbone = Toy("epsilon")
        self.outputs = torch.tensor(outputs, requires_grad=True)

    def __call__(self, x, timestep, conditioning, guidance_scale=1.0):
        return spread(self.outputs, x).expand_as(x)


def silence(policy, reference, samples, generator):
    """A state provider whose noise is nothing, so that the error of a scripted denoiser is its output squared."""
    return samples.signal.view(-1, 1, 1, 1) * samples.clean, torch.zeros_like(samples.clean)


# ---- tiny real networks --------------------------------------------------------------------------------------------------------


REAL = {"epsilon": "sd-turbo", "v_prediction": "sd21", "flow": "sd3-without-t5"}
"""What is predicted -> a row of the families' tests."""


def real(prediction: str = "", family: str = "") -> tuple[Network, Network]:
    """A policy that learns in all its weights and the same network as reference, which would take a gradient if one came."""
    row = ROWS[family or REAL[prediction]]
    both = [Network(row.pipeline(row.aligned_class())) for _ in range(2)]
    for network in both:
        getattr(network.backbone, network.backbone.denoiser).requires_grad_(True)
    assert prediction in ("", both[0].backbone.prediction)
    return both[0], both[1]


def real_pairs(policy: Network, count: int = 2, captions: bool = False, size=None, embedded_scale=None) -> PairBatch:
    shape, generator = policy.backbone.noise_shape(size), seeded(7)
    images = torch.randn(2, count, *shape, generator=generator)
    names = ["a red bird", "two blue cups", "a green cat"][:count]
    with torch.no_grad():
        how = {"unconditional": False, "size": size, "embedded_scale": embedded_scale}
        texts = policy.backbone.encode(names, **how)
        other = policy.backbone.encode([f"not {name}" for name in names], **how) if captions else None
    return PairBatch(images[0], images[1], texts, other)


def unreached(policy: Network) -> set[str]:
    """Names of the tensors that backward passes left without gradient."""
    network = getattr(policy.backbone, policy.backbone.denoiser)
    return {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}


def unused(policy: Network, batch: PairBatch) -> set[str]:
    """Names of the tensors that the output does not depend on: SD3 throws the text's last queries away."""
    policy(batch.winners, torch.full((len(batch),), 500.0), batch.conditioning).square().sum().backward()
    names = unreached(policy)
    getattr(policy.backbone, policy.backbone.denoiser).zero_grad()
    return names


def nudge(policy: Network) -> None:
    """Moves every weight a little: at policy = reference some gradients of some losses are 0."""
    generator = seeded(3)
    with torch.no_grad():
        for parameter in getattr(policy.backbone, policy.backbone.denoiser).parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
