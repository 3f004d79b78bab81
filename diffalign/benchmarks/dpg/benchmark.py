"""DPG-Bench as a benchmark: its prompts, its questions from the user's clone, its grids, its categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from diffalign.benchmarks.base import Models, Record
from diffalign.benchmarks.context import Context
from diffalign.benchmarks.dpg.judge import DpgScorer, categories, cut_grids, require_questions, write_grids, write_official
from diffalign.benchmarks.dpg.options import DPGOptions
from diffalign.benchmarks.dpg.questions import Questions, parse_questions
from diffalign.benchmarks.lists import HOMES, read_prompt_set
from diffalign.benchmarks.models.vqa import GivenAnswers, asked
from diffalign.benchmarks.prompt_list import PromptBenchmark
from diffalign.benchmarks.sources import read_source

QUESTIONS = ("dpg_bench.csv", "dpg_bench/dpg_bench.csv")


@dataclass(frozen=True)
class DPGBenchmark(PromptBenchmark):
    """Judged by answers to its questions."""

    options: DPGOptions = DPGOptions()

    breakdown_title: ClassVar[str] = "Categories of questions, percent of yes"

    @classmethod
    def build(cls, options: DPGOptions, context: Context) -> DPGBenchmark:
        return replace(cls.of(read_prompt_set("dpg", str(options.prompts)), context), options=options)

    def questions(self) -> dict[str, Questions]:
        """Item id -> questions, of every prompt that is run. Raises FileNotFoundError where the question file is not at hand."""
        source = self.options.questions or str(self.options.prompts)
        try:
            text = read_source(source, QUESTIONS, HOMES["dpg"])
        except FileNotFoundError as error:
            what = f"the questions of DPG-Bench are in dpg_bench.csv, which is not at {source}"
            raise FileNotFoundError(f"{what}; name that file with --questions") from error
        questions = parse_questions(text, source)
        require_questions(questions, self.items())
        return questions

    def ready(self) -> None:
        if self.context and self.context.judges:
            self.questions()

    def with_judges(self, models: Models) -> DPGBenchmark:
        answers = GivenAnswers.read(self.options.answers) if self.options.answers else asked(self.options.judge, models)
        return self.judged_by([DpgScorer(answers, self.questions())])

    def breakdown(self, rows: Sequence[Record]) -> Mapping[str, float]:
        return categories(rows, self.questions())

    def official(self, folder: Path, rows: Sequence[Record]) -> None:
        write_official(folder, rows, self.breakdown(rows))

    def export(self, folder: Path) -> None:
        write_grids(self.items(), folder)

    def bring(self, images: Path, out: Path) -> Path:
        """Upstream's grids are cut into OUT/tiles, which are judged instead."""
        items = self.items()
        if not any((images / f"{item.metadata['item_id']}.png").is_file() for item in items):
            return images
        cut_grids(items, images, out / "tiles")
        return out / "tiles"
