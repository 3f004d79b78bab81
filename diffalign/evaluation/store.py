"""Scores of images, kept on disk as they are made, so that scoring resumes where it stopped and its shards need no server.

    FOLDER/scores/NAME.0-of-4.jsonl     one line per image: {"item", "sha256", "version", "seconds", "score"}

A line counts for an image as long as the image has that sha256 and the scorer that version, so a picture made anew, or other weights,
are scored again. Shard i of n takes every n-th item from the i-th; merging is reading all files. Images that are missing or cut short are
named.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from diffalign.benchmarks.base import Benchmark, Item, Pixels, Record, Scorer, Task
from diffalign.files import appending, read_lines
from diffalign.images import decode

T = TypeVar("T")
UNSCORED = "not scored yet"


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"a shard is i/n with 0 <= i < n; got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """ "2/8". Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ValueError(f"a shard is i/n with 0 <= i < n, as in 0/4; got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: Sequence[T]) -> list[T]:
        return list(items[self.index :: self.count])

    def part(self, task: Task) -> list[Item]:
        """The items of a task that this shard judges: those that it makes."""
        positions = range(len(task.items)) if task.positions is None else task.positions
        return [item for item, position in zip(task.items, positions, strict=True) if position % self.count == self.index]


WHOLE = Shard()


@dataclass(frozen=True)
class Fault:
    """An image that cannot be judged: `problem` is "missing", "not a whole image (...)" or "not scored yet"."""

    item: str
    problem: str


@dataclass
class Images:
    """Finds an item's image: under our name, or under one that differs in the zeros of its number, as other programs write it."""

    folder: Path
    _listed: dict[Path, dict[tuple[str, int], Path]] = field(default_factory=dict, repr=False)

    def find(self, item: Item) -> Path | None:
        path = item.image_path(self.folder)
        if path.is_file():
            return path
        return self._siblings(path.parent).get(_number(path))

    def _siblings(self, folder: Path) -> dict[tuple[str, int], Path]:
        if folder not in self._listed:
            files = sorted(folder.iterdir()) if folder.is_dir() else []
            known = [path for path in files if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
            self._listed[folder] = {key: path for path in known if (key := _number(path))}
        return self._listed[folder]


def _number(path: Path) -> tuple[str, int] | None:
    """ "a red cup_000012.png" -> ("a red cup_", 12)."""
    match = re.fullmatch(r"(|.*\D)(\d+)", path.stem)
    return (match[1], int(match[2])) if match else None


def score_missing(
    task: Task,
    folder: Path,
    batch_size: int = 8,
    shard: Shard = WHOLE,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Fault]:
    """Scores the shard's images that have no valid line yet, a batch at a time, each written before the next. Returns what could not be."""
    known, images, faults = read_scores(folder, task.scorer), Images(folder), []
    batch: list[tuple[Item, Pixels, str]] = []
    path = folder / "scores" / f"{task.scorer.name}.{shard.index}-of-{shard.count}.jsonl"

    def flush() -> None:
        if not batch:
            return
        began = time.perf_counter()
        scores = task.scorer([pixels for _, pixels, _ in batch], [item for item, _, _ in batch])
        seconds = round((time.perf_counter() - began) / len(batch), 4)
        common = {"version": task.scorer.version, "seconds": seconds}
        lines = [
            {"item": item.name, "sha256": digest, **common, "score": score} for (item, _, digest), score in zip(batch, scores, strict=True)
        ]
        append(lines)
        progress(len(batch))
        batch.clear()

    todo = []
    for item in shard.part(task):
        found = images.find(item)
        if found is None:
            faults.append(Fault(item.name, "missing"))
            continue
        data = found.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if known.get(item.name, {}).get("sha256") == digest:
            progress(1)
            continue
        todo.append((item, found))
    if not todo:
        return faults
    with appending(path) as append:
        for item, found in todo:
            data = found.read_bytes()
            try:
                batch.append((item, decode(data).bytes, hashlib.sha256(data).hexdigest()))
            except ValueError as error:
                faults.append(Fault(item.name, str(error)))
                continue
            if len(batch) == batch_size:
                flush()
        flush()
    return faults


def collect(task: Task, folder: Path) -> tuple[dict[str, Record], list[Fault]]:
    """Item name -> score of every item that has one and whose image is still that one, and the faults of the others."""
    known, images = read_scores(folder, task.scorer), Images(folder)
    scores, faults = {}, []
    for item in task.items:
        found, line = images.find(item), known.get(item.name)
        if found is None:
            faults.append(Fault(item.name, "missing"))
        elif line and line["sha256"] == hashlib.sha256(data := found.read_bytes()).hexdigest():
            scores[item.name] = line["score"]
        else:
            faults.append(Fault(item.name, _why_unscored(data if line else found.read_bytes())))
    return scores, faults


def collect_all(tasks: Sequence[Task], folder: Path) -> tuple[dict[str, dict[str, tuple[Scorer, Record]]], dict[str, Fault]]:
    """Item name -> scorer name -> (scorer, score) over several tasks, and the items that any task could not judge, with their faults."""
    found: dict[str, dict[str, tuple[Scorer, Record]]] = {}
    faults: dict[str, Fault] = {}
    for task in tasks:
        scores, missing = collect(task, folder)
        faults.update({fault.item: fault for fault in missing})
        for name, score in scores.items():
            found.setdefault(name, {})[task.scorer.name] = (task.scorer, score)
    return found, faults


def judged(benchmark: Benchmark, folder: Path) -> tuple[list[Record], list[Fault]]:
    """The benchmark's rows of what has been judged by all its scorers, by whichever shard, in the order of its items; and what has not."""
    found, faults = collect_all(benchmark.tasks(), folder)
    items = benchmark.items()
    rows = [benchmark.row(item, found[item.name]) for item in items if item.name not in faults]
    return rows, [faults[item.name] for item in items if item.name in faults]


def require_all(faults: Sequence[Fault], items: int, folder: Path) -> None:
    """Raises FileNotFoundError naming the images that cannot be judged: a mean over the rest would look like a result."""
    if not faults:
        return
    named = "; ".join(f"{fault.item}: {fault.problem}" for fault in faults[:3])
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    what = f"{len(faults)} of {items} images in {folder} cannot be judged ({named}{more})"
    advice = "judge them" if all(fault.problem == UNSCORED for fault in faults) else "make and judge them"
    raise FileNotFoundError(f"{what}; {advice}, or --allow-missing to report the rest")


def read_scores(folder: Path, scorer: Scorer) -> dict[str, Record]:
    """Item name -> its latest line of this scorer and version, from all shards' files."""
    lines: dict[str, Record] = {}
    for path in sorted((folder / "scores").glob(f"{scorer.name}.*-of-*.jsonl")):
        for line in read_lines(path):
            if line["version"] == scorer.version:
                lines[line["item"]] = line
    return lines


def _why_unscored(data: bytes) -> str:
    try:
        decode(data)
    except ValueError as error:
        return str(error)
    return UNSCORED
