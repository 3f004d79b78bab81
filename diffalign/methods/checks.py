"""Range checks of settings. Each raises ValueError with the field's name, the value it got and what is allowed."""

from __future__ import annotations

import math
from typing import Any


def check_integer(name: str, value: Any, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}.")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: bool = False) -> None:
    """A finite number in [low, high]; with `above`, in (low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and (value > low if above else value >= low) and value <= high:
        return
    lower = f" {'above' if above else 'of at least'} {low:g}" if low > -math.inf else ""
    upper = f"{' and' if lower else ''} at most {high:g}" if high < math.inf else ""
    raise ValueError(f"{name} must be a finite number{lower}{upper}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}.")
