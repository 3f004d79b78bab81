"""Pareto selection: which samples of a group no other one beats, in how many layers, and how crowded they lie.

Scores "n k": n samples, k rewards, higher is better; groups "n": only samples of one group are
compared, None makes all one group.

    a dominates b           a_k >= b_k for every k and a_k > b_k for some k: samples that tie do not
                            remove each other                             Parrot, 2401.05675
    a epsilon-dominates b   the same of the boxes  -floor((top_k - score_k) / epsilon_k), top_k the
                            group's best; and inside one box, of the scores themselves
                                                                          after Laumanns et al., 2002
    front rank              0: dominated by none; r: dominated by none once ranks below r are removed
    crowding distance       sum over k of the distance between the neighbours on both sides in reward
                            k, over the front's extent in it              NSGA-II, Deb et al., 2002

Why epsilon: with k rewards that do not agree nearly everything is non-dominated. Of 24 independent
Gaussian samples 16, 33, 52, 68 per cent are, for k = 2, 3, 4, 5, and a filter that keeps two thirds
filters little. Where more than half is kept, raise epsilon (0.1 to 0.25 standard deviations of each
reward), or use ranks and crowding. Boxes, unlike "no worse by more than epsilon", are transitive:
never does a circle of samples remove one another until none is left.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Epsilon = float | Float[Tensor, " k"]
Group = Int[Tensor, " n"]


def dominates(scores: Float[Tensor, "n k"], epsilon: Epsilon = 0.0, groups: Group | None = None) -> Bool[Tensor, "n n"]:
    """[a, b]: whether sample a dominates sample b. epsilon >= 0, per reward or one for all, in units of the scores.

    Raises ValueError for scores that are not finite: a NaN would be dominated by nobody, and so be kept.
    """
    _check(scores, groups)
    epsilon = torch.as_tensor(epsilon, dtype=scores.dtype, device=scores.device).expand(scores.shape[1])
    if not (epsilon >= 0).all():
        raise ValueError(f"epsilon must be at least 0, got {epsilon.tolist()}")
    same = torch.ones(len(scores), len(scores), dtype=torch.bool, device=scores.device) if groups is None else groups[:, None] == groups
    top = torch.where(same[:, :, None], scores[None], -math.inf).amax(1) if len(scores) else scores
    boxes = torch.where(epsilon > 0, -torch.floor((top - scores) / epsilon.clamp_min(1e-30)), scores)
    one_box = (boxes[:, None] == boxes[None]).all(2)
    return same & torch.where(one_box, _beats(scores), _beats(boxes))


def pareto_mask(scores: Float[Tensor, "n k"], epsilon: Epsilon = 0.0, groups: Group | None = None) -> Bool[Tensor, " n"]:
    """Which samples nobody in their group dominates; at least one of each group."""
    return ~dominates(scores, epsilon, groups).any(0)


def front_ranks(scores: Float[Tensor, "n k"], epsilon: Epsilon = 0.0, groups: Group | None = None) -> Int[Tensor, " n"]:
    """The layer of every sample: 0 for the best front of its group, then what is best without it, and so on."""
    beaten_by = dominates(scores, epsilon, groups)
    ranks = torch.full((len(scores),), -1, dtype=torch.long, device=scores.device)
    rank = 0
    while (open_ := ranks < 0).any():
        ranks[open_ & ~(beaten_by & open_[:, None]).any(0)] = rank
        rank += 1
    return ranks


def crowding_distance(scores: Float[Tensor, "n k"], ranks: Int[Tensor, " n"], groups: Group | None = None) -> Float[Tensor, " n"]:
    """How alone each sample is on its front; inf for the only one at an end of it in some reward, or on it altogether.

    Unlike NSGA-II's listing, samples that tie in a reward are treated alike, whatever their order: each
    is the other's neighbour on both sides, at distance 0. A reward in which the whole front ties adds
    nothing.
    """
    _check(scores, groups)
    same = (ranks[:, None] == ranks) if groups is None else (ranks[:, None] == ranks) & (groups[:, None] == groups)
    others = (same & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device))[:, :, None]
    own, other = scores[:, None], scores[None]
    above = torch.where(others & (other >= own), other, math.inf).amin(1)
    below = torch.where(others & (other <= own), other, -math.inf).amax(1)
    within = same[:, :, None]
    extent = torch.where(within, other, -math.inf).amax(1) - torch.where(within, other, math.inf).amin(1)
    distance = torch.where(extent > 0, (above - below) / extent, 0.0).sum(1)
    return torch.where(others.any(1).squeeze(1), distance, math.inf)


def kept_fraction(mask: Bool[Tensor, " n"], groups: Group | None = None) -> float:
    """The mean over groups of the share that a mask keeps: above one half it selects little."""
    if groups is None:
        return float(mask.float().mean())
    return float(torch.stack([mask[groups == group].float().mean() for group in groups.unique()]).mean())


def _beats(scores: Float[Tensor, "n k"]) -> Bool[Tensor, "n n"]:
    """[a, b]: no worse in any column, and better in one."""
    own, other = scores[:, None], scores[None]
    return (own >= other).all(2) & (own > other).any(2)


def _check(scores: Tensor, groups: Tensor | None) -> None:
    if scores.ndim != 2 or (groups is not None and groups.shape != scores.shape[:1]):
        shapes = f"{tuple(scores.shape)}" + ("" if groups is None else f" and {tuple(groups.shape)}")
        raise ValueError(f"scores must be 'n k' with one group number per row, got {shapes}")
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(f"scores[{row}, {column}] is {scores[row, column].item()}; leave such samples out before comparing them")
