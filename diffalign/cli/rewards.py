"""`diffalign rewards`: the table of rewards, or all that is known of one. Nothing is loaded for it."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from diffalign import hub
from diffalign.cli.commands import RewardTable
from diffalign.reward_models import Spec

NARROWEST, WIDEST = 64, 120  # columns
LEGEND = (
    "gradient: whether it reaches the images. prompt: whether it changes the score. memory: of the weights. "
    "`diffalign rewards NAME` says all of one, `diffalign score FOLDER --reward NAME` scores images."
)


def run(options: RewardTable, command: str) -> int:
    known = hub.reward_specs()
    specs = {options.name: known[options.name]} if options.name else known
    if options.json:
        rows = [facts(spec) for spec in specs.values()]
        print(json.dumps(rows[0] if options.name else rows, indent=2, ensure_ascii=False))
        return 0
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    print(one(specs[options.name], width) if options.name else table(specs, width))
    return 0


def facts(spec: Spec) -> dict[str, object]:
    """A row as plain JSON data."""
    data = asdict(spec)
    return {**data, "range": list(spec.range), "checkpoint": dict(spec.checkpoint), "options": dict(spec.options)}


def table(specs: Mapping[str, Spec], width: int) -> str:
    """Every reward in a line of short facts and a paragraph of the others, folded at `width` columns."""
    rows = [("name", "usual scores", "gradient", "prompt", "memory")]
    rows += [(name, scores(spec), yes(spec.differentiable), yes(spec.needs_prompt), memory(spec)) for name, spec in specs.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_line(rows[0], widths), "-" * min(sum(widths) + 2 * (len(widths) - 1), width)]
    for row, spec in zip(rows[1:], specs.values(), strict=True):
        places = dict.fromkeys(map(short, spec.checkpoint.values()))
        weights = f" Weights: {'; '.join(places)}." if places else ""
        text = f"{spec.paper}. Unit: {spec.unit}.{weights} Licence: {spec.licence}."
        lines += [_line(row, widths), *_folded(text, width, "    ")]
    lines += ["", *_folded(LEGEND, width)]
    return "\n".join(lines)


def one(spec: Spec, width: int) -> str:
    """All facts of a reward, a line or a folded paragraph each."""
    named = {
        "paper": spec.paper,
        "licence": spec.licence,
        "usual scores": scores(spec),
        "unit": spec.unit,
        "gradient": "reaches the images" if spec.differentiable else "none: for best-of-n and reports, not for gradient methods",
        "prompt": "needed" if spec.needs_prompt else "changes nothing",
        "memory": f"{memory(spec)} of weights in {spec.dtype}" if spec.checkpoint else "no weights",
        **{f"weights, {part}" if len(spec.checkpoint) > 1 else "weights": place for part, place in spec.checkpoint.items()},
        **{name: str(value) for name, value in spec.options.items()},
        "class": spec.target,
    }
    indent = max(map(len, named)) + 2
    lines = [spec.name]
    for name, text in named.items():
        first, *others = textwrap.wrap(text, max(width - indent - 2, 20), break_long_words=False, break_on_hyphens=False)
        lines += [f"  {name:<{indent}}{first}", *(" " * (indent + 2) + other for other in others)]
    return "\n".join(lines)


def scores(spec: Spec) -> str:
    low, high = spec.range
    return f"{low:g} to {high:g}"


def short(place: str) -> str:
    """A long address by its host and its last part; the whole of it is what `diffalign rewards NAME` is for."""
    host, _, path = place.removeprefix("https://").partition("/")
    return f"{host}/.../{path.rpartition('/')[2].partition('#')[0]}" if place.startswith("https://") else place


def memory(spec: Spec) -> str:
    if not spec.memory:
        return "-"
    return f"{spec.memory:.1f} GB" if spec.memory >= 0.1 else f"{1000 * spec.memory:.0f} MB"


def yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _folded(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
