"""A type checker for jaxtyping's import hook that looks at array shapes only.

A full one would answer every call with a wrong type before our own messages could, and those are what the tests of bad input read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jaxtyping import AbstractArray


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that arguments and result annotated with a jaxtyping shape must have it; jaxtyping makes the message."""
    signature = inspect.signature(function)
    hints = {name: parameter.annotation for name, parameter in signature.parameters.items() if _has_shape(parameter.annotation)}
    returned = signature.return_annotation if _has_shape(signature.return_annotation) else None

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        for name, hint in hints.items():
            if name in arguments:
                _require(arguments[name], hint)
        result = function(*args, **kwargs)
        if returned is not None:
            _require(result, returned)
        return result

    return checked


def _choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union; any other hint alone. The arguments of a Callable are not values to look at."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _has_shape(hint: Any) -> bool:
    return any(inspect.isclass(choice) and issubclass(choice, AbstractArray) for choice in _choices(hint))


def _require(value: Any, hint: Any) -> None:
    if not any(isinstance(value, choice) for choice in _choices(hint) if inspect.isclass(choice)):
        raise TypeError(f"expected {hint}, got {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}")
