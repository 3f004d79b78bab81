"""Rewards made comparable inside groups: what policy-gradient training and pair selection take.

Scores "n k": n samples, k rewards, higher is better. groups "n": whole numbers; samples with the
same number share a prompt and are compared with one another, and with nobody else. mean_g and std_g
(n - 1 in the denominator) are of one reward in one group; s_k is reward k's ordinary spread within
a prompt, s_k^2 = sum over groups of squares about mean_g / sum over groups of (n_g - 1).

    group-wise    A_k = (r_k - mean_g) / (sqrt(std_g^2 + (kappa s_k)^2) + 1e-4)
    GDPO          A = whiten(sum_k w_k A_k)             kappa = 0         NVlabs, 2601.05242
                  whiten(A) = (A - mean) / (std + 1e-4) over the batch
    CaPO          R_k(x_i) = 1 / (N - 1) sum over j != i in the group of
                             sigmoid(r_k(x_i) - r_k(x_j))                 CVPR 2025, 2502.02588

GRPO normalises the *sum* of rewards, so the one with the largest scale decides; GDPO normalises
each reward first. Worked: a group whose two samples differ in one reward and a group whose two
samples differ in two have advantages +-0.707 both under GRPO; GDPO gives the first +-0.548 and the
second +-1.095.

The noise floor kappa is ours, and 0 unless it is asked for. GDPO blows a reward that is nearly
constant in a group up to unit spread, be it pure noise. With kappa of 0.2 to 0.5 such a group falls
silent, while one of ordinary spread keeps 1 / sqrt(1 + kappa^2) of its advantage, the same for
every reward. That holds because s_k is the spread *within* prompts: the deviation over the whole
batch also holds how far prompts lie apart, and would cut rewards that differ much between prompts.
`noise` is the sharper tool where the repeatability of a reward has been measured: below it a group
says nothing about that reward.

All of them return finite numbers, zero (CaPO: one half) where a sample has no one to be compared
with, and raise ValueError for scores that are not finite: what to do about a broken score must be
decided before a whole group is measured against it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Group = Int[Tensor, " n"]
EPSILON = 1e-4  # GDPO's


def group_advantages(
    scores: Float[Tensor, "n k"],
    groups: Group,
    *,
    noise_floor: float = 0.0,
    spread: Float[Tensor, " k"] | None = None,
    noise: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, "n k"]:
    """A_k of every sample.

    noise_floor: kappa >= 0. The paper: 0; against rewards that are mostly noise 0.2 to 0.5 serve.
    spread: s_k, such as a calibration's `within`; None pools it from the groups given.
    noise: the standard deviation of scoring one image repeatedly; a reward whose std_g is below it
        gives its group no advantage. None: every difference counts.
    """
    if not noise_floor >= 0:
        raise ValueError(f"noise_floor must be at least 0, got {noise_floor}")
    scores = _checked(scores, groups).float()
    index, count = _numbered(groups)
    centred = scores - _group_mean(scores, index, count)[index]
    squares, freedom = _group_sum(centred**2, index, count), _sizes(index, count) - 1
    deviation = (squares / freedom.clamp_min(1)).sqrt()[index]
    if spread is None:
        spread = (squares.sum(0) / freedom.sum().clamp_min(1)).sqrt()
    advantages = centred / ((deviation**2 + (noise_floor * spread) ** 2).sqrt() + EPSILON)
    return advantages if noise is None else torch.where(deviation < noise, 0.0, advantages)


def whiten(advantages: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Mean 0 and standard deviation 1 over the batch. A batch of one is 0."""
    if len(advantages) < 2:
        return torch.zeros_like(advantages)
    return (advantages - advantages.mean()) / (advantages.std() + EPSILON)


def gdpo(
    scores: Float[Tensor, "n k"],
    weights: Float[Tensor, " k"],
    groups: Group,
    *,
    noise_floor: float = 0.0,
    spread: Float[Tensor, " k"] | None = None,
    noise: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, " n"]:
    """One advantage per sample, the paper's unless a floor is asked for; keywords as in `group_advantages`.

    Where a minimum is wanted instead of a sum, the rules of combine.py take `group_advantages` for scores.
    """
    each = group_advantages(scores, groups, noise_floor=noise_floor, spread=spread, noise=noise)
    return whiten(each @ weights.float())


def win_rates(scores: Float[Tensor, "n k"], groups: Group, temperature: float | Float[Tensor, " k"] = 1.0) -> Float[Tensor, "n k"]:
    """CaPO's calibrated reward in [0, 1]: how often each reward would prefer a sample to another of its group.

    temperature: divides score differences, so that the sigmoid matches votes; 1 suits rewards that
        were trained with Bradley-Terry's loss.
    """
    scores = _checked(scores, groups).float()
    rates = torch.full_like(scores, 0.5)
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        if len(members) > 1:
            own = scores[members]
            wins = torch.sigmoid((own[:, None] - own[None]) / temperature)
            rates[members] = (wins.sum(1) - 0.5) / (len(members) - 1)  # against itself each would win one half
    return rates


def _checked(scores: Tensor, groups: Tensor) -> Tensor:
    if scores.ndim != 2 or groups.shape != scores.shape[:1]:
        raise ValueError(f"scores must be 'n k' with one group number per row, got {tuple(scores.shape)} and {tuple(groups.shape)}")
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(f"scores[{row}, {column}] is {scores[row, column].item()}; leave such samples out before comparing a group")
    return scores


def _numbered(groups: Tensor) -> tuple[Tensor, int]:
    """The groups as 0, 1, 2, ... and how many there are."""
    names, index = groups.unique(return_inverse=True)
    return index, len(names)


def _sizes(index: Tensor, count: int) -> Tensor:
    return torch.bincount(index, minlength=count).unsqueeze(1)


def _group_sum(values: Tensor, index: Tensor, count: int) -> Tensor:
    return torch.zeros(count, values.shape[1], device=values.device, dtype=values.dtype).index_add_(0, index, values)


def _group_mean(values: Tensor, index: Tensor, count: int) -> Tensor:
    return _group_sum(values, index, count) / _sizes(index, count)
