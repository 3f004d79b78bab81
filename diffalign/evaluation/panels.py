"""Optimised rewards against watched ones in what `diffalign bench` and `diffalign generate` report.

Units are one standard deviation: of the calibration where the run has one, else of the run's own first images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.benchmarks.base import Record
from diffalign.files import whole_file
from diffalign.reports.plots import panel_plot
from diffalign.rewards.calibration import Calibration
from diffalign.rewards.panel import calibrated_scales, panel, scales_of_starts

PLOT = "panel.png"


def of_methods(mix: Mapping[str, float], watch: Sequence[str], calibration: Path | None, traces: Mapping[str, Sequence[Record]]) -> Record:
    """What a summary gains: "panel", curves of each method that searched, and "tables" with the one to print. Empty without --watch."""
    if not mix or not watch:
        return {}
    scales = _calibrated(calibration, [*mix, *watch])
    unit = "one standard deviation of the calibration"
    if not scales:
        scales = scales_of_starts(next(iter(traces.values())), [*mix, *watch])
        unit = "one standard deviation of the run's first images"
    searched = {name: samples for name, samples in traces.items() if name != "none"}
    found = {name: panel(samples, mix, watch, scales) for name, samples in searched.items()}
    found = {name: curves.to_json() for name, curves in found.items() if curves}
    if not found:
        return {}
    return {"panel": {"unit": unit, "methods": found}, "tables": [_table(found, unit)]}


def of_sample(mix: Mapping[str, float], watch: Sequence[str], calibration: Path | None, trace: Record) -> Record:
    """What one trace gains: "panel". Empty without --watch or --calibration, since one sample tells no standard deviation."""
    if not watch or not calibration or trace["method"] == "none":
        return {}
    found = panel([trace], mix, watch, _calibrated(calibration, [*mix, *watch]))
    return {"panel": found.to_json()} if found else {}


def draw(folder: Path, summary: Record) -> None:
    """The curves of a summary as FOLDER/panel.png, where it has any."""
    if "panel" in summary:
        with whole_file(folder / PLOT) as temporary:
            panel_plot(summary["panel"]["methods"]).save(temporary, format="PNG")


def _calibrated(calibration: Path | None, names: Sequence[str]) -> dict[str, float]:
    return calibrated_scales(Calibration.load(calibration), list(names)) if calibration else {}


def _table(found: Mapping[str, Record], unit: str) -> Record:
    watched = list(next(iter(found.values()))["watched"])
    rows = [
        [
            name,
            f"{curves['optimised'][-1]:+.2f}",
            *(f"{curves['watched'][reward][-1]:+.2f}" for reward in watched),
            f"{curves['gap'][-1]:+.2f}",
            f"{curves['peak']} of {len(curves['gap']) - 1}",
            curves["verdict"],
        ]
        for name, curves in found.items()
    ]
    return {
        "title": "Optimised against watched: gain over the first image",
        "head": ["method", "optimised", *watched, "gap", "watched peak", "verdict"],
        "rows": rows,
        "note": f"Unit: {unit}. The gap is optimised less the mean of the watched; the peak is an evaluation, curves are in {PLOT}.",
    }
