"""RewardMix: several rewards as one. A rule combines calibrated scores, every part is kept, others only watch.

    total_i = rule(u_1(r_1(x_i, p_i)), ..., u_K(r_K(x_i, p_i)); w)

with u_k into common units, where there is a calibration.

Scores that are not finite. In native units a member cannot be left out of a sum without moving it,
so the total is not finite either, and no method chooses it. With a calibration the member is left
out for that sample and the weights of the others grow to the same sum; where it is `required`, or
none is left, the total is NaN. Its own part keeps the value in either case, and it sends no gradient
to the image.

Gradient rules (gradients.py) replace the gradient of the total with respect to the images, not its
value: a climb moves along the combined direction of the members' own gradients, and the search still
keeps the image with the greatest total. A sample whose combined direction is not finite takes no
step from the rewards, and a warning names it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.rewards import names as rule_names
from diffalign.rewards.calibration import Calibration
from diffalign.rewards.combine import Rule, WeightedSum, check_rule, find_rule, soft_clip
from diffalign.rewards.gradients import GradientRule, check_gradient_rule, find_gradient_rule, with_gradient
from diffalign.types import RewardModel, RewardScores, Scores

Pictures = Float[Tensor, "b ... 3 h w"]  # images, or the videos "b f 3 h w" of frames.py


class RewardMix:
    """A reward that methods can optimise. Each sample is scored on its own.

    members: name -> (reward model, weight). A negative weight makes less better.
    watched: name -> reward model that is scored without gradient and never optimised, so that a
        method exploiting the members shows.
    rule: how members become one, see combine.py: a rule, its name ("soft-min=0.3") or its JSON form.
    calibration: the members' common units; where it is given, weights are of those.
    gradient: a rule of gradients.py, with the weighted sum alone; None: autograd's own gradient.
    required: members without which a sample has no score; needs a calibration.
    clip: > 0, calibrated scores are held softly within this many standard deviations, a cheap guard
        against rewards without bounds; 3 is usual. Not for unit "quantile", whose unit is a share.

    Raises ValueError for an empty mix, a weight that is zero or not finite, a name in both, a rule
    that needs a calibration where there is none, and a calibration that lacks a member or is another
    model's; TypeError for a weight that is no number and for what is no reward model.
    """

    def __init__(
        self,
        members: Mapping[str, tuple[RewardModel, float]],
        watched: Mapping[str, RewardModel] = MappingProxyType({}),
        rule: Rule | str | Mapping[str, Any] = "weighted",
        calibration: Calibration | None = None,
        *,
        gradient: GradientRule | str | Mapping[str, Any] | None = None,
        required: Collection[str] = (),
        clip: float | None = None,
    ) -> None:
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
        self.rule, self.gradient = find_rule(rule), find_gradient_rule(gradient)
        self.calibration, self.required, self.clip = calibration, frozenset(required), clip
        self._check_settings()

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

    def __call__(self, images: Pictures, prompts: Sequence[str]) -> RewardScores:
        """Scores of images "b 3 h w" in [0, 1] against b prompts; parts and watched in native units.

        Videos "b f 3 h w" do as well where every reward is one of videos (`frames.FrameReward`).
        Parts keep their gradient, so they can be weighed anew, except under a gradient rule, which uses it up.
        """
        climbing = images.requires_grad and torch.is_grad_enabled()
        if climbing and self.gradient is not None:
            parts, total = self._with_combined_gradient(images, prompts)
        else:
            parts, total = self._plain(images, prompts)
        with torch.no_grad():
            watched = {name: _scores(name, model, images.detach(), prompts) for name, model in self.watched.items()}
        return RewardScores(total=total, parts=parts, watched=watched)

    def units(self, scores: Mapping[str, Scores], prompts: Sequence[str]) -> dict[str, Scores]:
        """Native scores (parts or watched) as the rule sees them: calibrated and clipped. Without a calibration, as they are."""
        return {name: self._unit(name, values, prompts) for name, values in scores.items()}

    def total(self, parts: Mapping[str, Scores], prompts: Sequence[str]) -> Scores:
        """The total of native scores that were measured before, such as those of a trace; `parts` holds every member's."""
        units = self.units({name: parts[name] for name in self.members}, prompts)
        return self._combined(*self._prepared(torch.stack(list(units.values()), dim=1)))

    def settings(self) -> dict[str, Any]:
        """All that decides a total, calibration included, as plain JSON data; `hub.load_reward` takes the values back."""
        return {
            "members": self.weights,
            "watched": list(self.watched),
            "rule": rule_names.settings(self.rule),
            "gradient": None if self.gradient is None else rule_names.settings(self.gradient),
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "required": sorted(self.required),
            "clip": self.clip,
        }

    def _plain(self, images: Pictures, prompts: Sequence[str]) -> tuple[dict[str, Scores], Scores]:
        """Parts and total with the gradient that autograd finds."""
        parts = {}
        for name, (model, _) in self.members.items():
            seen = images.view_as(images)
            parts[name] = _scores(name, model, seen, prompts)
            if seen.requires_grad and self.calibration is not None:
                # a score that is left out has weight 0, and 0 times its gradient would be NaN all the same
                seen.register_hook(_keeping(parts[name].isfinite()))
        return parts, self.total(parts, prompts)

    def _with_combined_gradient(self, images: Pictures, prompts: Sequence[str]) -> tuple[dict[str, Scores], Scores]:
        """Parts without gradient, and a total whose gradient is the combined direction. One member's graph is alive at a time."""
        parts, units, gradients = {}, [], []
        for name, (model, _) in self.members.items():
            leaf = images.detach().requires_grad_(True)
            part = _scores(name, model, leaf, prompts)
            if not part.requires_grad:
                raise TypeError(f"reward {name!r} has no gradient, which the rule {self.gradient.name!r} combines; watch it instead")
            unit = self._unit(name, part, prompts)
            (gradient,) = torch.autograd.grad(unit.sum(), leaf)
            gradients.append(gradient.flatten(1).float())
            units.append(unit.detach())
            parts[name] = part.detach()
        values, weights, sound = self._prepared(torch.stack(units, dim=1))
        stacked = torch.stack(gradients, dim=1)
        if self.calibration is not None:
            stacked = torch.where((weights != 0).unsqueeze(2), stacked, 0.0)
        direction = self.gradient(stacked, weights).view_as(images)
        return parts, with_gradient(self._combined(values, weights, sound), images, direction)

    def _unit(self, name: str, scores: Scores, prompts: Sequence[str]) -> Scores:
        if self.calibration is None:
            return scores
        unit = self.calibration.apply(name, scores, prompts)
        return unit if self.clip is None else soft_clip(unit, self.clip)

    def _prepared(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores "b k" and weights "b k" without what is not finite, and which samples have a total at all (None: all, as they come)."""
        given = torch.tensor(list(self.weights.values()), device=units.device).expand_as(units)
        if self.calibration is None:
            return units, given, None
        finite = units.isfinite()
        needed = torch.tensor([name in self.required for name in self.members], device=units.device)
        sound = finite.any(1) & (finite | ~needed).all(1)
        left = given.abs().where(finite, 0.0).sum(1, keepdim=True)
        grown = (given * (given.abs().sum(1, keepdim=True) / left)).where(finite, 0.0)
        untouched = finite.all(1, keepdim=True) | ~sound.unsqueeze(1)  # to the bit, where none is missing
        weights = torch.where(untouched, given, grown)
        return units.where(finite, 0.0), weights, sound

    def _combined(self, values: Tensor, weights: Tensor, sound: Tensor | None) -> Scores:
        total = self.rule(values, weights, list(self.members))
        return total if sound is None else total.where(sound, math.nan)

    def _check_settings(self) -> None:
        check_combination(self.weights, self.rule, self.gradient, self.calibration)
        strange = sorted(self.required - set(self.members))
        if strange:
            raise ValueError(f"required names {strange[0]!r}, which is no member; members are {', '.join(self.members)}")
        if self.calibration is None:
            if self.clip is not None or self.required:
                what = "clip" if self.clip is not None else "required"
                raise ValueError(f"{what} is about calibrated scores; give a calibration with it")
            return
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if self.clip is not None and self.calibration.unit == "quantile":
            what = f"clip is in standard deviations, got {self.clip} with unit 'quantile', whose scores are shares from 0 to 1"
            raise ValueError(f"{what}; leave clip out, or calibrate with unit 'z' or 'within'")
        for name, model in {**{name: model for name, (model, _) in self.members.items()}, **self.watched}.items():
            known = self.calibration.members.get(name)
            if known is not None and known.spec not in ("", model.name):
                raise ValueError(
                    f"the calibration of {name!r} was measured with the reward model {known.spec!r}, but {model.name!r} is given"
                )


def check_combination(weights: Mapping[str, float], rule: Rule, gradient: GradientRule | None, calibration: Calibration | None) -> None:
    """Raises ValueError where these weights, rules and calibration do not go together; to be asked before models are loaded."""
    check_rule(rule, weights)
    if gradient is not None:
        check_gradient_rule(gradient, weights)
        if not isinstance(rule, WeightedSum):
            what = f"gradient {gradient.name!r} would replace the gradient of rule {rule.name!r}"
            raise ValueError(f"{what}; take one of the two, the gradient rule with rule 'weighted'")
    if calibration is None and rule.calibrated:
        raise ValueError(
            f"rule {rule.name!r} compares the members with one another, so it needs a calibration: in native units the one with the lowest "
            "offset or the largest scale would decide alone. Make one with diffalign.rewards.calibrate or `diffalign calibrate`; if the "
            "members do share a unit, say so with Calibration.identity(names)"
        )
    missing = [] if calibration is None else [name for name in weights if name not in calibration.members]
    if missing:
        raise ValueError(f"the calibration does not know the reward {missing[0]!r}; it knows {', '.join(calibration.members)}")


def _keeping(kept: Tensor) -> Any:
    """A hook that lets the gradients of these samples pass and makes the others zero."""
    return lambda gradient: torch.where(kept.view(-1, *[1] * (gradient.dim() - 1)), gradient, 0.0)


def _scores(name: str, model: RewardModel, images: Pictures, prompts: Sequence[str]) -> Scores:
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
