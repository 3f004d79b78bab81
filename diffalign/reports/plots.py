"""Pictures for people: before beside after, a grid with the judge's verdicts, and rewards over evaluations.

Everything here takes finished results and returns a PIL image; nothing is computed or judged. Small images are enlarged by whole
factors with nearest neighbour, so that their real pixels are seen.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (255, 255, 255), (33, 37, 41), (120, 128, 136)
GREEN, RED = (26, 147, 84), (207, 52, 60)
LINE_COLORS = ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#868e96")
LEAST_VIEW = 256  # pixels; images with a smaller short side are enlarged to at least this for viewing
BADGE_SUPERSAMPLING = 4
MOST_BINS, LONE_BINS = 40, 31
FEW_SCORES = 60  # shown one by one as well


@dataclass(frozen=True)
class Pair:
    """One prompt's images and whether the judge found each correct."""

    prompt: str
    before: Image.Image
    after: Image.Image
    before_correct: bool
    after_correct: bool


def enlarge(image: Image.Image, least: int = LEAST_VIEW) -> Image.Image:
    """The image scaled by the smallest whole factor that brings its short side to `least` pixels."""
    factor = -(-least // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) if factor > 1 else image


def strip(before: Image.Image, after: Image.Image, labels: tuple[str, str] = ("before", "after")) -> Image.Image:
    """The two images side by side, each under its label."""
    left, right = enlarge(before.convert("RGB")), enlarge(after.convert("RGB"))
    size = max(left.height // 18, 14)
    pad, header = size // 2 + 2, 2 * size
    picture = Image.new("RGB", (left.width + right.width + 3 * pad, max(left.height, right.height) + header + pad), PAPER)
    draw = ImageDraw.Draw(picture)
    x = pad
    for image, label in ((left, labels[0]), (right, labels[1])):
        draw.text((x, header / 2), _fit(label, _font(size), image.width), fill=INK, font=_font(size), anchor="lm")
        picture.paste(image, (x, header))
        x += image.width + pad
    return picture


def grid(pairs: Sequence[Pair], columns: int = 3, side: int = 192) -> Image.Image:
    """Prompts with their before and after images and a tick or cross on each: the README's picture. `side`: an image's edge in pixels."""
    if not pairs:
        raise ValueError("grid needs at least one pair of images; got none")
    columns = min(columns, len(pairs))
    font, small = _font(side // 12), _font(side // 14)
    pad, caption, footer = side // 12, side // 5, side // 8
    cell_width, cell_height = 2 * side + pad // 2, caption + side + footer
    rows = -(-len(pairs) // columns)
    picture = Image.new("RGB", (columns * cell_width + (columns + 1) * 2 * pad, rows * (cell_height + pad) + 2 * pad), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, pair in enumerate(pairs):
        x = 2 * pad + (i % columns) * (cell_width + 2 * pad)
        y = pad + (i // columns) * (cell_height + pad)
        draw.text((x, y + caption / 2), _fit(pair.prompt, font, cell_width), fill=INK, font=font, anchor="lm")
        for k, (image, correct, label) in enumerate(
            ((pair.before, pair.before_correct, "before"), (pair.after, pair.after_correct, "after"))
        ):
            left, top = x + k * (side + pad // 2), y + caption
            picture.paste(image.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (left, top))
            badge = _badge(correct, side // 6)
            picture.paste(badge, (left + side - badge.width - 5, top + 5), badge)
            draw.text((left, top + side + footer / 2), label, fill=FAINT, font=small, anchor="lm")
    return picture


def rewards_plot(sample: Mapping[str, Any]) -> Image.Image:
    """Every reward of one sample over its evaluations, one panel each since their scales differ; the returned image is marked.

    `sample` is what `Trace.sample(i)` gives: "rewards" maps a name to one score per evaluation, "best" is the returned evaluation. Where
    present, "settings" tells which rewards were only watched, and "panel" holds curves as `panel_plot` draws them, which come last.
    """
    # Imported here, and without pyplot: it is slow to import, and only its figures, not its global state, are wanted.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rewards: Mapping[str, Sequence[float]] = sample["rewards"]
    names = sorted(rewards, key=lambda name: name != "total")  # the optimised sum first
    watched = sample.get("settings", {}).get("watch") or ()
    rows = len(names) + ("panel" in sample)
    figure = Figure(figsize=(6.4, 0.7 + 1.5 * rows), dpi=110, layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, 1, i + 1)
        scores = [math.nan if score is None else score for score in rewards[name]]
        axes.plot(scores, color=LINE_COLORS[i % len(LINE_COLORS)], linewidth=1.6, marker=".", markersize=4)
        axes.plot([sample["best"]], [scores[sample["best"]]], "o", markersize=8, markerfacecolor="none", markeredgecolor="#212529")
        axes.set_ylabel(f"{name}\n(watched)" if name in watched else name, parse_math=False, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8, labelbottom=i == rows - 1)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if "panel" in sample:
        axes = figure.add_subplot(rows, 1, rows)
        _draw_panel(axes, sample["panel"])
        axes.set_ylabel("gain of the best\n(std. deviations)", fontsize=9)
    axes.set_xlabel("evaluation (0 is the image before; the ring is the image returned)", fontsize=9)
    return _drawn(figure, FigureCanvasAgg)


def panel_plot(panels: Mapping[str, Mapping[str, Any]], columns: int = 3) -> Image.Image:
    """Gains of the optimised and of each watched reward over evaluations, one panel for each name; the gap between them is shaded.

    panels: name -> "optimised", "watched" (name -> series), "gap" and "verdict", as `diffalign.rewards.panel.Panel.to_json` gives them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        _draw_panel(axes, curves)
        axes.set_title(name, fontsize=10, parse_math=False)
        axes.set_xlabel("evaluation", fontsize=9)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("gain over the first image (std. deviations)", fontsize=9)
    return _drawn(figure, FigureCanvasAgg)


def _draw_panel(axes: Any, curves: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    optimised = curves["optimised"]
    held_out = [top - gap for top, gap in zip(optimised, curves["gap"], strict=True)]
    axes.fill_between(range(len(optimised)), held_out, optimised, color="#868e96", alpha=0.15, linewidth=0)
    axes.plot(optimised, color="#212529", linewidth=2, label="optimised")
    for i, (name, series) in enumerate(curves["watched"].items()):
        axes.plot(series, color=LINE_COLORS[i % len(LINE_COLORS)], linewidth=1.4, linestyle="--", label=f"{name} (watched)")
    axes.axhline(0, color="#212529", linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def distributions(scores: Mapping[str, Sequence[float]], units: Mapping[str, str]) -> Image.Image:
    """A histogram of every reward's scores, one panel each since their scales differ; median and quartiles marked, few scores each.

    scores: reward -> finite scores, of any number, also none. units: reward -> what its axis counts.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.8, 1.95 * max(len(scores), 1)), dpi=110, layout="constrained")
    for i, (name, values) in enumerate(scores.items()):
        axes = figure.add_subplot(len(scores), 1, i + 1)
        if values:
            low, lower, middle, upper, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
            bins = min(max(round(math.sqrt(len(values))), MOST_BINS // 4), MOST_BINS)
            margin = 0.0 if high > low else max(abs(low) * 0.01, 1e-6)  # all alike: one bar in the middle
            axes.hist(values, bins=bins if high > low else LONE_BINS, range=(low - margin, high + margin), color=LINE_COLORS[0], alpha=0.35)
            if len(values) <= FEW_SCORES:
                axes.plot(values, [0.0] * len(values), "|", color=LINE_COLORS[0], markersize=12, clip_on=False)
            axes.axvspan(lower, upper, color="#212529", alpha=0.08, linewidth=0)
            axes.axvline(middle, color="#212529", linewidth=1.4)
            axes.set_title(f"median {middle:.4g}, n {len(values)}", loc="right", fontsize=8, color="#6c757d", parse_math=False)
            axes.ticklabel_format(axis="x", useOffset=False)
        else:
            axes.text(0.5, 0.5, "no scores", transform=axes.transAxes, ha="center", va="center", fontsize=9, color="#6c757d")
            axes.set_xticks([])
        axes.set_title(_cut(name, 60), loc="left", fontsize=9, parse_math=False)
        axes.set_ylabel("images", fontsize=8)
        axes.set_xlabel(_cut(units[name], 100), fontsize=8, parse_math=False)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return _drawn(figure, FigureCanvasAgg)


def audit_plot(audits: Mapping[str, Sequence[Any]]) -> Image.Image:
    """How rewards answer to changes: a row for each change, a point with its interval for each reward, in standard deviations.

    audits: reward -> rows of reward_models.audit, the same changes in the same order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    changes = [f"{row.kind} {row.amount}" for row in next(iter(audits.values()))]
    figure = Figure(figsize=(7.6, 1.0 + (0.22 + 0.1 * len(audits)) * len(changes)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, rows) in enumerate(audits.items()):
        places = [k + (i + 0.5) / len(audits) * 0.7 - 0.35 for k in range(len(rows))]
        errors = [[row.effect - row.low for row in rows], [row.high - row.effect for row in rows]]
        color = LINE_COLORS[i % len(LINE_COLORS)]
        axes.errorbar([row.effect for row in rows], places, xerr=errors, fmt="o", color=color, markersize=4, linewidth=1.2, label=name)
    axes.axvline(0, color="#212529", linewidth=1)
    axes.set_yticks(range(len(changes)), changes, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("effect, in standard deviations of the unchanged images' scores", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, axis="x")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.08), ncol=4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _drawn(figure, FigureCanvasAgg)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def _drawn(figure: Any, canvas: Any) -> Image.Image:
    buffer = io.BytesIO()
    canvas(figure).print_png(buffer)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _fit(text: str, font: ImageFont.ImageFont, width: float) -> str:
    """The text, cut with "..." where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


@cache
def _badge(correct: bool, size: int) -> Image.Image:
    """A white tick on green or a white cross on red, drawn large and reduced so that its edges are smooth."""
    large = size * BADGE_SUPERSAMPLING
    badge = Image.new("RGBA", (large, large), (0, 0, 0, 0))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, large - 1, large - 1), fill=(*(GREEN if correct else RED), 255), outline=(255, 255, 255, 255), width=large // 16)
    strokes = [((0.27, 0.53), (0.44, 0.70), (0.74, 0.34))] if correct else [((0.32, 0.32), (0.68, 0.68)), ((0.68, 0.32), (0.32, 0.68))]
    for stroke in strokes:
        draw.line([(x * large, y * large) for x, y in stroke], fill=(255, 255, 255, 255), width=large // 9, joint="curve")
    return badge.resize((size, size), Image.Resampling.LANCZOS)
