"""The methods, one file per paper. `METHODS` is the literal table of those that search over noise; nothing heavy is imported before use."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

METHODS = {
    "reno": ("diffalign.methods.reno", "ReNO"),
    "best-of-n": ("diffalign.methods.search", "BestOfN"),
}
"""Name on the command line -> (module, class). A class is built from a reward and its settings, and meets `types.NoiseMethod`."""

_PUBLIC = {
    "ReNO": "diffalign.methods.reno",
    "ReNOSettings": "diffalign.methods.reno",
    "BestOfN": "diffalign.methods.search",
    "BestOfNSettings": "diffalign.methods.search",
}

__all__ = ["METHODS", "BestOfN", "BestOfNSettings", "ReNO", "ReNOSettings", "find_method"]


def find_method(name: str) -> type:
    """The class of a noise method. Raises ValueError for an unknown name, naming the nearest."""
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(METHODS)}."
        raise ValueError(f"method {name!r} is unknown; {hint}")
    module, attribute = METHODS[name]
    return getattr(import_module(module), attribute)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
