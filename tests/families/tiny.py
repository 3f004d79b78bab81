"""The rows that the family tests run over: for each preset a tiny *complete* pipeline of the real classes, random weights, real scheduler.

A new family adds a file tiny_<family>.py with builders, and its rows to ROWS. What a row owes is in test_contract.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from diffalign.pipelines.presets import FAMILIES, PRESETS
from tests.families import tiny_flux, tiny_pixart, tiny_sana, tiny_sd, tiny_sd3, tiny_sdxl, tiny_wan


@dataclass(frozen=True)
class Row:
    """A preset in miniature."""

    preset: str
    """Its name in diffalign.pipelines.presets."""
    build: Callable[..., Any]
    """build(cls, dtype) -> the pipeline as that class (aligned, or stock), with the same weights every time."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Stock arguments for a quick call the way the preset is used: steps, guidance, size."""
    texts: Mapping[str, Any] = field(default_factory=dict)
    """Further stock arguments, which only the text encoders need: negative_prompt, where guidance depends on it."""
    guided: bool = True
    """Whether `call` has two branches."""
    other_size: Mapping[str, int] = field(default_factory=dict)
    """Height and width (num_frames) that are not the model's own."""
    exact: Mapping[str, Any] = field(default_factory=dict)
    """Stock arguments without which every size is possible, since the stock call works at one of its own and resizes."""
    first_order: bool = True
    """Whether DDIM(eta=0) is the stock scheduler's own rule: Euler and DDIM yes, multistep solvers and ancestral ones no."""
    atol: float = 2e-5
    """How far a batch may lie from its singles, and DDIM(eta=0) from the stock loop, in units of the latents."""
    reload_atol: float = 1e-6
    """How far an image may lie from the one that the same weights make after they were read from a file, where 1 is white."""
    reload: Mapping[str, Any] = field(default_factory=dict)
    """What stock from_pretrained must be told beside the folder that was saved."""
    name: str = ""
    """Of the row; the preset's where it has no other."""

    def whole_call(self, prompts: int = 2) -> dict[str, Any]:
        """`call` and `texts` for so many prompts, each with a negative prompt of its own where there is one."""
        negative = self.texts.get("negative_prompt")
        return {**self.call, **self.texts, **({} if negative is None else {"negative_prompt": [negative] * prompts})}

    def aligned_class(self) -> Any:
        """The class of ours that the preset's family has."""
        family = FAMILIES[PRESETS[self.preset].family]
        return getattr(importlib.import_module(family.module), family.aligned_class)

    def pipeline(self, cls: type, dtype: torch.dtype = torch.float32) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = self.build(cls, dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


FILES = (tiny_sd, tiny_sdxl, tiny_sd3, tiny_flux, tiny_pixart, tiny_sana, tiny_wan)
ROWS: dict[str, Row] = {row.name or row.preset: row for file in FILES for row in (Row(**row) for row in file.ROWS)}
