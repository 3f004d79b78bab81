"""What a benchmark is: prompts, rules to judge their images by, and what its official evaluator reads and writes.

A benchmark generates nothing and reads no folder of scores: evaluation/ makes its items, asks its scorers, and keeps what they say.
docs/adding_a_benchmark.md shows a whole one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias

import numpy as np
from jaxtyping import UInt8

from diffalign.benchmarks.context import BenchmarkOptions, Context
from diffalign.files import read_json
from diffalign.types import RewardModel

if TYPE_CHECKING:
    from diffalign.benchmarks.models.vqa import Judge

SHUFFLE = "prompts of a limited run, 1"  # the seed of --limit; another one draws other prompts
Record: TypeAlias = Mapping[str, Any]
"""A JSON object: a prompt's metadata, a row of results, a trace."""
Pixels = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Item:
    """One image to make: `index` is the prompt's row, `sample` counts the images of that prompt, `seed` belongs to this item alone.

    `path`: the image's place inside a method's folder, .png or .jpg, where a benchmark does not name files as GenEval does.
    """

    index: int
    sample: int
    seed: int
    task: str
    prompt: str
    metadata: Record
    path: str | None = None

    @property
    def name(self) -> str:
        """The image's path inside a method's folder."""
        return self.path or f"{self.index:05d}/samples/{self.sample:05d}.png"

    def image_path(self, folder: Path) -> Path:
        return folder / self.name

    def trace_path(self, folder: Path) -> Path:
        image = self.image_path(folder)
        if image.parent.name == "samples":
            return image.parent.parent / "traces" / f"{image.stem}.json"
        return (folder / "traces" / self.name).with_suffix(".json")

    def is_done(self, folder: Path) -> bool:
        """Whether the image lies there, as long as it was written; what was cut short or deleted since is made again."""
        try:
            written = read_json(self.trace_path(folder)).get("bytes")
            return written in (None, self.image_path(folder).stat().st_size)  # None: of an older version
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark."""

    index: int
    """Its row; a prompt is known by it, since lists repeat prompts."""
    task: str
    """The group whose mean is reported."""
    text: str
    metadata: Record = field(default_factory=dict)
    """What its rules judge by."""
    path: Callable[[int], str] | None = None
    """From the sample's number to the image's place in a method's folder; None: as GenEval has it."""


class Scorer(Protocol):
    """Judges images of items, one JSON object each. `name` is part of a file name; `version` says what the scores depend on."""

    name: str
    version: str

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]: ...


@dataclass(frozen=True)
class Task:
    """A scorer and the items that it judges. `positions`: where these stand among all of the run, which decides their shards.

    An image is judged by the shard that makes it: the others may not have it yet, or at all.
    """

    scorer: Scorer
    items: Sequence[Item]
    positions: Sequence[int] | None = None


Judgements: TypeAlias = Mapping[str, tuple[Scorer, Record]]
"""Of one image: scorer name -> the scorer and what it said."""


@dataclass(frozen=True)
class Models:
    """Where a benchmark gets the models that it may not know: from whoever runs it. Each is loaded when it is first asked."""

    device: str
    reward: Callable[[str], RewardModel]
    """A reward by name."""
    unit: Callable[[str], str]
    """What that reward's scores are in."""
    vlm: Callable[[str | None], Judge]
    """A model that answers questions, from a folder or hub id; None: the default one."""
    vlm_name: Callable[[str | None], str]
    """What results call it."""


class Benchmark(Protocol):
    """What every benchmark gives, as a frozen dataclass that inherits from this class; what has a body here may be left as it is.

    `build`, `prompts`, `tasks`, `row` and `protocol` are its own. The four fields are read by what is written here.
    """

    samples: int
    limit: int | None
    seed: int
    batch_size: int
    """Images shown to a scorer at once."""

    pooled: ClassVar[bool] = False
    """"overall" is the mean over prompts, not over tasks."""
    breakdown_title: ClassVar[str] = ""
    """Of `breakdown`'s table."""

    @property
    def name(self) -> str: ...

    @classmethod
    def build(cls, options: BenchmarkOptions, context: Context) -> Self:
        """Without models. Raises ValueError or FileNotFoundError where its prompts cannot be had."""
        ...

    def prompts(self) -> Sequence[Prompt]:
        """All of them, whatever the limit."""
        ...

    def with_judges(self, models: Models) -> Self:
        """With what `tasks` needs. Raises OSError or ValueError where weights cannot be had."""
        return self

    def tasks(self) -> list[Task]:
        """What there is to judge. Raises ValueError where a scorer is missing."""
        ...

    def row(self, item: Item, judged: Judgements) -> Record:
        """The item's row of results.jsonl: filename, tag, prompt; and "correct" with "reason", "value", or "values" by measure."""
        ...

    def protocol(self) -> Record:
        """What a figure of this run must be quoted with."""
        ...

    # ---- the same for all --------------------------------------------------------------------------------------------------------

    def items(self) -> list[Item]:
        """The images of the run: `limit` prompts, as many of each task as goes, with `samples` each."""
        prompts = self.prompts()
        chosen = spread_over_tasks([prompt.task for prompt in prompts], self.limit)
        return [_item(prompts[place], sample, self.seed) for place in chosen for sample in range(self.samples)]

    def limited(self) -> str | None:
        """What a figure of fewer than all prompts must be quoted with."""
        return limited_to([prompt.task for prompt in self.prompts()], self.limit)

    # ---- what may be left as it is -----------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Raises where judging would fail for want of a file: before hours of generation, not after."""

    def settings(self) -> Record:
        """What images depend on, besides what every run's do."""
        return {}

    def export(self, folder: Path) -> None:
        """Writes images in its evaluator's layout, where that differs from ours."""

    def bring(self, images: Path, out: Path) -> Path:
        """The reverse, for images made elsewhere: the folder to judge, `images` itself or one in `out`."""
        return images

    def official(self, folder: Path, rows: Sequence[Record]) -> None:
        """Writes what its evaluator writes."""

    def breakdown(self, rows: Sequence[Record]) -> Mapping[str, float]:
        """A division of its own: group -> number; empty where there is none."""
        return {}


def require_counts(benchmark: Benchmark) -> None:
    """Raises ValueError for samples or a limit below 1."""
    if benchmark.samples < 1:
        raise ValueError(f"samples must be at least 1; got {benchmark.samples}")
    if benchmark.limit is not None and benchmark.limit < 1:
        raise ValueError(f"limit must be at least 1 prompt; got {benchmark.limit}")


def _item(prompt: Prompt, sample: int, seed: int) -> Item:
    path = prompt.path(sample) if prompt.path else None
    return Item(prompt.index, sample, item_seed(seed, prompt.index, sample), prompt.task, prompt.text, prompt.metadata, path)


def item_seed(seed: int, index: int, sample: int) -> int:
    """A 32-bit seed from the run's seed, the prompt's row and the sample: the same whatever the batch size, order or limit."""
    return int(np.random.SeedSequence([seed, index, sample]).generate_state(1)[0])


def spread_over_tasks(tasks: Sequence[str], limit: int | None) -> list[int]:
    """Indices of `limit` rows (None: all), as many from each task as goes, in order. What a smaller limit takes, a larger one takes too.

    Lists are sorted by topic, so the first rows of a task are no sample of it. Each task is shuffled instead, in every run in the same
    way: by a hash of the row's place in its task, which no library's random stream can change.
    """
    places: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        places.setdefault(task, []).append(index)
    turns = []
    for members in places.values():
        order = sorted(range(len(members)), key=lambda place: hashlib.sha256(f"{SHUFFLE} {place}".encode()).digest())
        turns += [(turn, members[place]) for turn, place in enumerate(order)]
    return sorted(index for _, index in sorted(turns)[:limit])


def limited_to(tasks: Sequence[str], limit: int | None) -> str | None:
    """What a result of fewer than all prompts must be quoted with, "limited to 10 prompts a task (60 of 312)"; None for all prompts."""
    if limit is None or limit >= len(tasks):
        return None
    counts = Counter(tasks[index] for index in spread_over_tasks(tasks, limit))
    least, most = min(counts.values()), max(counts.values())
    each = f"{least}" if least == most else f"{least} to {most}"
    where = "a task" if len(set(tasks)) == len(counts) else f"of {len(counts)} of {len(set(tasks))} tasks"
    return f"limited to {each} prompt{'s' if most > 1 else ''} {where} ({limit} of {len(tasks)})"
