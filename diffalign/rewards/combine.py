"""Rules that make one number of several rewards, sample by sample: pure functions, and a class for each.

Scores "b k": b samples, k members, in common units for every rule but the weighted sum (see
calibration.py). Weights "b k": a member of negative weight is one to be lowered, and a member of
weight 0 takes no part in that sample. With

    z_k = sign(w_k) score_k,    p_k = |w_k| / sum_j |w_j|,    mu = sum_k p_k z_k

    weighted sum          sum_k w_k score_k
    worst case   (WCO)    min_k z_k                             Coste et al., ICLR 2024 (2310.02743)
    soft minimum          -beta ln sum_k p_k exp(-z_k / beta)   beta -> 0: min; beta -> inf: mu
    uncertainty  (UWO)    mu - lambda sum_k p_k (z_k - mu)^2    Coste et al.; population variance,
                                                                as in their best-of-n
    geometric             sum_k p_k ln sigmoid(z_k)             ln of prod_k sigmoid(z_k)^p_k:
                                                                everything must be acceptable
    constrained           sum over free k of w_k score_k
                          + sum over floored j of |w_j| min(0, z_j - c_j)

To second order the soft minimum is mu - var / (2 beta), which is UWO with lambda = 1 / (2 beta).
UWO's gradient gives member k the weight p_k (1 - 2 lambda (z_k - mu)): one that exceeds the mean by
more than 1 / (2 lambda) is pushed *down*. WCO and UWO take the spread of the members for error, so
their members should estimate the same thing; between different goals it is a matter of taste.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.rewards.names import RULES, build

Stacked = Float[Tensor, "b k"]


def oriented(scores: Stacked, weights: Stacked) -> tuple[Stacked, Stacked]:
    """z and p of the docstring above: scores of which more is better, and weights that sum to 1 in every sample."""
    size = weights.abs()
    return scores * weights.sign(), size / size.sum(1, keepdim=True)


def weighted_sum(scores: Stacked, weights: Stacked) -> Float[Tensor, " b"]:
    """sum_k w_k score_k."""
    return (weights * scores).sum(1)


def worst_case(scores: Stacked, weights: Stacked) -> Float[Tensor, " b"]:
    """min_k z_k. Its gradient is that of the least member; between members that tie it is shared evenly."""
    z, _ = oriented(scores, weights)
    return torch.where(weights != 0, z, math.inf).amin(1)


def soft_min(scores: Stacked, weights: Stacked, beta: float) -> Float[Tensor, " b"]:
    """-beta ln sum_k p_k exp(-z_k / beta): a minimum that looks at every member within about beta of the least."""
    z, p = oriented(scores, weights)
    return -beta * torch.logsumexp(p.log() - z / beta, 1)


def uncertainty_weighted(scores: Stacked, weights: Stacked, lam: float) -> Float[Tensor, " b"]:
    """mu - lambda sum_k p_k (z_k - mu)^2: the mean, less a fine for disagreement."""
    z, p = oriented(scores, weights)
    mean = (p * z).sum(1, keepdim=True)
    return mean.squeeze(1) - lam * (p * (z - mean) ** 2).sum(1)


def geometric(scores: Stacked, weights: Stacked) -> Float[Tensor, " b"]:
    """sum_k p_k ln sigmoid(z_k), at most 0: the logarithm of the weighted geometric mean of sigmoids."""
    z, p = oriented(scores, weights)
    return (p * logsigmoid(z)).sum(1)


def constrained(scores: Stacked, weights: Stacked, floors: Float[Tensor, " k"]) -> Float[Tensor, " b"]:
    """The weighted sum of the members whose floor is -inf, and for every other a fine |w_j| (c_j - z_j) below its floor c_j."""
    z, _ = oriented(scores, weights)
    free = floors == -math.inf
    fines = weights.abs() * (z - torch.where(free, 0.0, floors)).clamp_max(0)
    return torch.where(free, weights * scores, fines).sum(1)


def soft_clip(scores: Tensor, limit: float) -> Tensor:
    """Scores unchanged within [-limit, limit], beyond it limit + tanh(excess): nothing passes limit + 1, the slope at limit is 1."""
    inside = scores.clamp(-limit, limit)
    return inside + torch.tanh(scores - inside)


# ---- the rules as values that can be named, compared and stored ----------------------------------


@runtime_checkable
class Rule(Protocol):
    """A rule with its settings. A rule of your own needs no row in names.py to be handed to a mix."""

    name: ClassVar[str]
    """What settings and the command line call it."""
    calibrated: ClassVar[bool]
    """Whether scores must be in common units for it to mean anything."""

    def __call__(self, scores: Stacked, weights: Stacked, names: Sequence[str]) -> Float[Tensor, " b"]:
        """Totals. names[k] is member k's name."""
        ...


@dataclass(frozen=True)
class WeightedSum:
    """The weighted sum, in whatever units the scores have."""

    name: ClassVar[str] = "weighted"
    calibrated: ClassVar[bool] = RULES[name].calibrated

    def __call__(self, scores: Stacked, weights: Stacked, names: Sequence[str]) -> Float[Tensor, " b"]:
        return weighted_sum(scores, weights)


@dataclass(frozen=True)
class WorstCase:
    """The least member (WCO). Weights give the sign only, so they must be equally large."""

    name: ClassVar[str] = "worst-case"
    calibrated: ClassVar[bool] = RULES[name].calibrated

    def __call__(self, scores: Stacked, weights: Stacked, names: Sequence[str]) -> Float[Tensor, " b"]:
        return worst_case(scores, weights)


@dataclass(frozen=True)
class SoftMin:
    """The soft minimum."""

    name: ClassVar[str] = "soft-min"
    calibrated: ClassVar[bool] = RULES[name].calibrated
    beta: float = RULES[name].default
    """> 0, in units of the scores; 0.1 to 0.3 is near the minimum and does not jump between members."""

    def __post_init__(self) -> None:
        _require_positive("beta", self.beta)

    def __call__(self, scores: Stacked, weights: Stacked, names: Sequence[str]) -> Float[Tensor, " b"]:
        return soft_min(scores, weights, self.beta)


@dataclass(frozen=True)
class UncertaintyWeighted:
    """The mean less the members' variance (UWO)."""

    name: ClassVar[str] = "uncertainty"
    calibrated: ClassVar[bool] = RULES[name].calibrated
    lam: float = RULES[name].default
    """lambda > 0, the weight of the variance. Coste et al.'s code: 0.5 for best-of-n, 0.1 for PPO."""

    def __post_init__(self) -> None:
        _require_positive("lam", self.lam)

    def __call__(self, scores: Stacked, weights: Stacked, names: Sequence[str]) -> Float[Tensor, " b"]:
        return uncertainty_weighted(scores, weights, self.lam)


@dataclass(frozen=True)
class Geometric:
    """The geometric mean of sigmoids, as a logarithm."""

    name: ClassVar[str] = "geometric"
    calibrated: ClassVar[bool] = RULES[name].calibrated

    def __call__(self, scores: Stacked, weights: Stacked, names: Sequence[str]) -> Float[Tensor, " b"]:
        return geometric(scores, weights)


@dataclass(frozen=True)
class Constrained:
    """Some members are raised, the others only kept above a floor; their weights are the prices of a unit below it."""

    floors: tuple[tuple[str, float], ...]
    """(name, c) of each member that has a floor, c in units of the oriented score; a mapping will do."""
    name: ClassVar[str] = "constrained"
    calibrated: ClassVar[bool] = RULES[name].calibrated

    def __post_init__(self) -> None:
        pairs = self.floors.items() if isinstance(self.floors, Mapping) else self.floors
        object.__setattr__(self, "floors", tuple((str(name), float(floor)) for name, floor in pairs))
        bad = [name for name, floor in self.floors if not math.isfinite(floor)]
        if not self.floors or bad:
            raise ValueError(f"floors must give at least one member a finite floor, got {self.floors}")

    def __call__(self, scores: Stacked, weights: Stacked, names: Sequence[str]) -> Float[Tensor, " b"]:
        floors = dict(self.floors)
        values = [floors.get(name, -math.inf) for name in names]
        return constrained(scores, weights, torch.tensor(values, device=scores.device))


def find_rule(rule: str | Mapping[str, Any] | Rule) -> Rule:
    """The rule that is meant: "soft-min", "soft-min=0.3", "constrained=a:0", the JSON form of `names.settings`, or itself.

    Raises ValueError for an unknown name or a bad parameter, TypeError for anything else.
    """
    if isinstance(rule, (str, Mapping)):
        return build(rule, RULES, "rule")
    if isinstance(rule, Rule) and not isinstance(rule, type):
        return rule
    raise TypeError(f"rule must be a name such as 'worst-case' or a rule such as SoftMin(0.3), got {rule!r}")


def check_rule(rule: Rule, weights: Mapping[str, float]) -> None:
    """Raises ValueError where these members' weights make no sense under the rule."""
    if isinstance(rule, WorstCase):
        require_equal("worst-case", weights)
    if isinstance(rule, Constrained):
        floored = [name for name, _ in rule.floors]
        strange = [name for name in floored if name not in weights]
        if strange:
            raise ValueError(f"floors names {strange[0]!r}, which is no member; members are {', '.join(weights)}")
        if not set(weights) - set(floored):
            raise ValueError("every member has a floor, so nothing is left to raise; give one of them no floor")


def require_equal(rule: str, weights: Mapping[str, float]) -> None:
    """Raises ValueError unless all weights are of one size: under this rule they would be ignored in silence."""
    if len({abs(weight) for weight in weights.values()}) > 1:
        raise ValueError(f"the rule {rule} reads only the signs of weights, so make them equally large; got {dict(weights)}")


def _require_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
