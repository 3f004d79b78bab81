"""`diffalign bench ls`: the table of benchmarks."""

from __future__ import annotations

import textwrap

from diffalign.benchmarks.table import BENCHMARKS
from diffalign.cli.commands import BenchList


def run(options: BenchList, command: str) -> int:
    width = max(map(len, BENCHMARKS))
    for row in BENCHMARKS.values():
        images = f"{row.samples} image{'s' if row.samples > 1 else ''} a prompt"
        text = f"{row.summary}. {images}; {row.paper}"
        print(textwrap.fill(f"{row.name:<{width}}  {text}", 100, subsequent_indent=" " * (width + 2)))
    print("`diffalign bench NAME --help` says what one takes")
    return 0
