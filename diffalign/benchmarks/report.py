"""From judged rows and traces to one summary, and from the summary to tables in Markdown.

The judge's accuracy stands beside the rewards that were optimised and those that were only watched: that is where reward hacking shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.benchmarks.pages import report_page
from diffalign.benchmarks.statistics import overall_estimate, paired_difference, paired_task_differences, task_estimates, task_means
from diffalign.files import write_json, write_text


@dataclass(frozen=True)
class Judged:
    """One method's results, in the order of the benchmark's items: the judge's rows, and the trace of each image."""

    rows: Sequence[Mapping[str, Any]]
    traces: Sequence[Mapping[str, Any]]


def summarise(judged: Mapping[str, Judged], baseline: str = "none") -> dict[str, Any]:
    """Accuracy, rewards and seconds of every method, and each one's paired difference to the baseline, as plain JSON data."""
    methods, paired = {}, {}
    for name, result in judged.items():
        correct, prompts, tasks = _columns(result.rows)
        rewards = result.traces[0]["rewards"]
        methods[name] = {
            "overall": asdict(overall_estimate(correct, prompts, tasks)),
            "tasks": estimates(result.rows),
            "rewards": {reward: _before_and_after(result.traces, reward) for reward in rewards},
            "seconds_per_image": _mean([trace["seconds"] for trace in result.traces if trace.get("seconds") is not None]),
        }
    if baseline in judged:
        base, prompts, tasks = _columns(judged[baseline].rows)
        for name, result in judged.items():
            if name == baseline:
                continue
            if [r["filename"] for r in result.rows] != [r["filename"] for r in judged[baseline].rows]:
                raise ValueError(f"{name} and {baseline} were not judged on the same images, so they cannot be compared in pairs")
            correct, _, _ = _columns(result.rows)
            paired[name] = {
                "overall": asdict(paired_difference(correct, base, prompts, tasks)),
                "tasks": {t: asdict(d) for t, d in paired_task_differences(correct, base, prompts, tasks).items()},
            }
    return {"methods": methods, "paired": {"baseline": baseline, "differences": paired}}


def value(row: Mapping[str, Any]) -> float:
    """A row's verdict as 0 or 1, or its score where the benchmark gives scores."""
    return float(row["correct"] if "correct" in row else row["value"])


def estimates(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each task's mean with its interval: Wilson's for verdicts, the prompt bootstrap's for scores."""
    method = task_estimates if "correct" in rows[0] else task_means
    return {task: asdict(estimate) for task, estimate in method(*_columns(rows)).items()}


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[str], list[str]]:
    return [value(r) for r in rows], [r["prompt"] for r in rows], [r["tag"] for r in rows]


def _mean(numbers: Sequence[float]) -> float | None:
    """None where there are none: images of another program come without times."""
    return float(np.mean(numbers)) if numbers else None


def _before_and_after(traces: Sequence[Mapping[str, Any]], reward: str) -> dict[str, float | int | None]:
    """Means over the images whose two scores are numbers (a trace holds None for nan and inf), and how many those are."""
    pairs = [(trace["rewards"][reward][0], trace["rewards"][reward][trace["best"]]) for trace in traces]
    finite = np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2)
    before, after = finite.mean(axis=0).tolist() if len(finite) else (None, None)
    return {"before": before, "after": after, "images": len(finite)}


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as three tables and the facts needed to make them again. `optimised` and `facts` are read where present."""
    parts = [f"## {summary.get('measure', 'Judge accuracy')}, with 95 % intervals", _accuracy_table(summary)]
    differences = summary["paired"]["differences"]
    if differences:
        baseline = summary["paired"]["baseline"]
        parts += [f"## Gain over `{baseline}` on the same prompts and noises, with 95 % intervals", _gain_table(differences)]
    if any(m["rewards"] for m in summary["methods"].values()):
        parts += ["## Mean rewards, before -> after", _reward_table(summary["methods"], set(summary.get("optimised", ())))]
    first = next(iter(summary["methods"].values()))["overall"]
    facts = {"prompts": first["prompts"], "images per method": first["images"], **summary.get("facts", {})}
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    return "\n\n".join(parts) + "\n"


def _accuracy_table(summary: Mapping[str, Any]) -> str:
    tasks = list(next(iter(summary["methods"].values()))["tasks"])
    rows = [
        [
            name,
            interval(m["overall"]),
            *(interval(m["tasks"][t]) for t in tasks),
            "" if m["seconds_per_image"] is None else f"{m['seconds_per_image']:.3g}",
        ]
        for name, m in summary["methods"].items()
    ]
    return table(["method", "overall", *tasks, "s/image"], rows)


def _gain_table(differences: Mapping[str, Any]) -> str:
    tasks = list(next(iter(differences.values()))["tasks"])
    rows = [
        [name, interval(d["overall"], "+"), f"{d['overall']['p_value']:.2g}", *(interval(d["tasks"][t], "+") for t in tasks)]
        for name, d in differences.items()
    ]
    return table(["method", "overall", "p (sign flips)", *tasks], rows)


def _reward_table(methods: Mapping[str, Any], optimised: set[str]) -> str:
    names = list(dict.fromkeys(reward for m in methods.values() for reward in m["rewards"]))
    heads = [f"{n} ({'optimised' if n == 'total' or n in optimised else 'watched'})" for n in names]
    rows = []
    for method, m in methods.items():
        rows.append([method, *(_change(m["rewards"].get(name)) for name in names)])
    return table(["method", *heads], rows)


def _change(reward: Mapping[str, float | None] | None) -> str:
    if reward is None or reward["before"] is None or reward["after"] is None:
        return ""
    return f"{reward['before']:.4g}" if reward["before"] == reward["after"] else f"{reward['before']:.4g} -> {reward['after']:.4g}"


def interval(estimate: Mapping[str, float], sign: str = "") -> str:
    """ "0.500 [0.40, 0.60]"."""
    return f"{estimate['mean']:{sign}.3f} [{estimate['low']:{sign}.2f}, {estimate['high']:{sign}.2f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    lines = ["| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object per line, as GenEval's results.jsonl."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote, or another program. Raises ValueError naming a line that is no JSON object.

    Lines end at newlines alone: text in them may hold other marks that Python's splitlines takes for ends, such as U+2028.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} line {number} is not a JSON object: {line[:80]!r}") from error
    return rows


def write_report(folder: Path, summary: Mapping[str, Any]) -> str:
    """Writes summary.json, table.md and table.html, and returns the table."""
    text = markdown(summary)
    write_json(folder / "summary.json", summary)
    write_text(folder / "table.md", text)
    write_text(folder / "table.html", report_page(text, f"{summary.get('benchmark', 'Benchmark')}: results"))
    return text
