"""Makes the README's measured line and plot from docs/results, and its table of methods and families from the registries.

`python scripts/readme_text.py` writes both into README.md between their marks, and docs/images/readme_measured.png. Nothing is measured
here, and no model is loaded; tests/test_docs.py holds the README equal to what this makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffalign.files import whole_file, write_text
from diffalign.methods.table import METHODS, NOISE, Method
from diffalign.pipelines.guidance.layouts import LAYOUTS
from diffalign.pipelines.presets import FAMILIES, PRESETS

ROOT = Path(__file__).resolve().parents[1]
RESULT = "docs/results/shapes_reward_50.json"
PLOT = "docs/images/readme_measured.png"
MEASURED, TESTED, WORKS, NOT = "●", "◐", "○", ""
COLUMNS = {  # how the README calls a family
    "stable-diffusion": "SD 1.5, 2.1, Turbo",
    "stable-diffusion-xl": "SDXL",
    "stable-diffusion-3": "SD3",
    "pixart-alpha": "PixArt-α",
    "pixart-sigma": "PixArt-Σ",
    "flux": "FLUX.1",
    "sana": "SANA",
    "sana-sprint": "SANA Sprint",
    "wan": "Wan 2.1",
}
TESTS = {  # a file of tests -> the families in miniature that each of its methods runs on there
    "tests/families/test_contract.py": tuple(FAMILIES),
    "tests/pipelines/test_guidance_hook.py": (
        "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "pixart-alpha", "flux", "sana", "wan",
    ),
}  # fmt: skip


def main() -> None:
    result = json.loads((ROOT / RESULT).read_text())
    page = (ROOT / "README.md").read_text()
    for name, text in (("measured", measured(result)), ("methods", methods_by_family())):
        page = replaced(page, name, text)
    write_text(ROOT / "README.md", page)
    with whole_file(ROOT / PLOT) as temporary:
        plot(result).savefig(temporary, format="png")


def replaced(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of that name. Raises ValueError where the page has not exactly one such pair."""
    marks = rf"(<!-- {name}:begin [^\n]*-->\n).*?(<!-- {name}:end -->)"
    found, count = re.subn(marks, lambda mark: f"{mark[1]}{text}\n{mark[2]}", page, flags=re.S)
    if count != 1:
        raise ValueError(f"README.md must have one pair of marks <!-- {name}:begin ... --> and <!-- {name}:end -->; it has {count}")
    return found


def measured(result: Mapping[str, Any]) -> str:
    """What a result of `diffalign bench shapes` says, as one sentence, and where it comes from."""
    share = {name: each["overall"] for name, each in result["methods"].items()}
    none = share.pop("none")
    searches = ", ".join(f"{each['mean']:.2f} with `{name}`" for name, each in share.items())
    config, facts = result["config"], result["facts"]
    rewards = " and ".join(f"`{name}`" for name in config["reward"])
    limited = f"; {result['limited']}" if result.get("limited") else ""
    return (
        f"The judge accepts **{none['mean']:.2f}** of the images of `{config['pipeline']}` without a search, and at {config['budget']} "
        f"evaluations an image under {rewards} {searches}\n({none['prompts']} held-out prompts, the same noises{limited}; bars are "
        f"95 % intervals; {facts['device']}, {facts['date']}; [file]({RESULT}), command: {facts['command']})."
    )


def plot(result: Mapping[str, Any]) -> Figure:
    """Overall accuracy of every method of a result, with its interval, one under the other."""
    figure = Figure(figsize=(7.4, 0.42 * len(result["methods"]) + 0.75), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, each) in enumerate(result["methods"].items()):
        overall, color = each["overall"], "#868e96" if name == "none" else "#2563eb"
        axes.plot([overall["low"], overall["high"]], [i, i], color=color, linewidth=5, alpha=0.35, solid_capstyle="round")
        axes.plot([overall["mean"]], [i], "o", color=color, markersize=8)
        axes.text(overall["high"] + 0.015, i, f"{overall['mean']:.2f}", va="center", fontsize=10)
    axes.set_yticks(range(len(result["methods"])), ["no search" if name == "none" else name for name in result["methods"]], fontsize=10)
    axes.set_ylim(len(result["methods"]) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of images that the judge accepts, mean of six tasks", fontsize=9)
    axes.tick_params(labelsize=9, length=0)
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure


def methods_by_family() -> str:
    """A row for each method, a column for the embedded models and for each family."""
    lines = ["| | embedded | " + " | ".join(COLUMNS[name] for name in FAMILIES) + " |", "|---|" + ":-:|" * (len(FAMILIES) + 1)]
    seen = set(measured_names())
    for row in METHODS:
        embedded = MEASURED if row.name in seen else WORKS
        lines.append(f"| `{row.name}` | {embedded} | " + " | ".join(mark(row, family) for family in FAMILIES) + " |")
    return "\n".join(lines)


def mark(row: Method, family: str) -> str:
    """Whether a method is tested on a family in miniature, should work there untested, or has nothing to do there."""
    presets = [preset for preset in PRESETS.values() if preset.family == family]
    if row.needs_steps and all(preset.steps == 1 for preset in presets):
        return NOT
    if row.kind != NOISE and FAMILIES[family].stock_class not in LAYOUTS:
        return NOT
    called = re.escape(row.class_name) + (rf"\.{row.from_budget}\b" if row.from_budget else r"\b(?!\.)")
    return TESTED if any(family in families and re.search(called, (ROOT / file).read_text()) for file, families in TESTS.items()) else WORKS


def measured_names() -> Iterator[str]:
    """The methods that some file of docs/results has figures of; a variant such as "fixed 0.5" counts for its method."""
    for file in sorted((ROOT / "docs" / "results").glob("*.json")):
        for name in named(json.loads(file.read_text())):
            yield re.split(r"[ ,]", name)[0]


def named(value: Any) -> Iterator[str]:
    """What stands under any key "methods" of a JSON file."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from inner if key == "methods" else named(inner)


if __name__ == "__main__":
    main()
