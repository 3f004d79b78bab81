"""Score against cost: what a method buys with evaluations of the network and with seconds, one line for each method over its runs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

AXES = {"nfe": "evaluations of the network per image", "seconds": "seconds per image"}
COLORS = ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#868e96")
EQUAL = 1.05  # costs within this ratio count as equal


@dataclass(frozen=True)
class Point:
    """One run. line: what it is a point of, such as the method. score: mean, low, high. cost: as `report.mean_cost`, None where unknown."""

    run: str
    line: str
    score: Mapping[str, float]
    cost: Mapping[str, float | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def equal_pairs(points: Sequence[Point], axis: str = "nfe") -> list[tuple[int, int]]:
    """Indices of runs of different lines that cost the same on an axis, as many evaluations or seconds, each pair once, in order."""
    known = [(i, cost) for i, point in enumerate(points) if (cost := point.cost.get(axis))]
    pairs = [(a, b) for n, a in enumerate(known) for b in known[n + 1 :]]
    return [(i, j) for (i, x), (j, y) in pairs if points[i].line != points[j].line and max(x, y) <= EQUAL * min(x, y)]


def plot(points: Sequence[Point], title: str) -> Image.Image | None:
    """A panel for each cost that all runs have, with 95 % intervals; None where there is none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes_names = [axis for axis in AXES if all(point.cost.get(axis) for point in points)]
    if not axes_names:
        return None
    figure = Figure(figsize=(5.2 * len(axes_names), 3.9), dpi=110, layout="constrained")
    for k, axis in enumerate(axes_names):
        axes = figure.add_subplot(1, len(axes_names), k + 1)
        for color, (line, members) in zip(COLORS * len(points), _lines(points, axis).items(), strict=False):
            x, y = [p.cost[axis] for p in members], [p.score["mean"] for p in members]
            spread = [[p.score["mean"] - p.score["low"] for p in members], [p.score["high"] - p.score["mean"] for p in members]]
            axes.errorbar(x, y, yerr=spread, label=line, color=color, marker="o", markersize=4, linewidth=1.6, capsize=2, elinewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(AXES[axis], fontsize=9)
        axes.set_ylabel(title, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if k == 0:
            axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _lines(points: Sequence[Point], axis: str) -> dict[str, list[Point]]:
    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.cost[axis] or 0.0):
        lines.setdefault(point.line, []).append(point)
    return {line: lines[line] for line in dict.fromkeys(p.line for p in points)}
