"""Judging the images of one or more folders: what has not been judged, with one bar, and the rows that all of them have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from diffalign.benchmarks.base import Benchmark, Record
from diffalign.evaluation.processes import Interrupted
from diffalign.evaluation.store import WHOLE, Shard, judged, require_all, score_missing


def judge(benchmark: Benchmark, folders: Sequence[Path], shard: Shard = WHOLE) -> None:
    """Judges the shard's images that have not been judged. What cannot be judged is said by `rows_in_common`.

    Raises Interrupted at Ctrl-C.
    """
    tasks = benchmark.tasks()
    total = len(folders) * sum(len(shard.part(task)) for task in tasks)
    with tqdm(total=total, unit="image", desc="judging", disable=None) as bar:
        try:
            for folder in folders:
                for task in tasks:
                    score_missing(task, folder, benchmark.batch_size, shard, bar.update)
        except KeyboardInterrupt as stop:
            raise Interrupted(f"interrupted: {bar.n} of {total} judgements are kept; the same command continues") from stop


def rows_in_common(
    benchmark: Benchmark, folders: Mapping[str, Path], allow_missing: bool = False
) -> tuple[dict[str, list[Record]], dict[str, str]]:
    """Each method's rows, and the items left out with the reason: those that any method lacks, so that all are compared on the same ones.

    folders: method -> where its images lie. Raises FileNotFoundError naming what is missing where that is not allowed, or nothing is left.
    """
    rows, left_out = {}, {}
    for name, folder in folders.items():
        rows[name], faults = judged(benchmark, folder)
        if not allow_missing:
            require_all(faults, len(rows[name]) + len(faults), folder)
        left_out.update({fault.item: f"{folder.name}/{fault.item}: {fault.problem}" for fault in faults})
    common = {name: [row for row in found if row["filename"] not in left_out] for name, found in rows.items()}
    if not all(common.values()):
        where = next(iter(folders.values())).parent
        raise FileNotFoundError(f"no image has been judged for every method in {where}; the first: {next(iter(left_out.values()))}")
    return common, left_out


def judged_rows(benchmark: Benchmark, folder: Path) -> list[Record]:
    """Judges what has not been judged in one folder, and gives its rows. Raises FileNotFoundError naming what cannot be judged."""
    judge(benchmark, [folder])
    rows, _ = rows_in_common(benchmark, {folder.name: folder})
    return rows[folder.name]
