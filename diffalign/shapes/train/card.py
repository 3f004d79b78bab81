"""The card beside a model's weights, how it was made and how good it is: card.json for machines, README.md for people."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from diffalign.intervals import wilson
from diffalign.shapes.train.loop import LoopConfig

LICENCE = "Apache-2.0"


def interval(correct: int, total: int) -> dict[str, float]:
    """A share with its 95 % interval (Wilson's): {"value", "low", "high", "n"}. Raises ValueError where total is not positive."""
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"interval needs 0 <= correct <= total and total > 0; got {correct} of {total}")
    low, high = wilson(correct / total, total)
    return {"value": round(correct / total, 4), "low": round(low, 4), "high": round(high, 4), "n": total}


def describe_device(device: str) -> str:
    """A device in words: the GPU's name, or the processor and the threads used."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_card(
    folder: Path,
    *,
    title: str,
    command: str,
    config: LoopConfig,
    seconds: float,
    figures: Mapping[str, Any],
    notes: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> None:
    """Write card.json and README.md into the folder.

    figures: name -> number, or name -> {"value", "low", "high", ...} (95 % interval), nested in sections as one likes.
    notes: sentences for the reader. data: what was trained on (counts, splits). seconds: training time.
    """
    card = {
        "title": title,
        "licence": LICENCE,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "device": describe_device(device),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "seed": config.seed,
        "config": dataclasses.asdict(config),
        "data": dict(data or {}),
        "figures": dict(figures),
        "notes": list(notes),
    }
    replace_card(folder, card)


def replace_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write a card's two files as they should now be."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "card.json", json.dumps(card, indent=2) + "\n")
    _replace(folder / "README.md", _page(card))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _page(card: Mapping[str, Any]) -> str:
    made = [
        ("command", f"`{card['command']}`"),
        ("steps", card["config"]["steps"]),
        ("peak learning rate", card["config"]["lr"]),
        ("seed", card["seed"]),
        *((name, value) for name, value in card["data"].items()),
        ("device", card["device"]),
        ("time", f"{card['seconds'] / 60:.1f} min"),
        ("date", card["date"]),
        ("torch", card["torch"]),
    ]
    lines = ["---", f"license: {card['licence'].lower()}", "---", "", f"# {card['title']}", ""]
    lines += [f"{note}\n" for note in card["notes"]]
    lines += ["## How it was made", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in made), ""]
    lines += ["## Figures", "", "| figure | value | 95 % interval | n |", "|---|---|---|---|", *_rows(card["figures"]), ""]
    lines += [f"Licence: {card['licence']}. All data are drawn by this package's own renderer.", ""]
    return "\n".join(lines)


def _rows(figures: Mapping[str, Any], prefix: str = "") -> list[str]:
    rows = []
    for name, value in figures.items():
        label = f"{prefix}{name}".replace("_", " ")
        if not isinstance(value, Mapping):
            rows.append(f"| {label} | {_number(value)} | | |")
        elif "value" in value:
            bounds = f"{_number(value['low'])} to {_number(value['high'])}" if "low" in value else ""
            rows.append(f"| {label} | {_number(value['value'])} | {bounds} | {value.get('n', '')} |")
        else:
            rows += _rows(value, f"{label}: ")
    return rows


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
