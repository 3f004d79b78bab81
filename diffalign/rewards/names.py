"""The names of the rules and their parameters, without torch: what a command line or a JSON file says, read and checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Named:
    """cls: the class a name stands for. parameter, default: its one number, if it has one. calibrated: does it need calibrated scores."""

    cls: str
    parameter: str | None = None
    default: float | None = None
    calibrated: bool = True


RULES: dict[str, Named] = {
    "weighted": Named("WeightedSum", calibrated=False),
    "worst-case": Named("WorstCase"),
    "soft-min": Named("SoftMin", "beta", 0.3),
    "uncertainty": Named("UncertaintyWeighted", "lam", 0.5),
    "geometric": Named("Geometric"),
}
GRADIENT_RULES: dict[str, Named] = {
    "equal": Named("EqualRMS", calibrated=False),
    "pcgrad": Named("PCGrad", calibrated=False),
    "mgda": Named("MGDA", calibrated=False),
}


def parse(text: str, table: Mapping[str, Named], kind: str) -> tuple[str, dict[str, float]]:
    """NAME or NAME=NUMBER as the name and its parameter. Raises ValueError for an unknown name or a number that is out of place.

    `kind` is what the error calls it: "rule", "gradient rule".
    """
    name, equals, number = text.partition("=")
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
    parameter = table[name].parameter
    if not equals:
        return name, {}
    if parameter is None:
        raise ValueError(f"the {kind} {name} takes no parameter; got {text!r}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        what = f"the {parameter} of {kind} {name} must be a finite number above 0"
        raise ValueError(f"{what}, as in {name}={table[name].default}; got {number!r}")
    return name, {parameter: value}


def settings(rule: Any) -> dict[str, Any]:
    """A rule as plain JSON data: its name and fields. `find` in combine.py and gradients.py make it again."""
    return {"name": rule.name, **vars(rule)}
