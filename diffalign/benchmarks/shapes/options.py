"""What `diffalign bench shapes` takes besides the options of every run."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.benchmarks.context import Context
from diffalign.options import option

SPLITS = ("test", "validation", "train", "hard")


@dataclass(frozen=True)
class ShapesOptions:
    """Which prompts of the world."""

    split: str = option("test", "which prompts", choices=SPLITS)

    def check(self, context: Context) -> None:
        pass
