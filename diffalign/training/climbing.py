"""Which way clean latents should go so that several rewards of their image rise: what reward back-propagation starts from.

The image is decoded once. Each reward's gradient is taken with respect to the image alone and let go before the next, a rule of
rewards/gradients.py makes one direction of them, and that goes back through the decoder once. So memory holds one reward's graph at a
time, and the network's own graph is not entered before all is known. `with_gradient` then hands the direction to the latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Backbone, Conditioning
from diffalign.noise import sample_norm, spread
from diffalign.rewards.gradients import GradientRule, check_gradient_rule, weighted
from diffalign.training.contract import ScoreImages


@dataclass(frozen=True, eq=False)
class Climb:
    """Rewards that are climbed, and rewards that are only watched."""

    rewards: Mapping[str, ScoreImages]
    """Name -> reward, differentiable in the images."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Name -> weight; 1 where it is not named."""
    rule: GradientRule | None = None
    """How the image gradients become one direction: EqualRMS(), PCGrad(), MGDA(); None: their weighted sum."""
    watched: Mapping[str, ScoreImages] = field(default_factory=dict)
    """Name -> reward that is scored without gradient: where the climbed ones rise and these do not, they are being fooled."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one reward to climb")
        for what, names in (("weights", set(self.weights)), ("watched", set(self.watched) & set(self.rewards))):
            wrong = names - set(self.rewards) if what == "weights" else names
            if wrong:
                raise ValueError(f"{what} names {', '.join(sorted(wrong))}; rewards are {', '.join(sorted(self.rewards))}")
        if not all(math.isfinite(weight) for weight in self.weights.values()):
            raise ValueError(f"weights must be finite numbers, got {dict(self.weights)}")
        if self.rule is not None:
            check_gradient_rule(self.rule, self.all_weights())

    def all_weights(self) -> dict[str, float]:
        """The weight of every reward, in the order of `rewards`."""
        return {name: float(self.weights.get(name, 1.0)) for name in self.rewards}

    def settings(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"rewards": self.all_weights(), "rule": None if self.rule is None else self.rule.name, "watched": sorted(self.watched)}


@dataclass(frozen=True)
class Slope:
    """What the rewards say of a batch of clean latents."""

    total: Float[Tensor, " b"]
    """The weighted sum of the climbed rewards."""
    direction: Float[Tensor, "b ..."]
    """Of the latents, uphill."""
    figures: Mapping[str, float]
    """Means over the batch: reward/NAME, watched/NAME, image_gradient/NAME (its L2 norm), saturated (share of pixel values at 0 or 1,
    where the decoder's clamp lets no gradient through).
    """


def slope(climb: Climb, backbone: Backbone, x0: Float[Tensor, "b ..."], conditioning: Conditioning) -> Slope:
    """Score the images of x0, and find the direction in which the rewards rise. Enters no graph that x0 belongs to.

    Raises TypeError for a reward without gradient, ValueError for one that does not score each image.
    """
    prompts = list(conditioning.prompts)
    weights = climb.all_weights()
    with torch.enable_grad():
        latents = x0.detach().requires_grad_()
        decoded = backbone.decode(latents, conditioning.size)
        images = decoded.detach().requires_grad_()
        values, gradients = {}, []
        for name, score in climb.rewards.items():
            value = _scored(name, score, images, prompts)
            if not value.requires_grad:
                raise TypeError(f"reward {name!r} has no gradient to the images; watch it, or train by an objective that needs none")
            (gradient,) = torch.autograd.grad(value.sum(), images)
            values[name] = value.detach()
            gradients.append(gradient.float().flatten(1))
        stacked = torch.stack(gradients, 1)
        shares = stacked.new_tensor(list(weights.values())).expand(len(x0), -1)
        combined = (climb.rule or weighted)(stacked, shares)
        (direction,) = torch.autograd.grad(decoded, latents, combined.view_as(decoded).to(decoded.dtype))
    pictures = decoded.detach()
    with torch.no_grad():
        watched = {name: _scored(name, score, pictures, prompts) for name, score in climb.watched.items()}
    figures = {f"reward/{name}": value.mean() for name, value in values.items()}
    figures |= {f"watched/{name}": value.float().mean() for name, value in watched.items()}
    figures |= {f"image_gradient/{name}": gradient.norm(dim=1).mean() for name, gradient in zip(values, gradients, strict=True)}
    figures["saturated"] = ((pictures <= 0) | (pictures >= 1)).float().mean()
    total = torch.stack([weights[name] * value for name, value in values.items()]).sum(0)
    return Slope(total, direction.float(), as_numbers(figures))


def _scored(name: str, score: ScoreImages, images: Tensor, prompts: list[str]) -> Tensor:
    value = score(images, prompts)
    if value.shape != (len(images),):
        raise ValueError(f"reward {name!r} returned shape {tuple(value.shape)} for {len(images)} images; give one score for each")
    return value.float()


def unit(direction: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """Each sample scaled to the L2 norm 1; zero stays zero."""
    norm = sample_norm(direction)
    return direction * spread(torch.where(norm == 0, 0.0, 1 / norm), direction)


def as_numbers(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars on the host, in one transfer."""
    return dict(zip(figures, torch.stack([value.detach().float() for value in figures.values()]).tolist(), strict=True))
