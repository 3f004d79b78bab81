"""Checks of settings. Range checks raise ValueError with the field's name, the value it got and what is allowed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from diffalign.types import Reward

Class = TypeVar("Class", bound=type)


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


def formerly(**new: str) -> Callable[[Class], Class]:
    """Class decorator: an argument's old name is refused with a TypeError that says the new one, `old="new"`."""

    def decorate(cls: Class) -> Class:
        init = cls.__init__

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **named: Any) -> None:
            for old in new.keys() & named.keys():
                raise TypeError(f"{cls.__name__} has no {old}=, it is {new[old]}= now: write {new[old]}={named[old]!r}.")
            init(self, *args, **named)

        cls.__init__ = checked
        return cls

    return decorate


def no_gradient(reward: Reward) -> str:
    """The beginning of a sentence that refuses a reward without gradient: the members of a mix that lack it, by name."""
    members = getattr(reward, "members", None) or {}
    models = members.values() if hasattr(members, "values") else members
    flat = [repr(m.name) for m in models if not getattr(m, "differentiable", True) and hasattr(m, "name")]
    return f"reward {', '.join(flat) or repr(getattr(reward, 'name', type(reward).__name__))} has no gradient"
