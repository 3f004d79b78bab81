"""Rows of a network's arguments and results: leaving samples out of a call, and putting predictions where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WITHOUT_ROWS = frozenset({"img_ids", "txt_ids", "image_rotary_emb", "rope_interpolation_scale", "skip_layers"})
"""Arguments that have no batch axis, whatever their first size happens to be."""


def take(value: Any, rows: Tensor | slice, total: int, name: str = "") -> Any:
    """The rows of every tensor in `value` whose first size is `total`, the batch; the rest as it is. Looks into dicts, lists and tuples."""
    if name in WITHOUT_ROWS:
        return value
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == total else value
    if isinstance(value, Mapping):
        return {key: take(each, rows, total, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take(each, rows, total) for each in value)
    return value


def network_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The latents that the network is given."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["sample"]


def prediction_in(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """A copy of the network's output that holds another prediction."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return type(output)(**{**output, "sample": prediction})


@dataclass(frozen=True)
class Parts:
    """Which of `samples` samples have their conditional (c) and unconditional (u) branch evaluated."""

    samples: int
    c: tuple[int, ...]
    u: tuple[int, ...]

    @classmethod
    def of(cls, plan: Sequence[str], samples: int) -> Parts:
        c = tuple(row for row, branch in enumerate(plan) if branch != "unconditional")
        u = tuple(row for row, branch in enumerate(plan) if branch != "conditional")
        return cls(samples, c, u)

    @property
    def whole(self) -> bool:
        return len(self.c) == len(self.u) == self.samples

    def rows(self, conditional: slice, unconditional: slice, conditional_first: bool, device: torch.device) -> Tensor | slice:
        """Their rows in the doubled batch; a slice, hence no copy, where that is one half."""
        if not self.u:
            return conditional
        if not self.c:
            return unconditional
        c, u = ([rows.start + row for row in part] for rows, part in ((conditional, self.c), (unconditional, self.u)))
        return torch.tensor([*c, *u] if conditional_first else [*u, *c], device=device)

    def filled(self, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Both for every sample, one standing in for the other where that was not evaluated."""
        if self.whole:
            return c, u
        full_c, full_u = (each.new_zeros((self.samples, *each.shape[1:])) for each in (c, u))
        for full, fallback, rows in ((full_c, u, self.u), (full_u, c, self.c)):
            full[list(rows)] = fallback
        full_c[list(self.c)], full_u[list(self.u)] = c, u
        return full_c, full_u
