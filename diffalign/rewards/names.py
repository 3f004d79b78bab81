"""The rules by name, in two literal tables, without torch: what a command line or a JSON file says.

A rule is a pure function, a class with its settings, and a row here; names, defaults and what needs a
calibration are read from the row by everybody: the classes, `find_rule`, the package's lazy imports,
the command line. Written as NAME or NAME=VALUE:

    weighted    soft-min=0.1    uncertainty    constrained=shapes-aesthetic:0,shapes-clip:-0.5
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Named:
    """What a rule's name stands for."""

    target: str
    """"module:Class" that implements it, the module inside diffalign.rewards."""
    parameter: str | None = None
    """The one field that may follow the name; None: the rule takes none."""
    default: float | None = None
    """That field where the name stands alone; None: it must be given."""
    floors: bool = False
    """Whether the field is NAME:NUMBER for some members instead of one positive number."""
    calibrated: bool = False
    """Whether scores must be in common units for the rule to mean anything."""


RULES: dict[str, Named] = {
    "weighted": Named("combine:WeightedSum"),
    "worst-case": Named("combine:WorstCase", calibrated=True),
    "soft-min": Named("combine:SoftMin", "beta", 0.3, calibrated=True),
    "uncertainty": Named("combine:UncertaintyWeighted", "lam", 0.5, calibrated=True),
    "geometric": Named("combine:Geometric", calibrated=True),
    "constrained": Named("combine:Constrained", "floors", floors=True, calibrated=True),
}
GRADIENT_RULES: dict[str, Named] = {
    "equal": Named("gradients:EqualRMS"),
    "pcgrad": Named("gradients:PCGrad"),
    "mgda": Named("gradients:MGDA"),
}


def parse(text: str, table: Mapping[str, Named], kind: str) -> tuple[str, dict[str, Any]]:
    """NAME or NAME=VALUE as the name and its field.

    kind: what an error calls it, "rule" or "gradient rule".
    Raises ValueError for an unknown name, and for a value that is missing, out of place or no number.
    """
    name, equals, value = text.partition("=")
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
    row = table[name]
    if row.parameter is None and equals:
        raise ValueError(f"the {kind} {name} takes no parameter; got {text!r}")
    if row.floors:
        return name, {row.parameter: _floors(name, value, kind)}
    if not equals:
        return name, {}
    number = _number(value)
    if not number > 0:
        what = f"the {row.parameter} of {kind} {name} must be a finite number above 0"
        raise ValueError(f"{what}, as in {name}={row.default}; got {value!r}")
    return name, {row.parameter: number}


def forms(table: Mapping[str, Named]) -> str:
    """What may be written, for a help text: every name, with the value that its field has or an example."""
    values = {name: "REWARD:FLOOR,..." if row.floors else row.default for name, row in table.items()}
    return ", ".join(name if value is None else f"{name}={value}" for name, value in values.items())


def build(given: str | Mapping[str, Any], table: Mapping[str, Named], kind: str) -> Any:
    """The rule that a text (see `parse`) or the JSON form of `settings` stands for. Raises ValueError for what is none."""
    if isinstance(given, str):
        name, parameters = parse(given, table, kind)
    else:
        name, parameters = given.get("name"), {key: value for key, value in given.items() if key != "name"}
        if name not in table:
            raise ValueError(f"{dict(given)} is no {kind} that we know; names are {', '.join(table)}")
    module, _, attribute = table[name].target.partition(":")
    cls = getattr(importlib.import_module(f"diffalign.rewards.{module}"), attribute)
    strange = sorted(set(parameters) - {field.name for field in fields(cls)})
    if strange:
        raise ValueError(f"{dict(given)} is no {kind} that we know: {name} has no {strange[0]!r}")
    return cls(**parameters)


def settings(rule: Any) -> dict[str, Any]:
    """A rule as plain JSON data: its name and fields. `build` makes it again."""
    return {"name": rule.name, **vars(rule)}


def _floors(name: str, text: str, kind: str) -> tuple[tuple[str, float], ...]:
    example = f"as in {name}=shapes-aesthetic:0,shapes-clip:-0.5"
    if not text:
        raise ValueError(f"the {kind} {name} needs floors, {example}; got none")
    floors: dict[str, float] = {}
    for entry in text.split(","):
        member, colon, number = entry.strip().partition(":")
        if not colon or not member or not math.isfinite(_number(number)):
            raise ValueError(f"a floor of {kind} {name} must be NAME:NUMBER, {example}; got {entry!r}")
        if member in floors:
            raise ValueError(f"the {kind} {name} got two floors for {member!r}; give it one")
        floors[member] = float(number)
    return tuple(floors.items())


def _number(text: str) -> float:
    """A finite number, else NaN, which every comparison refuses."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
