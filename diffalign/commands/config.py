"""`--config FILE.yaml`: a file of options, which the command line overrides.

The file's entries are turned into arguments and read by the same parser, so they are checked in the same way, and a preset can hold
nothing that could not be typed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="options from a file; the command line overrides them")


def expand(argv: Sequence[str]) -> list[str]:
    """`argv` with the entries of its --config file, if any, as further arguments, except those that it gives itself.

    Raises ValueError where the file is missing or is not a flat mapping of options.
    """
    argv = list(argv)
    given = {argument.split("=", 1)[0] for argument in argv if argument.startswith("--")}
    if "--config" not in given:
        return argv
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_option(reader)
    file = reader.parse_known_args(argv)[0].config
    extra: list[str] = []
    for name, value in read(file).items():
        option = "--" + str(name).replace("_", "-")
        if option == "--config":
            raise ValueError(f"{file}: a config cannot name another config")
        if option not in given:
            extra += arguments(option, value, file)
    return [*argv, *extra]


def read(file: Path) -> dict[str, Any]:
    """The file as a mapping. OmegaConf reads numbers such as 3e-5 as numbers, which plain YAML does not."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        data = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except FileNotFoundError as error:
        raise ValueError(f"--config {file} does not exist") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"--config {file} must be a mapping of options, as in `limit: 60`; got {type(data).__name__}")
    return data


def arguments(option: str, value: Any, file: Path) -> list[str]:
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
