"""`diffalign score --audit`: how each reward answers to changes of the pictures that say little about their prompts."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.files import whole_file, write_json

MOST_IMAGES = 200
"""Every image is scored once for each change; more than this sharpens no interval that matters."""


def write_audits(out: Path, models: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path, device: str, batch: int) -> str:
    """Writes audit.csv, audit.json and audit.png into `out`; returns the table.

    rows: of the results; the first MOST_IMAGES that every reward scored. Raises ValueError where an audit cannot be made.
    """
    from PIL import Image

    from diffalign.reports.plots import audit_plot
    from diffalign.reward_models.audit import audit

    chosen = [row for row in rows if set(models) <= set(row["scores"])][:MOST_IMAGES]
    pictures = [Image.open(folder / row["file"]) for row in chosen]
    prompts = [row["prompt"] or "" for row in chosen]
    found = {
        name: audit(model, pictures, prompts, paraphrase=lambda prompt: f"a picture that shows {prompt}", batch=batch, device=device)
        for name, model in models.items()
    }
    lines = [{"reward": name, **dataclasses.asdict(row)} for name, each in found.items() for row in each]
    with whole_file(out / "audit.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    write_json(out / "audit.json", {"images": len(chosen), "rows": lines})
    with whole_file(out / "audit.png") as path:
        audit_plot(found).save(path, format="png")
    return table(found)


def table(found: Mapping[str, Sequence[Any]]) -> str:
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
