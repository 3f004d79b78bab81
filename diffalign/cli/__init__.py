"""The command line, one file per command and no algorithm: `diffalign` and `python -m diffalign`."""

from diffalign.cli.program import build_parser, main, parse

__all__ = ["build_parser", "main", "parse"]
