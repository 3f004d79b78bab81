"""The card beside tuned weights, made from the run: card.json for machines, README.md for people."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from diffalign.files import write_json, write_text
from diffalign.training.loop import Trained

PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "peft", "accelerate")


def describe(
    trained: Trained, *, title: str, command: str, base: str, usage: str, settings: Mapping[str, Any], data: Mapping[str, Any], device: Any
) -> dict[str, Any]:
    """Everything that a card holds, as JSON data. usage: Python that makes an image with the weights."""
    return {
        "title": title,
        "base": base,
        "command": command,
        "usage": usage,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "seed": settings.get("seed"),
        "settings": dict(settings),
        "data": dict(data),
        "steps": trained.step,
        "kept_step": trained.kept_step,
        "seconds": round(trained.seconds, 1),
        "last_step": {name: value if value == value else None for name, value in trained.figures.items()},
        "evaluations": [dict(each) for each in trained.evaluations],
    }


def device_name(device: Any) -> str:
    """In words that mean something on another machine."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def write(folder: Path, card: Mapping[str, Any]) -> None:
    """card.json and README.md, each whole or as it was."""
    write_json(folder / "card.json", card)
    write_text(folder / "README.md", page(card))


def page(card: Mapping[str, Any]) -> str:
    """The card as Markdown, with the front matter that the Hugging Face Hub reads."""
    facts = [
        ("base model", card["base"]),
        ("command", f"`{card['command']}`"),
        ("steps", f"{card['steps']}, of which the weights after {card['kept_step']} are kept"),
        ("seed", card["seed"]),
        *((f"data: {name}", value) for name, value in card["data"].items()),
        ("device", card["device"]),
        ("time", f"{card['seconds'] / 60:.1f} min"),
        ("date", card["date"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in card["versions"].items())),
    ]
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-image", "tags: [diffalign, lora]", "---", ""]
    lines += [f"# {card['title']}", "", "```python", card["usage"], "```", ""]
    lines += ["## How it was made", "", *_table(facts), "", "## Settings", "", *_table(_flat(card["settings"])), ""]
    if card["evaluations"]:
        names = list(card["evaluations"][0])
        rows = [[_number(each.get(name)) for name in names] for each in card["evaluations"]]
        lines += ["## Evaluations on what was held out", "", _row(names), _row(["---"] * len(names)), *map(_row, rows), ""]
    lines += ["## Figures of the last step", "", *_table(card["last_step"].items()), ""]
    lines += ["The licence of the base model holds for these weights too.", ""]
    return "\n".join(lines)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        rows += _flat(value, f"{prefix}{name}: ") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def _table(rows: Any) -> list[str]:
    return ["| | |", "|---|---|", *(_row([name.replace("_", " "), _number(value)]) for name, value in rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
