"""What `diffalign bench geneval2` takes besides the options of every run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.context import Context, require_answers
from diffalign.options import option


@dataclass(frozen=True)
class GenEval2Options:
    """Prompts, and who answers the questions about them."""

    prompts: str | None = option(None, "your clone of GenEval2, its geneval2_data.jsonl, or a raw URL", metavar="PLACE")
    judge: str | None = option(None, "who answers: vlm, or a hub id or folder of a Qwen-VL model", metavar="NAME")
    answers: Path | None = option(None, "the official evaluator's scores instead", parse=Path, metavar="FILE.json")

    def check(self, context: Context) -> None:
        if not self.prompts:
            raise ValueError("--prompts is needed: your clone of https://github.com/facebookresearch/GenEval2, or its geneval2_data.jsonl")
        require_answers(context, self.judge, self.answers)
