"""From judged rows and traces to one summary, and from the summary to tables in Markdown.

The judge's accuracy stands beside the rewards that were optimised and those that were only watched: that is where reward hacking shows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from diffalign.benchmarks.base import Benchmark, Record
from diffalign.files import write_json, write_text
from diffalign.reports.pages import report_page
from diffalign.reports.statistics import (
    FEW_PROMPTS,
    holm,
    overall_estimate,
    paired_difference,
    paired_task_differences,
    task_estimates,
    task_means,
)


@dataclass(frozen=True)
class Judged:
    """One method's results, in the order of the benchmark's items: the judge's rows, and the trace of each image."""

    rows: Sequence[Record]
    traces: Sequence[Record]


def summarise(judged: Mapping[str, Judged], baseline: str = "none", measure: str | None = None, pooled: bool = False) -> Record:
    """Scores, rewards and costs of every method, and each one's paired difference to the baseline, as plain JSON data.

    measure: which of the rows' "values"; None for rows that hold one verdict or value. pooled: overall is the mean over all prompts, not
    over task means.
    """
    methods, paired = {}, {}
    for name, result in judged.items():
        values, prompts, tasks = columns(result.rows, measure)
        rewards = result.traces[0]["rewards"]
        methods[name] = {
            "overall": asdict(overall_estimate(values, prompts, strata(tasks, pooled))),
            "tasks": estimates(result.rows, measure),
            "rewards": {reward: _before_and_after(result.traces, reward) for reward in rewards},
            "seconds_per_image": _mean([trace["seconds"] for trace in result.traces if trace.get("seconds") is not None]),
            "cost": mean_cost(result.traces),
        }
    if baseline in judged:
        base, prompts, tasks = columns(judged[baseline].rows, measure)
        for name, result in judged.items():
            if name == baseline:
                continue
            if [r["filename"] for r in result.rows] != [r["filename"] for r in judged[baseline].rows]:
                raise ValueError(f"{name} and {baseline} were not judged on the same images, so they cannot be compared in pairs")
            values, _, _ = columns(result.rows, measure)
            paired[name] = {
                "overall": asdict(paired_difference(values, base, prompts, strata(tasks, pooled))),
                "tasks": {t: asdict(d) for t, d in paired_task_differences(values, base, prompts, tasks).items()},
            }
    corrected = holm({name: found["overall"]["p_value"] for name, found in paired.items()})
    for name, found in paired.items():
        found["overall"]["p_holm"] = corrected[name]
    few = few_prompts(next(iter(methods.values()))["tasks"])
    return {
        "methods": methods,
        "paired": {"baseline": baseline, "differences": paired},
        **({"few_prompts": few} if few else {}),
    }


def summarise_run(
    benchmark: Benchmark, judged: Mapping[str, Judged], verdicts: bool, by_reward: bool = False, optimised: Collection[str] = ()
) -> Record:
    """The summary of every measure, the first at the top, and the benchmark's own division.

    verdicts: right or wrong rather than scores. by_reward, optimised: rewards judge, and which of them a search climbed; titles say so.
    """

    def title(measure: str) -> str:
        mark = "" if not (by_reward and optimised) else " (optimised)" if measure in optimised else " (watched)"
        return f"Mean {measure}{mark}"

    first, *others = measures(next(iter(judged.values())).rows)
    summary = {
        "measure": "Judge accuracy" if verdicts else title(first) if first else "Mean scores",
        **summarise(judged, measure=first, pooled=benchmark.pooled),
    }
    if others:
        found = {name: {"measure": title(name), **summarise(judged, measure=name, pooled=benchmark.pooled)} for name in others}
        for further in found.values():
            for method in further["methods"].values():
                del method["rewards"], method["cost"]  # they stand at the top
        summary["further"] = found
    divisions = {name: division for name, each in judged.items() if (division := benchmark.breakdown(each.rows))}
    if divisions:
        summary["breakdown"] = {"title": benchmark.breakdown_title, "methods": divisions}
    return summary


def few_prompts(tasks: Mapping[str, Record]) -> str | None:
    """A warning where tasks have too few prompts for their intervals to be more than a rough guide. tasks: name -> its estimate."""
    counts = {name: estimate["prompts"] for name, estimate in tasks.items() if estimate["prompts"] < FEW_PROMPTS}
    if not counts:
        return None
    which = "every task" if len(counts) == len(tasks) else ", ".join(counts)
    least, most = min(counts.values()), max(counts.values())
    held = f"{least}" if least == most else f"{least} to {most}"
    return f"{which}: {held} prompts, where {FEW_PROMPTS} or more are wanted; read intervals as a rough guide, and draw no conclusion"


def measures(rows: Sequence[Record]) -> list[str | None]:
    """What the rows measure: names, or [None] where they hold one verdict or value."""
    return list(rows[0]["values"]) if "values" in rows[0] else [None]


def value(row: Record, measure: str | None = None) -> float:
    """A row's verdict as 0 or 1, or its score where the benchmark gives scores."""
    if measure is not None:
        return float(row["values"][measure])
    return float(row["correct"] if "correct" in row else row["value"])


def estimates(rows: Sequence[Record], measure: str | None = None) -> dict[str, Record]:
    """Each task's mean with its interval: Clopper and Pearson's for verdicts, `mean_interval` for scores."""
    method = task_estimates if "correct" in rows[0] else task_means
    return {task: asdict(estimate) for task, estimate in method(*columns(rows, measure)).items()}


def columns(rows: Sequence[Record], measure: str | None = None) -> tuple[list[float], list[int | str], list[str]]:
    """Values, prompts and tasks. A prompt is known by its place in the list where rows tell it, since lists repeat prompts."""
    return [value(r, measure) for r in rows], [r.get("index", r["prompt"]) for r in rows], [r["tag"] for r in rows]


def strata(tasks: Sequence[str], pooled: bool) -> list[str]:
    return ["all"] * len(tasks) if pooled else list(tasks)


COSTS = {
    "seconds": "s/image",
    "nfe": "evaluations of the network",
    "backward_passes": "backward passes",
    "reward_calls": "reward calls",
    "peak_memory_mb": "peak memory (GB)",
}


def mean_cost(traces: Sequence[Record]) -> dict[str, float | None]:
    """Per image, over the images that have it recorded; of the memory the peak of all."""
    cost = {}
    for name in COSTS:
        known = [trace[name] for trace in traces if trace.get(name) is not None]
        cost[name] = max(known, default=None) if name == "peak_memory_mb" else _mean(known)
    return cost


def _mean(numbers: Sequence[float]) -> float | None:
    """None where there are none: images of another program come without times."""
    return float(np.mean(numbers)) if numbers else None


def _before_and_after(traces: Sequence[Record], reward: str) -> dict[str, float | int | None]:
    """Means over the images whose two scores are numbers (a trace holds None for nan and inf), and how many those are."""
    pairs = [(trace["rewards"][reward][0], trace["rewards"][reward][trace["best"]]) for trace in traces]
    finite = np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2)
    before, after = finite.mean(axis=0).tolist() if len(finite) else (None, None)
    return {"before": before, "after": after, "images": len(finite)}


def markdown(summary: Record) -> str:
    """The summary as tables, and the facts needed to make them again.

    `optimised`, `measure`, `further` (name -> a summary of another measure), `breakdown`, `tables`, `limited` and `facts` are read where
    present. A limited result says so over every table, since tables are what gets copied.
    """
    parts = _measure_tables(summary, summary.get("measure", "Judge accuracy"))
    for name, further in summary.get("further", {}).items():
        parts += _measure_tables(further, further.get("measure", f"Mean {name}"))
    if summary.get("breakdown"):
        found = summary["breakdown"]
        groups = list(dict.fromkeys(group for values in found["methods"].values() for group in values))
        rows = [[name, *(_number(values.get(group)) for group in groups)] for name, values in found["methods"].items()]
        parts += [f"## {found['title']}", table(["method", *groups], rows)]
    if any(m["rewards"] for m in summary["methods"].values()):
        parts += ["## Mean rewards, before -> after", _reward_table(summary["methods"], set(summary.get("optimised", ())))]
    for extra in summary.get("tables", ()):
        parts += [f"## {extra['title']}", table(extra["head"], extra["rows"]), extra["note"]]
    costs = {name: m.get("cost", {}) for name, m in summary["methods"].items()}
    if any(value is not None for cost in costs.values() for value in cost.values()):
        heads, cells = cost_table(list(costs.values()))
        parts += ["## Cost per image", table(["method", *heads], [[name, *row] for name, row in zip(costs, cells, strict=True)])]
    first = next(iter(summary["methods"].values()))["overall"]
    few = {"TOO FEW PROMPTS": summary["few_prompts"]} if summary.get("few_prompts") else {}
    facts = {**few, "prompts": first["prompts"], "images per method": first["images"], **summary.get("facts", {})}
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    return "\n\n".join(stamped(parts, summary.get("limited"))) + "\n"


def stamped(parts: Sequence[str], limited: str | None) -> list[str]:
    """The parts of a report with `limited` in every heading; as they are where it is None."""
    return [f"{part}, {limited}" if limited and part.startswith("## ") else part for part in parts]


def _measure_tables(summary: Record, title: str) -> list[str]:
    parts = [f"## {title}, with 95 % intervals", _accuracy_table(summary)]
    differences = summary["paired"]["differences"]
    if differences:
        baseline = summary["paired"]["baseline"]
        parts += [f"## Gain over `{baseline}` on the same prompts and noises, with 95 % intervals", _gain_table(differences)]
    return parts


def cost_table(costs: Sequence[Mapping[str, float | None]]) -> tuple[list[str], list[list[str]]]:
    """Heads and a row of cells for each cost; memory in 2**30 bytes. No column for backward passes where none was made."""
    names = [name for name in COSTS if name != "backward_passes" or any(cost.get(name) for cost in costs)]

    def cell(name: str, value: float | None) -> str:
        return "" if value is None else f"{value / 1024:.2f}" if name == "peak_memory_mb" else f"{value:.4g}"

    return [COSTS[name] for name in names], [[cell(name, cost.get(name)) for name in names] for cost in costs]


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _accuracy_table(summary: Record) -> str:
    tasks = list(next(iter(summary["methods"].values()))["tasks"])
    shown = tasks if len(tasks) > 1 else []  # of one task, overall says it all
    rows = [
        [name, interval(m["overall"]), *(interval(m["tasks"][t]) for t in shown), _number(m["seconds_per_image"], 3)]
        for name, m in summary["methods"].items()
    ]
    return table(["method", "overall", *shown, "s/image"], rows)


def _gain_table(differences: Record) -> str:
    tasks = list(next(iter(differences.values()))["tasks"])
    tasks = tasks if len(tasks) > 1 else []
    rows = [
        [name, interval(d["overall"], "+"), *p_values(d["overall"]), *(interval(d["tasks"][t], "+") for t in tasks)]
        for name, d in differences.items()
    ]
    return table(["method", "overall", *P_VALUES, *tasks], rows)


P_VALUES = ("p (sign flips)", "p (Holm)")


def p_values(difference: Mapping[str, float | None]) -> list[str]:
    """The cells below P_VALUES: as tested, and corrected for all tests of the table, empty where one was all."""
    corrected = difference.get("p_holm")  # summaries of before 2026-11-24 have none
    return [f"{difference['p_value']:.2g}", "" if corrected is None else f"{corrected:.2g}"]


def _reward_table(methods: Record, optimised: set[str]) -> str:
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
    """ "0.500 [0.40, 0.60]"; of a single prompt, which no resampling varies, the mean alone."""
    if estimate["low"] == estimate["high"] and estimate.get("prompts") == 1:
        return f"{estimate['mean']:{sign}.3f}"
    return f"{estimate['mean']:{sign}.3f} [{estimate['low']:{sign}.2f}, {estimate['high']:{sign}.2f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    lines = ["| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_report(folder: Path, summary: Record) -> str:
    """Writes summary.json, table.md and table.html, and returns the table."""
    text = markdown(summary)
    write_json(folder / "summary.json", summary)
    write_text(folder / "table.md", text)
    write_text(folder / "table.html", report_page(text, f"{summary.get('benchmark', 'Benchmark')}: results"))
    return text
