"""A list of prompts judged by any scorers: preference models on PartiPrompts, HPSv2 and DrawBench, questions on DPG-Bench and GenEval 2.

A row holds one number per measure, since rewards on different scales have no mean: {"pickscore": 22.1, "imagereward": 0.7}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.benchmarks.base import Item, item_seed, limited_to, spread_over_tasks
from diffalign.benchmarks.prompt_sets.lists import PromptSet
from diffalign.benchmarks.scoring import Fault, Scorer, Task, collect_all, score_all

SAMPLES = {"parti": 1, "hpsv2": 1, "drawbench": 1, "dpg": 4, "geneval2": 1}  # images per prompt of the official protocols


@dataclass(frozen=True)
class PromptBenchmark:
    """`limit` prompts (None: all), as many of each task as goes, with `samples` images each.

    A scorer gives {"value": number}, which becomes the measure of its name, or {"values": {measure: number}}; the rest is detail.
    Without scorers it can only say what to generate. With `allow_missing` the rows may be fewer than the items.
    """

    prompts: PromptSet
    scorers: Sequence[Scorer] = ()
    samples: int = 1
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    allow_missing: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1; got {self.samples}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 prompt; got {self.limit}")
        if self.name == "hpsv2" and self.samples != 1:
            raise ValueError(f"hpsv2 has room for one image per prompt, STYLE/00012.jpg; got samples {self.samples}")

    @property
    def name(self) -> str:
        return self.prompts.name

    def items(self) -> list[Item]:
        rows = self.prompts.rows
        return [
            Item(
                index,
                sample,
                item_seed(self.seed, index, sample),
                rows[index].task,
                rows[index].prompt,
                {"prompt": rows[index].prompt, "tag": rows[index].task, **rows[index].metadata},
                rows[index].path and rows[index].path.format(sample=sample),
            )
            for index in spread_over_tasks([row.task for row in rows], self.limit)
            for sample in range(self.samples)
        ]

    def limited(self) -> str | None:
        """What a figure of fewer than all prompts must be quoted with."""
        return limited_to([row.task for row in self.prompts.rows], self.limit)

    def tasks(self) -> list[Task]:
        """What there is to judge. Raises ValueError without a scorer."""
        if not self.scorers:
            raise ValueError(f"judging {self.name} needs at least one scorer; none was given")
        items = self.items()
        return [Task(scorer, items) for scorer in self.scorers]

    def score(self, folder: Path) -> list[dict[str, Any]]:
        """Judges what has not been judged; one row per item in their order: filename, index, tag, prompt, values, scorers, detail.

        Raises FileNotFoundError naming images that are missing or cut short, unless they are allowed.
        """
        return score_all(self, folder)

    def judged(self, folder: Path) -> tuple[list[dict[str, Any]], list[Fault]]:
        """Rows of what has been judged by all scorers, by whichever shard, and what has not."""
        found, faults = collect_all(self.tasks(), folder)
        items = self.items()
        rows = [_row(item, found[item.name]) for item in items if item.name not in faults]
        return rows, [faults[item.name] for item in items if item.name in faults]

    def protocol(self) -> dict[str, Any]:
        """What a figure of this run must be quoted with."""
        official = self.samples == SAMPLES[self.name]
        limited = self.limited()
        return {
            **({"limited": limited} if limited else {"prompts": "all"}),
            "prompt list": self.prompts.version,
            "images per prompt": self.samples if official else f"{self.samples} (the official protocol makes {SAMPLES[self.name]})",
            "scorers": {scorer.name: scorer.version for scorer in self.scorers},
        }


def _row(item: Item, scores: dict[str, tuple[Scorer, Any]]) -> dict[str, Any]:
    values: dict[str, float] = {}
    detail: dict[str, Any] = {}
    for name, (_, score) in scores.items():
        values |= {name: score["value"]} if "value" in score else score["values"]
        detail |= {key: fact for key, fact in score.items() if key not in ("value", "values")}
    return {
        "filename": item.name,
        "index": item.index,
        "tag": item.task,
        "prompt": item.prompt,
        "values": values,
        "scorers": {name: scorer.version for name, (scorer, _) in scores.items()},
        "detail": detail,
    }
