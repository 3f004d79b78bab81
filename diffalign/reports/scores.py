"""What `diffalign score` writes and says: results.csv with a row per image, results.json with everything, a plot of the distributions."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffalign.benchmarks.base import Record
from diffalign.evaluation.image_files import ImageFile
from diffalign.evaluation.image_prompts import Prompt
from diffalign.evaluation.score_run import Work
from diffalign.files import whole_file, write_json
from diffalign.reports.plots import distributions

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FACTS = ("paper", "licence", "unit", "range", "differentiable", "needs_prompt")  # of a reward, beside its scores


def rows_of(images: Sequence[ImageFile], prompts: Mapping[str, Prompt], works: Sequence[Work]) -> list[Record]:
    """One row per image, in the order of their names."""
    rows = []
    for image in images:
        prompt, name = prompts.get(image.name), image.name
        rows.append({
            "file": name,
            "prompt": prompt and prompt.text,
            "prompt_from": prompt and prompt.origin,
            "scores": {work.reward: work.scores[name] for work in works if name in work.scores},
            "problems": {work.reward: work.problems[name] for work in works if name in work.problems},
            "notes": next((work.notes[name] for work in works if name in work.notes), []),
        })  # fmt: skip
    return rows


def write_results(out: Path, rows: Sequence[Record], specs: Mapping[str, Record], facts: Record) -> None:
    """results.csv, results.json and distributions.png, each whole or not at all. specs: of the rewards. facts: of the run."""
    rewards = {}
    for name, spec in specs.items():
        values = scores_of(rows, name)
        rewards[name] = {**summary(values), "failed": len(rows) - len(values), **{fact: spec[fact] for fact in FACTS}}
    write_csv(out / "results.csv", rows, list(specs))
    write_json(out / "results.json", {**facts, "rewards": rewards, "images": list(rows)})
    with whole_file(out / "distributions.png") as temporary:
        plot = distributions({name: scores_of(rows, name) for name in specs}, {name: spec["unit"] for name, spec in specs.items()})
        plot.save(temporary, format="PNG")


def scores_of(rows: Sequence[Record], reward: str) -> list[float]:
    return [row["scores"][reward] for row in rows if reward in row["scores"]]


def summary(scores: Sequence[float]) -> Record:
    """n, mean, standard deviation (n - 1), extremes and quantiles; None for what so few scores do not have."""
    values = np.asarray(scores, dtype=np.float64)
    known = len(values) > 0
    quantiles = np.quantile(values, QUANTILES).tolist() if known else [None] * len(QUANTILES)
    return {
        "n": len(values),
        "mean": float(values.mean()) if known else None,
        "std": float(values.std(ddof=1)) if len(values) > 1 else None,
        "min": float(values.min()) if known else None,
        "max": float(values.max()) if known else None,
        "quantiles": {f"{100 * level:g}%": value for level, value in zip(QUANTILES, quantiles, strict=True)},
    }


def write_csv(path: Path, rows: Sequence[Record], rewards: Sequence[str]) -> None:
    """An empty cell where there is no score; "problem" then says why."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "prompt", *rewards, "problem"])
        for row in rows:
            cells = [repr(row["scores"][name]) if name in row["scores"] else "" for name in rewards]
            writer.writerow([row["file"], row["prompt"] or "", *cells, problem(row)])


def problem(row: Record) -> str:
    """What went wrong with an image, each reason once."""
    return "; ".join(dict.fromkeys(row["problems"].values()))


def table(rows: Sequence[Record], rewards: Sequence[str]) -> str:
    """The summaries as lines for a terminal."""
    lines = [["reward", "images", "mean", "std", "min", "median", "max"]]
    for name in rewards:
        found = summary(scores_of(rows, name))
        numbers = [found["mean"], found["std"], found["min"], found["quantiles"]["50%"], found["max"]]
        lines.append([name, str(found["n"]), *("-" if number is None else f"{number:.4g}" for number in numbers)])
    first, *widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in lines)
