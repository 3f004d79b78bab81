"""What `diffalign bench dpg` takes besides the options of every run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.context import Context, require_answers
from diffalign.options import option


@dataclass(frozen=True)
class DPGOptions:
    """Prompts, questions, and who answers them."""

    prompts: str | None = option(None, "your clone of ELLA, its dpg_bench.csv, or the raw URL of either", metavar="PLACE")
    judge: str | None = option(None, "who answers: vlm, or a hub id or folder of a Qwen-VL model", metavar="NAME")
    answers: Path | None = option(None, "answers that you bring instead", parse=Path, metavar="FILE.json")
    questions: str | None = option(None, "dpg_bench.csv, where --prompts does not hold it", metavar="FILE.csv")

    def check(self, context: Context) -> None:
        if not self.prompts:
            raise ValueError("--prompts is needed: your clone of https://github.com/TencentQQGYLab/ELLA")
        require_answers(context, self.judge, self.answers)
