"""The table of benchmarks, one row for each. `diffalign bench`, its help, `bench ls` and docs/options.md read it.

Literal, and read without importing numpy. To register a benchmark write its folder and add its row: docs/adding_a_benchmark.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from diffalign.benchmarks.context import BenchmarkOptions
from diffalign.benchmarks.dpg.options import DPGOptions
from diffalign.benchmarks.geneval.options import GenEvalOptions
from diffalign.benchmarks.geneval2.options import GenEval2Options
from diffalign.benchmarks.prompt_sets.options import DrawBenchOptions, HPSv2Options, PartiOptions
from diffalign.benchmarks.shapes.options import ShapesOptions
from diffalign.benchmarks.t2i_compbench.options import T2IOptions

if TYPE_CHECKING:
    from diffalign.benchmarks.base import Benchmark


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table."""

    name: str
    """On the command line."""
    target: str
    """Where its class is, as "module:Class", a `base.Benchmark`."""
    options: type[BenchmarkOptions]
    """What it takes besides the options of every run."""
    samples: int
    """Images per prompt of the official protocol."""
    verdicts: bool = False
    """Judged right or wrong, rather than by scores."""
    by_reward: bool = False
    """Judged by the rewards that --reward and --watch name."""
    real: bool = True
    """Whether its prompts are of the real world, which the embedded models cannot draw."""
    paper: str
    """Where it comes from, short."""
    summary: str
    """What it measures, in one line."""

    def load(self) -> type[Benchmark]:
        """The class. This is where its imports happen."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)


_ROWS = (
    Row(
        name="shapes",
        target="diffalign.benchmarks.shapes.benchmark:ShapesBenchmark",
        options=ShapesOptions,
        samples=1,
        verdicts=True,
        real=False,
        paper="docs/shapes.md",
        summary="the embedded world: six tasks as GenEval's, held-out prompts, an exact judge",
    ),
    Row(
        name="geneval",
        target="diffalign.benchmarks.geneval.benchmark:GenEvalBenchmark",
        options=GenEvalOptions,
        samples=4,
        verdicts=True,
        paper="Ghosh et al. 2023, arXiv 2310.11513",
        summary="553 prompts on objects, counts, colours, positions; judged by a detector",
    ),
    Row(
        name="t2i-compbench",
        target="diffalign.benchmarks.t2i_compbench.benchmark:T2ICompBench",
        options=T2IOptions,
        samples=10,
        paper="Huang et al. 2023, arXiv 2307.06350",
        summary="eight categories of compositions, also of T2I-CompBench++, each with its own judge",
    ),
    Row(
        name="dpg",
        target="diffalign.benchmarks.dpg.benchmark:DPGBenchmark",
        options=DPGOptions,
        samples=4,
        paper="Hu et al. 2024 (ELLA), arXiv 2403.05135",
        summary="1,065 dense prompts; judged by answers to questions about each",
    ),
    Row(
        name="geneval2",
        target="diffalign.benchmarks.geneval2.benchmark:GenEval2Benchmark",
        options=GenEval2Options,
        samples=1,
        paper="2025, arXiv 2512.16853",
        summary="800 prompts of 3 to 10 atoms; soft scores of a question about each atom",
    ),
    Row(
        name="parti",
        target="diffalign.benchmarks.prompt_sets.benchmark:PromptSetBenchmark",
        options=PartiOptions,
        samples=1,
        by_reward=True,
        paper="Yu et al. 2022, arXiv 2206.10789",
        summary="PartiPrompts: 1,632 prompts in 12 categories; judged by reward models",
    ),
    Row(
        name="hpsv2",
        target="diffalign.benchmarks.prompt_sets.benchmark:PromptSetBenchmark",
        options=HPSv2Options,
        samples=1,
        by_reward=True,
        paper="Wu et al. 2023, arXiv 2306.09341",
        summary="4 styles of 800 prompts; judged by reward models",
    ),
    Row(
        name="drawbench",
        target="diffalign.benchmarks.prompt_sets.benchmark:PromptSetBenchmark",
        options=DrawBenchOptions,
        samples=1,
        by_reward=True,
        paper="Saharia et al. 2022 (Imagen), arXiv 2205.11487",
        summary="200 prompts in 11 categories; judged by reward models",
    ),
)
BENCHMARKS: Mapping[str, Row] = {row.name: row for row in _ROWS}


def owners(option: str) -> tuple[str, ...]:
    """The benchmarks that take an option, by its field's name."""
    return tuple(row.name for row in _ROWS if option in row.options.__dataclass_fields__)
