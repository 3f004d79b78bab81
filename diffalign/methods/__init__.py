"""The methods, one file per paper. table.py lists them; nothing heavy is imported before one of them is used."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.methods.checks import no_gradient
from diffalign.methods.table import METHODS, NOISE, Method, find_method, names

if TYPE_CHECKING:
    from diffalign.types import NoiseMethod, Reward

_CLASSES = {row.class_name: row.module for row in METHODS}

__all__ = ["METHODS", "Method", "build_method", "find_method", "names", *_CLASSES]


def build_method(name: str, reward: Reward, budget: int, seconds: float | None = None, policy: str | Path | None = None) -> NoiseMethod:
    """The search over noise of that name, at a budget of `budget` images of each sample, or of so many seconds instead.

    policy: the folder of what was trained for the model, of a method that uses such a thing; without one, the embedded model's.

    Raises ValueError where there is no such search, it needs a gradient that the reward does not have, cannot be bounded in seconds, or
    uses no policy.
    """
    row = find_method(name, NOISE)
    if row.needs_gradient and not reward.differentiable:
        raise ValueError(f"{no_gradient(reward)}, which {name} climbs; watch it instead, or use best-of-n")
    cls = row.load()
    make = getattr(cls, row.from_budget) if row.from_budget else cls
    if policy is not None and not row.needs_policy:
        raise ValueError(f"{name} uses no trained policy, got {policy}; leave it out")
    method = make(reward, budget=budget) if policy is None else cls(policy, reward, budget=budget)
    if seconds is None:
        return method
    if not row.by_seconds:
        raise ValueError(f"{name} makes what its budget says in one go and cannot stop after {seconds:g} seconds; give it a budget")
    return replace(method, seconds=seconds)


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
