"""What a benchmark is told of the run it is part of, by whoever runs it. Standard library alone: options are checked before numpy loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

STAGES = ("all", "generate", "score", "report")


@dataclass(frozen=True)
class Context:
    """A run, as far as a benchmark is concerned."""

    name: str
    """The benchmark's own name: one class may serve several rows of the table."""
    samples: int
    """Images per prompt."""
    limit: int | None = None
    """At most so many prompts; None: all."""
    seed: int = 0
    """Each image's seed is drawn from this, its prompt and sample."""
    stage: str = "all"
    """What is done, one of STAGES; where it is "generate" nobody judges."""
    out: Path = Path("outputs")
    """Where the run writes."""
    images: Path | None = None
    """A folder of images made elsewhere, judged in place; None: images are generated."""
    judge_batch: int = 8
    """Images shown to a scorer at once."""
    rewards: tuple[str, ...] = ()
    """The rewards that judge where rewards do: those that are only watched first, then those that a search may have climbed."""

    @property
    def judges(self) -> bool:
        return self.stage != "generate"


class BenchmarkOptions(Protocol):
    """What a benchmark takes besides the options of every run: a frozen dataclass of diffalign.options.option fields."""

    def check(self, context: Context) -> None:
        """Raises ValueError for what is needed and absent, or does not fit together: before anything loads."""
        ...


@dataclass(frozen=True)
class NoOptions:
    """Of a benchmark that takes none."""

    def check(self, context: Context) -> None:
        pass


def require_answers(context: Context, judge: str | None, answers: Path | None) -> None:
    """Of benchmarks of questions. Raises ValueError where nobody answers them."""
    if judge and answers:
        raise ValueError("--judge asks a model and --answers brings answers; give one of them")
    if context.judges and not judge and not answers:
        what = "--judge (vlm, or a hub id or folder of a Qwen-VL model) or --answers FILE.json"
        raise ValueError(f"{what} is needed: {context.name} is judged by answers to questions about its images")
    if answers and not answers.is_file():
        raise ValueError(f"--answers {answers} does not exist")
