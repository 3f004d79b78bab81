"""Rules that make one ascent direction of several rewards' image gradients, sample by sample.

g_k is the gradient of member k's score with respect to the image, d its entries; weights as in
combine.py. "b k d": b samples, k members.

    equal    sum_k w_k c g_k / rms(g_k),   c = sum_k p_k rms(g_k)
             R0 / Reward-Instruct (2503.13070), figure 8: each reward's gradient divided by its own
             norm. c restores the size that a sum would have, so that one member alone is changed
             in nothing.
    PCGrad   h_i = w_i g_i; for every other j: if <h_i, w_j g_j> < 0, h_i loses its part along g_j;
             sum_i h_i                                             Yu et al. (2001.06782)
    MGDA     sum_k a_k z_k,  a = argmin over the simplex of |sum_k a_k z_k|^2,  z_k = sign(w_k) g_k
                                                                   Desideri (2012)

The direction of MGDA lowers no member to first order, and vanishes where no direction raises all of
them. PCGrad takes the j in random order; ours is i + 1, i + 2, ... around the circle, since a search
must be repeatable. MGDA's minimum is found exactly, by looking at every face of the simplex, instead
of by Frank-Wolfe steps (Sener & Koltun, 1810.04650); that serves up to ten members. Both can look at
equalised gradients, without which the member with the shortest gradient decides MGDA, and the one
with the longest PCGrad.

`with_gradient` gives a reward such a direction for its gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.rewards.combine import require_equal
from diffalign.rewards.names import GRADIENT_RULES, build

logger = logging.getLogger(__name__)

Gradients = Float[Tensor, "b k d"]
MOST_FACES = 10  # members for MGDA: 2^10 faces
NEGLIGIBLE = 1e-12  # of the mean squared gradient: keeps the equations of degenerate faces solvable


def rms(gradients: Gradients) -> Float[Tensor, "b k"]:
    """The root mean square entry of every gradient."""
    return gradients.square().mean(2).sqrt()


def equalise(gradients: Gradients, weights: Float[Tensor, "b k"]) -> Gradients:
    """Every gradient scaled to the RMS c, the weighted mean of the members' own. A gradient of zero stays zero."""
    size = rms(gradients)
    share = weights.abs() / weights.abs().sum(1, keepdim=True)
    common = (share * size).sum(1, keepdim=True)
    return gradients * torch.where(size > 0, common / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0).unsqueeze(2)


def weighted(gradients: Gradients, weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
    """sum_k w_k g_k."""
    return (weights.unsqueeze(2) * gradients).sum(1)


def pcgrad(gradients: Gradients, weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
    """The sum of the weighted gradients, each without what runs against another one."""
    own = weights.unsqueeze(2) * gradients
    k = own.shape[1]
    squares = own.square().sum(2)
    total = torch.zeros_like(own[:, 0])
    for i in range(k):
        h = own[:, i]
        for step in range(1, k):
            j = (i + step) % k
            against = (h * own[:, j]).sum(1).clamp_max(0) / squares[:, j].clamp_min(torch.finfo(own.dtype).tiny)
            h = h - against.unsqueeze(1) * own[:, j]
        total = total + h
    return total


def mgda_weights(gram: Float[Tensor, "b k k"], taking_part: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """a on the simplex, zero where taking_part is zero, that minimises a' G a, for the Gram matrix of each sample.

    On the face where only the members S are positive, the least a solves G_S a = m 1, sum a = 1. Of
    all faces whose solution lies inside the simplex, the best is the answer; corners always do. A
    member that takes no part makes its faces worthless.
    """
    b, k, _ = gram.shape
    if k > MOST_FACES:
        raise ValueError(f"MGDA takes at most {MOST_FACES} members, got {k}; use PCGrad or equal gradients")
    gram = gram.double()
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    gram = gram / size.view(b, 1, 1)
    best = torch.full((b,), torch.inf, dtype=torch.float64, device=gram.device)
    answer = torch.zeros(b, k, dtype=torch.float64, device=gram.device)
    one = torch.ones(1, dtype=torch.float64, device=gram.device)
    for face in range(1, 2**k):
        members = [i for i in range(k) if face >> i & 1]
        n = len(members)
        system = torch.zeros(b, n + 1, n + 1, dtype=torch.float64, device=gram.device)
        system[:, :n, :n] = gram[:, members][:, :, members] + NEGLIGIBLE * torch.eye(n, dtype=torch.float64, device=gram.device)
        system[:, n, :n] = system[:, :n, n] = 1
        right = torch.cat([torch.zeros(n, dtype=torch.float64, device=gram.device), one]).expand(b, n + 1).unsqueeze(2)
        solution, _ = torch.linalg.solve_ex(system, right)
        a = torch.zeros_like(answer)
        a[:, members] = solution[:, :n, 0]
        value = torch.einsum("bi,bij,bj->b", a, gram, a)
        inside = (a >= 0).all(1) & a.isfinite().all(1) & (taking_part[:, members] != 0).all(1)
        better = inside & (value < best)
        best = torch.where(better, value, best)
        answer = torch.where(better.unsqueeze(1), a, answer)
    return (answer / answer.sum(1, keepdim=True)).float()


def mgda(gradients: Gradients, weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
    """The shortest vector in the convex hull of the oriented gradients."""
    own = gradients * weights.sign().unsqueeze(2)
    a = mgda_weights(torch.einsum("bid,bjd->bij", own.double(), own.double()), weights)
    return weighted(own, a.to(own.dtype))


class _Directed(torch.autograd.Function):
    """Values as they are, whose gradient with respect to the images is the directions: no arithmetic touches a value."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, values: Tensor, directions: Tensor) -> Tensor:
        ctx.save_for_backward(directions)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (directions,) = ctx.saved_tensors
        return gradient.to(directions.dtype).view(-1, *[1] * (directions.dim() - 1)) * directions, None, None


def with_gradient(values: Float[Tensor, " b"], images: Float[Tensor, "b ..."], directions: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """The same values, to the bit, whose gradient with respect to sample i's image is directions[i] and nothing else.

    A sample whose direction holds a NaN or an infinity keeps its value and gets a gradient of zero,
    and a warning names it. Its neighbours are untouched, also where all samples share weights that
    are trained: there one NaN would spoil the step of the whole batch.
    """
    sound = directions.detach().flatten(1).isfinite().all(1)
    if not sound.all():
        broken = (~sound).nonzero().squeeze(1).tolist()
        logger.warning(
            "the combined gradient of sample %s of %d is not finite; it keeps its score and takes no step from the rewards",
            ", ".join(map(str, broken)), len(sound),
        )  # fmt: skip
    kept = torch.where(sound.view(-1, *[1] * (directions.dim() - 1)), directions.detach(), 0.0)
    return _Directed.apply(images, values.detach(), kept.to(images.dtype))


# ---- the rules as values -------------------------------------------------------------------------


@runtime_checkable
class GradientRule(Protocol):
    """A rule with its settings, from gradients "b k d" and weights "b k" to directions "b d"."""

    name: ClassVar[str]
    """What settings and the command line call it."""

    def __call__(self, gradients: Gradients, weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]: ...


@dataclass(frozen=True)
class EqualRMS:
    """The weighted sum of gradients of equal size."""

    name: ClassVar[str] = "equal"

    def __call__(self, gradients: Gradients, weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
        return weighted(equalise(gradients, weights), weights)


@dataclass(frozen=True)
class PCGrad:
    """Each gradient without what runs against another, summed."""

    name: ClassVar[str] = "pcgrad"
    equal: bool = True
    """Compare gradients of equal size; a weight is then a reward's share of the step. Paper: no."""

    def __call__(self, gradients: Gradients, weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
        return pcgrad(equalise(gradients, weights) if self.equal else gradients, weights)


@dataclass(frozen=True)
class MGDA:
    """The shortest vector of the gradients' hull. Weights give the sign only, so they must be equally large."""

    name: ClassVar[str] = "mgda"
    equal: bool = True
    """Compare gradients of equal size. Paper: no."""

    def __call__(self, gradients: Gradients, weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
        return mgda(equalise(gradients, weights) if self.equal else gradients, weights)


def find_gradient_rule(rule: str | Mapping[str, Any] | GradientRule | None) -> GradientRule | None:
    """The rule that is meant, by its name, its JSON form or itself; None for none. Raises as `find_rule` does."""
    if isinstance(rule, (str, Mapping)):
        return build(rule, GRADIENT_RULES, "gradient rule")
    if rule is None or (isinstance(rule, GradientRule) and not isinstance(rule, type)):
        return rule
    raise TypeError(f"gradient must be a name such as 'equal' or a rule such as PCGrad(), got {rule!r}")


def check_gradient_rule(rule: GradientRule, weights: Mapping[str, float]) -> None:
    """Raises ValueError where these members' weights make no sense under the rule."""
    if isinstance(rule, MGDA):
        require_equal("mgda", weights)
        if len(weights) > MOST_FACES:
            raise ValueError(f"MGDA takes at most {MOST_FACES} members, got {len(weights)}; use PCGrad or equal gradients")
