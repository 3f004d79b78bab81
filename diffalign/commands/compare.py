"""`diffalign bench compare RUN_A RUN_B`: two judged runs image by image, with intervals, a paired test and Holm's correction over tasks.

A run is the folder of one method, holding results.jsonl. Both must be of one benchmark, judged in the same way, on the same images.
"""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffalign.files import read_json, write_json, write_text

MUST_AGREE = ("benchmark", "split", "prompt lists", "samples", "scorer", "scorers", "limits")
SAME_NOISES = ("pipeline", "seed")


def run(args: argparse.Namespace) -> int:
    """Prints the table; writes compare.json and compare.md to --out where it is given."""
    if len(args.runs) != 2:
        raise ValueError(f"compare takes two runs: diffalign bench compare RUN_A RUN_B; got {len(args.runs)}")
    a, b = args.runs
    result = compare(Path(a), Path(b), args.allow_missing)
    text = markdown(result)
    print(text, end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "compare.json", result)
        write_text(args.out / "compare.md", text)
    return 0


def compare(a: Path, b: Path, allow_missing: bool = False) -> dict[str, Any]:
    """How much B's scores exceed A's. Raises ValueError where the runs cannot be compared, naming what differs."""
    from diffalign.benchmarks.report import estimates
    from diffalign.benchmarks.statistics import discordance, overall_estimate, paired_difference, paired_task_differences

    rows = {name: {row["filename"]: row for row in _rows(folder)} for name, folder in (("A", a), ("B", b))}
    notes = _check(a, b)
    shared = [name for name in rows["A"] if name in rows["B"]]
    alone = (len(rows["A"]) - len(shared)) + (len(rows["B"]) - len(shared))
    if alone and not allow_missing:
        what = f"{alone} images are in one run only"
        raise ValueError(f"{what}; judge the same in both, or --allow-missing to compare the {len(shared)} that both have")
    if not shared:
        raise ValueError(f"{a} and {b} have no image in common, so nothing can be compared")
    if alone:
        notes.append(f"partial: {alone} images are in one run only and were left out")
    of_a, of_b = [rows["A"][name] for name in shared], [rows["B"][name] for name in shared]
    if [row["prompt"] for row in of_a] != [row["prompt"] for row in of_b]:
        raise ValueError(f"{a} and {b} have images of the same names for other prompts; they are not of the same benchmark")
    x, y = _values(of_a), _values(of_b)
    prompts, tasks = [row["prompt"] for row in of_a], [row["tag"] for row in of_a]
    result = {
        "runs": {"A": str(a), "B": str(b)},
        "images": len(shared),
        "A": {"overall": asdict(overall_estimate(x, prompts, tasks)), "tasks": estimates(of_a)},
        "B": {"overall": asdict(overall_estimate(y, prompts, tasks)), "tasks": estimates(of_b)},
        "difference": {
            "overall": asdict(paired_difference(y, x, prompts, tasks)),
            "tasks": {task: asdict(found) for task, found in paired_task_differences(y, x, prompts, tasks).items()},
        },
        "notes": notes,
    }
    if "correct" in of_a[0]:
        result["discordant"] = asdict(discordance(y, x))
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison as a table, overall first."""
    from diffalign.benchmarks.report import interval, table

    lines = []
    names = ["overall", *result["difference"]["tasks"]]
    for name in names:
        parts = {key: result[key]["overall"] if name == "overall" else result[key]["tasks"][name] for key in ("A", "B", "difference")}
        gain = parts["difference"]
        corrected = "" if gain["p_holm"] is None else f"{gain['p_holm']:.2g}"
        lines.append([name, interval(parts["A"]), interval(parts["B"]), interval(gain, "+"), f"{gain['p_value']:.2g}", corrected])
    head = ["task", "A", "B", "B - A", "p (sign flips)", "p (Holm)"]
    facts = [f"- {key}: {folder}" for key, folder in result["runs"].items()]
    prompts = result["difference"]["overall"]["prompts"]
    facts += [f"- {result['images']} images of {prompts} prompts; 95 % intervals, the differences' by resampling prompts"]
    if "discordant" in result:
        found = result["discordant"]
        only = f"right in B only {found['gained']}, in A only {found['lost']}"
        facts.append(f"- {only}; exact McNemar p = {found['p_value']:.2g} (descriptive: takes images of a prompt as independent)")
    facts += [f"- {note}" for note in result["notes"]]
    return table(head, lines) + "\n\n" + "\n".join(facts) + "\n"


def _rows(folder: Path) -> list[dict[str, Any]]:
    from diffalign.benchmarks.report import read_rows

    path = folder / "results.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a judged run: it has no results.jsonl; give the folder of one method, such as RUN/none")
    return read_rows(path)


def _check(a: Path, b: Path) -> list[str]:
    """Notes on what weakens the comparison. Raises ValueError where the runs were judged in different ways."""
    facts = []
    for folder in (a, b):
        files = [folder / "settings.json", folder / "protocol.json"]
        facts.append({name: value for file in files if file.is_file() for name, value in read_json(file).items()})
    one, two = facts
    for name in MUST_AGREE:
        if name in one and name in two and one[name] != two[name]:
            raise ValueError(f"the runs cannot be compared: their {name} differ ({one[name]!r} and {two[name]!r})")
    different = [name for name in SAME_NOISES if name in one and name in two and one[name] != two[name]]
    return [f"the runs differ in {' and '.join(different)}, so only prompts are paired, not noises"] if different else []


def _values(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    from diffalign.benchmarks.report import value

    return [value(row) for row in rows]
