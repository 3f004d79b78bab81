"""The methods, one file per paper. table.py lists them; nothing heavy is imported before one of them is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffalign.methods.checks import no_gradient
from diffalign.methods.table import METHODS, NOISE, Method, find_method, names

if TYPE_CHECKING:
    from diffalign.types import NoiseMethod, Reward

_CLASSES = {row.class_name: row.module for row in METHODS}

__all__ = ["METHODS", "Method", "build_method", "find_method", "names", *_CLASSES]


def build_method(name: str, reward: Reward, budget: int) -> NoiseMethod:
    """The search over noise of that name, at a budget of `budget` images of each sample.

    Raises ValueError where there is no such search, or it needs a gradient that the reward does not have.
    """
    row = find_method(name, NOISE)
    if row.needs_gradient and not reward.differentiable:
        raise ValueError(f"{no_gradient(reward)}, which {name} climbs; watch it instead, or use best-of-n")
    cls = row.load()
    make = getattr(cls, row.from_budget) if row.from_budget else cls
    return make(reward, budget=budget)


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
