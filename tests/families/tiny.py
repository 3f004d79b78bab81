"""The rows that the family tests run over: for each preset a tiny *complete* pipeline of the real classes, random weights, real scheduler.

A new family adds a file tiny_<family>.py with builders, and its rows to ROWS. What a row owes is in test_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.families import tiny_sd


@dataclass(frozen=True)
class Row:
    """A preset in miniature."""

    preset: str
    """Its name in diffalign.pipelines.presets."""
    build: Callable[..., Any]
    """build(cls, dtype) -> the pipeline as that class (aligned, or stock), with the same weights every time."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Stock arguments for a quick call the way the preset is used: steps, guidance, size."""
    guided: bool = True
    """Whether `call` has two branches."""
    other_size: Mapping[str, int] = field(default_factory=dict)
    """Height and width (num_frames) that are not the model's own."""
    first_order: bool = True
    """Whether DDIM(eta=0) is the stock scheduler's own rule: Euler and DDIM yes, multistep solvers and ancestral ones no."""
    atol: float = 2e-5
    """How far a batch may lie from its singles, and DDIM(eta=0) from the stock loop, in units of the latents."""

    def pipeline(self, cls: type, dtype: torch.dtype = torch.float32) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = self.build(cls, dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


ROWS: dict[str, Row] = {row.preset: row for row in (Row(**row) for row in (*tiny_sd.ROWS,))}
