"""For `diffalign train` and `pairs`, whose options are argparse's own and not yet a settings class: --config, and what they share.

The file's entries are turned into arguments and read by the same parser, so they are checked in the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from diffalign.cli.options import is_shapes


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="options from a file; the command line overrides them")


def batch_size(args: argparse.Namespace, for_shapes: int) -> int:
    """The given --batch-size; else one image at a time, or `for_shapes` for the embedded models, which are tiny."""
    return args.batch_size or (for_shapes if is_shapes(args.pipeline) else 1)


def stock_arguments(args: argparse.Namespace) -> dict[str, int | float]:
    """The diffusers arguments that were given; what is absent is left to the preset."""
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    return {name: value for name, value in given.items() if value is not None}


def expand(argv: Sequence[str]) -> list[str]:
    """`argv` with the entries of its --config file, if any, as further arguments, except those that it gives itself.

    Raises ValueError where the file is missing or is not a flat mapping of options.
    """
    argv = list(argv)
    given = {argument.split("=", 1)[0] for argument in argv if argument.startswith("--")}
    if "--config" not in given:
        return argv
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_config(reader)
    file = reader.parse_known_args(argv)[0].config
    extra: list[str] = []
    for name, value in import_module("diffalign.cli.config_file").mapping(file).items():
        option = "--" + str(name).replace("_", "-")
        if option == "--config":
            raise ValueError(f"{file}: a config cannot name another config")
        if option not in given:
            extra += arguments(option, value, file)
    return [*argv, *extra]


def arguments(option: str, value: object, file: Path) -> list[str]:
    """One entry as it would be typed: true is the bare option, false and null are its absence, a mapping is NAME=VALUE each."""
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    if isinstance(value, dict):
        value = [f"{name}={number}" for name, number in value.items()]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, dict | list) for each in values):
        raise ValueError(f"{file}: {option[2:]} must be a value, a list or a flat mapping; got {value!r}")
    return [option, *map(str, values)] if values else []
