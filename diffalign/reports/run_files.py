"""What a judged folder is left with: the evaluator's own files, the protocol, a row per image, a page of what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.benchmarks.base import Benchmark, Record
from diffalign.files import read_json, write_json, write_rows, write_text
from diffalign.reports.pages import failures_page
from diffalign.reports.summary import COSTS


def write_official(benchmark: Benchmark, folder: Path, rows: Sequence[Record]) -> None:
    """results.jsonl, the files of the benchmark's own evaluator, what figures must be quoted with, and a page of what went wrong."""
    write_rows(folder / "results.jsonl", rows)
    write_json(folder / "protocol.json", {"benchmark": benchmark.name, **benchmark.protocol()})
    notice = folder / "LIMITED.txt"  # beside files of official evaluators' formats, which have no place for it
    if limited := benchmark.limited():
        write_text(notice, f"Every figure in this folder is {limited}.\n")
    else:
        notice.unlink(missing_ok=True)
    benchmark.official(folder, rows)
    title = ", ".join(filter(None, (benchmark.name, f"{folder.name}: what went wrong", limited)))
    write_text(folder / "failures.html", failures_page(rows, title))


def write_units(benchmark: Benchmark, folder: Path, rows: Sequence[Record], left_out: Mapping[str, str], pipeline: str | None) -> None:
    """units.jsonl, one row per image of the run: what it is, what it cost, and its verdict or what is wrong with it."""
    judged = {row["filename"]: row for row in rows}
    method = read_json(folder / "settings.json")["method"] if (folder / "settings.json").is_file() else folder.name
    units = []
    for item in benchmark.items():
        row, trace = judged.get(item.name, {}), read_json(item.trace_path(folder)) if item.trace_path(folder).is_file() else {}
        units.append(
            {
                "benchmark": benchmark.name,
                "index": item.index,
                "sample": item.sample,
                "tag": item.task,
                "prompt": item.prompt,
                "path": item.name,
                "method": method,
                "pipeline": pipeline,
                **{name: trace.get(name) for name in ("seed", "size", "sha256", *COSTS)},
                "status": "judged" if row else "left out",
                "error": None if row else left_out.get(item.name),
                **{name: row[name] for name in ("correct", "reason", "value", "values") if name in row},
            }
        )
    write_rows(folder / "units.jsonl", units)


def protocol_in_words(benchmark: Benchmark) -> Record:
    """For the foot of a table."""

    def words(fact: object) -> object:
        if isinstance(fact, Mapping):
            return "; ".join(f"{name}: {words(value)}" for name, value in fact.items())
        return " + ".join(map(str, fact)) if isinstance(fact, list) else fact

    return {name: words(fact) for name, fact in benchmark.protocol().items()}


def partial(left_out: Mapping[str, str]) -> dict[str, str]:
    """The line that marks a partial result, at the head of the facts."""
    if not left_out:
        return {}
    return {"PARTIAL": f"{len(left_out)} images cannot be judged and were left out, the first {next(iter(left_out.values()))}"}
