"""Several rewards as one: the weighted sum of their raw scores, with every part kept, and others that only watch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from diffalign.types import Images, RewardModel, RewardScores, Scores


class RewardMix:
    """total = sum of weight x score over the members, in their own units; a negative weight makes less better.

    members: name -> (reward model, weight). watched: name -> reward model that is scored without gradient and never optimised, so that a
    method exploiting the members shows. Raises ValueError for an empty mix, a weight that is zero or not finite, a name in both; TypeError
    for a weight that is no number or a member that is no reward model.
    """

    def __init__(self, members: Mapping[str, tuple[RewardModel, float]], watched: Mapping[str, RewardModel] = MappingProxyType({})) -> None:
        if not members:
            raise ValueError("members is empty; a RewardMix needs at least one reward to optimise")
        for name, entry in members.items():
            _check_member(name, entry)
        for name, model in watched.items():
            if name in members:
                raise ValueError(f"watched holds {name!r}, which is a member already and reported anyway; name it in one place")
            _check_model(name, model)
        self.members = dict(members)
        self.watched = dict(watched)

    @property
    def weights(self) -> dict[str, float]:
        return {name: weight for name, (_, weight) in self.members.items()}

    @property
    def differentiable(self) -> bool:
        """Whether every member is; watched rewards need not be."""
        return all(model.differentiable for model, _ in self.members.values())

    def prepare(self, prompts: Sequence[str]) -> None:
        """Let every reward, watched ones too, encode the prompts."""
        for model, _ in self.members.values():
            model.prepare(prompts)
        for model in self.watched.values():
            model.prepare(prompts)

    def __call__(self, images: Images, prompts: Sequence[str]) -> RewardScores:
        """Scores of images "b 3 h w" in [0, 1] against b prompts. Parts keep their gradient, so they can be weighed anew."""
        parts = {name: _scores(name, model, images, prompts) for name, (model, _) in self.members.items()}
        total = torch.stack([weight * parts[name] for name, (_, weight) in self.members.items()]).sum(dim=0)
        with torch.no_grad():
            watched = {name: _scores(name, model, images.detach(), prompts) for name, model in self.watched.items()}
        return RewardScores(total=total, parts=parts, watched=watched)


def _scores(name: str, model: RewardModel, images: Images, prompts: Sequence[str]) -> Scores:
    scores = model(images, prompts)
    if scores.shape != (len(images),):
        raise ValueError(f"reward {name!r} must return one score for each of {len(images)} images, got shape {tuple(scores.shape)}")
    return scores.float()


def _check_member(name: str, entry: tuple[RewardModel, float]) -> None:
    if not isinstance(entry, tuple) or len(entry) != 2:
        raise TypeError(f"members[{name!r}] must be a pair (reward model, weight), got {type(entry).__name__}")
    model, weight = entry
    _check_model(name, model)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"the weight of reward {name!r} must be a number, got {weight!r}")
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"the weight of reward {name!r} must be finite and not zero, got {weight}; to report alone use watched")


def _check_model(name: str, model: RewardModel) -> None:
    if not isinstance(model, RewardModel):
        raise TypeError(f"{name!r} must be a reward model (name, differentiable, prepare, call), got {type(model).__name__}")
