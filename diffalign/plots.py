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

    `sample` is what `Trace.sample(i)` gives: "rewards" maps a name to one score per evaluation, "best" is the returned evaluation.
    """
    # Imported here, and without pyplot: it is slow to import, and only its figures, not its global state, are wanted.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rewards: Mapping[str, Sequence[float]] = sample["rewards"]
    names = sorted(rewards, key=lambda name: name != "total")  # the optimised sum first
    figure = Figure(figsize=(6.4, 0.7 + 1.5 * len(names)), dpi=110, layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, i + 1)
        scores = [math.nan if score is None else score for score in rewards[name]]
        axes.plot(scores, color=LINE_COLORS[i % len(LINE_COLORS)], linewidth=1.6, marker=".", markersize=4)
        axes.plot([sample["best"]], [scores[sample["best"]]], "o", markersize=8, markerfacecolor="none", markeredgecolor="#212529")
        axes.set_ylabel(name, parse_math=False, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8, labelbottom=i == len(names) - 1)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    axes.set_xlabel("evaluation (0 is the image before; the ring is the image returned)", fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
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
