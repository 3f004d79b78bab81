"""Reward models: scores of images against prompts, higher is better. A literal table of names, and `load`.

    reward = reward_models.load("shapes-clip")
    scores = reward(images, prompts)            # images "b 3 h w" in [0, 1], b prompts -> float32 "b"

Nothing heavy is imported until `load` is called. How to add one: a file with a subclass of `base.RewardModel`, and a row in table.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.reward_models.sources import sources_of
from diffalign.reward_models.spec import Spec
from diffalign.reward_models.table import SPECS

if TYPE_CHECKING:
    import torch

    from diffalign.reward_models.base import RewardModel

__all__ = ["DTYPES", "NAMES", "SPECS", "Spec", "load", "spec_of"]

NAMES: tuple[str, ...] = tuple(SPECS)
DTYPES = ("float32", "float16", "bfloat16")


def spec_of(name: str) -> Spec:
    """The table's row. Raises ValueError for an unknown name, with the nearest known one."""
    if name not in SPECS:
        close = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.5)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown reward {name!r};{hint} rewards are {', '.join(NAMES)}")
    return SPECS[name]


def load(
    name: str,
    *,
    source: str | Path | Mapping[str, str | Path] | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    options: Mapping[str, str | int | float] | None = None,
) -> RewardModel:
    """A reward ready to call: frozen, in evaluation mode, on `device`.

    source: where its weights lie, instead of the table's place: a folder, a file, a Hub repository "org/name" or "org/name:file", an https
    address; or a mapping from parts (the keys of the row's `checkpoint`) to such places.
    dtype: of the backbone, "float32", "float16" or "bfloat16"; the row's own without one. Heads, products and scores stay float32.
    options: other values for some of the row's `options`, such as {"threshold": 0.3} for "mps".
    Raises ValueError (unknown name or option; a source for a reward without weights; a damaged file, which is named), FileNotFoundError
    (weights missing) and OSError (the Hub cannot be reached).
    """
    spec = _with_options(spec_of(name), options or {})
    places = sources_of(spec, source)
    chosen = str(spec.dtype if dtype is None else dtype).removeprefix("torch.")
    if chosen not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    import torch

    module, _, attribute = spec.target.partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    model = cls(spec, places) if places else cls(spec)
    return model.cast(getattr(torch, chosen)).to(device)


def _with_options(spec: Spec, options: Mapping[str, str | int | float]) -> Spec:
    """The row with other values of its own options. Raises ValueError for an option it does not have."""
    unknown = [key for key in options if key not in spec.options]
    if unknown:
        raise ValueError(f"reward {spec.name!r} has no option {unknown[0]!r}; it has {', '.join(spec.options) or 'none'}")
    return dataclasses.replace(spec, options={**spec.options, **options})
