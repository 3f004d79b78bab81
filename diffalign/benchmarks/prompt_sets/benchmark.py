"""PartiPrompts, HPSv2 and DrawBench: prompts without rules of their own, whose images reward models judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffalign.benchmarks.base import Models, Record
from diffalign.benchmarks.context import Context
from diffalign.benchmarks.lists import read_prompt_set
from diffalign.benchmarks.prompt_list import PromptBenchmark
from diffalign.benchmarks.prompt_sets.options import PartiOptions
from diffalign.benchmarks.prompt_sets.preference import RewardScorer, hpsv2_table
from diffalign.files import write_text


@dataclass(frozen=True)
class PromptSetBenchmark(PromptBenchmark):
    """Judged by the rewards that the run names."""

    breakdown_title: ClassVar[str] = "By challenge, mean of the first reward"

    @classmethod
    def build(cls, options: PartiOptions, context: Context) -> PromptSetBenchmark:
        return cls.of(read_prompt_set(context.name, str(options.prompts)), context)

    def with_judges(self, models: Models) -> PromptSetBenchmark:
        names = self.context.rewards if self.context else ()
        scorers = [RewardScorer(models.reward(name), name, f"{name} ({models.unit(name)})", models.device) for name in names]
        return self.judged_by(scorers)

    def official(self, folder: Path, rows: Sequence[Record]) -> None:
        """hpsv2.txt: each reward's styles, as the official evaluator prints them: mean and spread of ten groups."""
        if self.name != "hpsv2":
            return
        lines = [
            f"{measure} {style:<14} {mean:.4f} {spread:.4f}"
            for measure in rows[0]["values"]
            for style, (mean, spread) in hpsv2_table(rows, measure).items()
        ]
        write_text(folder / "hpsv2.txt", "\n".join(lines) + "\n")

    def breakdown(self, rows: Sequence[Record]) -> Mapping[str, float]:
        """PartiPrompts' second division: challenge -> mean of the first measure."""
        if self.name != "parti":
            return {}
        found: dict[str, list[float]] = {}
        for row in rows:
            challenge = self.prompt_set.rows[row["index"]].metadata["challenge"]
            found.setdefault(challenge, []).append(next(iter(row["values"].values())))
        return {challenge: sum(values) / len(values) for challenge, values in sorted(found.items())}
