"""What `diffalign bench parti`, `hpsv2` and `drawbench` take besides the options of every run: the place of their prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.benchmarks.context import Context
from diffalign.options import option


@dataclass(frozen=True)
class PartiOptions:
    """The place of the prompts."""

    prompts: str | None = option(None, "where they are: a folder, a file, or the raw URL of either", metavar="PLACE")
    home: ClassVar[str] = "your clone of https://github.com/google-research/parti, or its PartiPrompts.tsv"

    def check(self, context: Context) -> None:
        """Before hours of generation, not after."""
        if not self.prompts:
            raise ValueError(f"--prompts is needed: {self.home}")
        if context.judges and not context.rewards:
            raise ValueError(
                f"--reward or --watch is needed: {context.name} has no rules of its own, its images are judged by reward models"
            )


@dataclass(frozen=True)
class HPSv2Options(PartiOptions):
    """The place of the prompts."""

    home: ClassVar[str] = "the folder with anime.json, concept-art.json, paintings.json and photo.json of zhwang/HPDv2, or its URL"


@dataclass(frozen=True)
class DrawBenchOptions(PartiOptions):
    """The place of the prompts."""

    home: ClassVar[str] = "DrawBench as a .csv with the columns Prompts and Category, or a text file"
