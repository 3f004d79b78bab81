"""GenEval 2 as a benchmark: its prompts from the user's clone, soft scores of the questions about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from diffalign.benchmarks.base import Models, Record
from diffalign.benchmarks.context import Context
from diffalign.benchmarks.geneval2.judge import GenEval2Scorer, GivenScores, skills, write_official
from diffalign.benchmarks.geneval2.options import GenEval2Options
from diffalign.benchmarks.lists import read_prompt_set
from diffalign.benchmarks.models.vqa import asked
from diffalign.benchmarks.prompt_list import PromptBenchmark


@dataclass(frozen=True)
class GenEval2Benchmark(PromptBenchmark):
    """Judged by the probabilities of right answers."""

    options: GenEval2Options = GenEval2Options()

    breakdown_title: ClassVar[str] = "Skills, 100 x the mean probability of the right answer"

    @classmethod
    def build(cls, options: GenEval2Options, context: Context) -> GenEval2Benchmark:
        return replace(cls.of(read_prompt_set("geneval2", str(options.prompts)), context), options=options)

    def with_judges(self, models: Models) -> GenEval2Benchmark:
        given = self.options.answers
        return self.judged_by([GivenScores.read(given) if given else GenEval2Scorer(asked(self.options.judge, models))])

    def breakdown(self, rows: Sequence[Record]) -> Mapping[str, float]:
        return skills(rows)

    def official(self, folder: Path, rows: Sequence[Record]) -> None:
        write_official(folder, rows, self.items())
