"""How rewards answer to changes of the pictures that say little about their prompts: a file, a plot, and a table for a terminal."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from diffalign.files import whole_file, write_json
from diffalign.reports.plots import audit_plot

MOST_IMAGES = 200
"""Every image is scored once for each change; more than this sharpens no interval that matters."""


class Row(Protocol):
    """A change and its effect in standard deviations, with a 95 % interval; a dataclass."""

    kind: str
    amount: str
    effect: float
    low: float
    high: float


def paraphrase(prompt: str) -> str:
    return f"a picture that shows {prompt}"


def write(out: Path, found: Mapping[str, Sequence[Row]], images: int) -> str:
    """Writes audit.csv, audit.json and audit.png into `out`; returns the table. found: reward -> its effects."""
    lines = [{"reward": name, **dataclasses.asdict(row)} for name, each in found.items() for row in each]
    with whole_file(out / "audit.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    write_json(out / "audit.json", {"images": images, "rows": lines})
    with whole_file(out / "audit.png") as path:
        audit_plot(found).save(path, format="png")
    return table(found)


def table(found: Mapping[str, Sequence[Row]]) -> str:
    """Effects in standard deviations of the unchanged scores, one column a reward; those whose interval holds 0 in brackets."""
    names = list(found)
    lines = ["effect of a change, in standard deviations of the scores (brackets: cannot be told from 0)"]
    width = max(len(name) for name in names)
    lines.append(f"{'':<24}" + "  ".join(f"{name:>{max(width, 9)}}" for name in names))
    for cells in zip(*found.values(), strict=True):
        label = f"{cells[0].kind} {cells[0].amount}"
        shown = [f"({cell.effect:+.2f})" if cell.low <= 0 <= cell.high else f"{cell.effect:+.2f}" for cell in cells]
        lines.append(f"{label:<24}" + "  ".join(f"{text:>{max(width, 9)}}" for text in shown))
    return "\n".join(lines)
