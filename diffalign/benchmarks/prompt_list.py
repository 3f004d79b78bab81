"""Prompt sets judged one image at a time, by scorers brought from outside: preference models, or models that answer questions.

A row holds one number per measure, since rewards on different scales have no mean: {"pickscore": 22.1, "imagereward": 0.7}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from diffalign.benchmarks.base import Benchmark, Item, Judgements, Prompt, Record, Scorer, Task, require_counts
from diffalign.benchmarks.context import Context


@dataclass(frozen=True)
class Row:
    """One prompt. `path` names its image where that is not GenEval's way, with {sample} where there may be several."""

    prompt: str
    task: str
    metadata: Record = field(default_factory=dict)
    path: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """A benchmark's prompts in order, and which list they are: its known name, or how many and their hash."""

    name: str
    rows: tuple[Row, ...]
    version: str


@dataclass(frozen=True)
class PromptBenchmark(Benchmark):
    """`limit` prompts (None: all), as many of each task as goes, with `samples` images each.

    A scorer gives {"value": number}, which becomes the measure of its name, or {"values": {measure: number}}; the rest is detail.
    Without scorers it can only say what to generate. A subclass says who judges.
    """

    prompt_set: PromptSet
    scorers: Sequence[Scorer] = ()
    samples: int = 1
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    context: Context | None = None

    pooled: ClassVar[bool] = True
    official_samples: ClassVar[Mapping[str, int]] = {"parti": 1, "hpsv2": 1, "drawbench": 1, "dpg": 4, "geneval2": 1}

    def __post_init__(self) -> None:
        require_counts(self)
        if self.name == "hpsv2" and self.samples != 1:
            raise ValueError(f"hpsv2 has room for one image per prompt, STYLE/00012.jpg; got samples {self.samples}")

    @classmethod
    def of(cls, prompt_set: PromptSet, context: Context) -> Self:
        """From a list and what the run is told."""
        return cls(prompt_set, (), context.samples, context.limit, context.seed, context.judge_batch, context)

    @property
    def name(self) -> str:
        return self.prompt_set.name

    def prompts(self) -> list[Prompt]:
        return [
            Prompt(
                index,
                row.task,
                row.prompt,
                {"prompt": row.prompt, "tag": row.task, **row.metadata},
                (lambda sample, path=row.path: path.format(sample=sample)) if row.path else None,
            )
            for index, row in enumerate(self.prompt_set.rows)
        ]

    def judged_by(self, scorers: Sequence[Scorer]) -> Self:
        return replace(self, scorers=scorers)

    def settings(self) -> Record:
        return {"prompt list": self.prompt_set.version}

    def tasks(self) -> list[Task]:
        if not self.scorers:
            raise ValueError(f"judging {self.name} needs at least one scorer; none was given")
        items = self.items()
        return [Task(scorer, items) for scorer in self.scorers]

    def row(self, item: Item, judged: Judgements) -> Record:
        """filename, index, tag, prompt, values, scorers, detail."""
        values: dict[str, float] = {}
        detail: dict[str, object] = {}
        for name, (_, score) in judged.items():
            values |= {name: score["value"]} if "value" in score else score["values"]
            detail |= {key: fact for key, fact in score.items() if key not in ("value", "values")}
        return {
            "filename": item.name,
            "index": item.index,
            "tag": item.task,
            "prompt": item.prompt,
            "values": values,
            "scorers": {name: scorer.version for name, (scorer, _) in judged.items()},
            "detail": detail,
        }

    def protocol(self) -> Record:
        made = self.official_samples[self.name]
        limited = self.limited()
        return {
            **({"limited": limited} if limited else {"prompts": "all"}),
            "prompt list": self.prompt_set.version,
            "images per prompt": self.samples if self.samples == made else f"{self.samples} (the official protocol makes {made})",
            "scorers": {scorer.name: scorer.version for scorer in self.scorers},
        }
