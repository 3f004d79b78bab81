"""From a settings class (diffalign/options.py) to a parser, and from words and a YAML file to an instance of it.

argparse reads the words; what there is to read, its defaults and its help are the class's alone. A --config file gives values by the
options' names; what is typed wins, and `--no-NAME` takes back a flag that the file sets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TypeVar

from diffalign.cli.values import unknown
from diffalign.options import Found, assemble, dashed, options_of

T = TypeVar("T")
CONFIG, ADVANCED_HELP = "--config", "--help-advanced"
ADVANCED = "advanced"


class Parser(argparse.ArgumentParser):
    """Says what to do in one line; the whole usage is what --help is for."""

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            raise argparse.ArgumentError(None, unknown(str(action.metavar).lower(), value, action.choices))
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """One line for an option where it fits, and "NAME ..." where there may be several."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs in ("+", "*") else super()._format_args(action, default_metavar)


class _Formerly(argparse.Action):
    """An option that has another name now: an error that says so."""

    def __init__(self, option_strings: Sequence[str], dest: str, new: str, **facts: object) -> None:
        super().__init__(option_strings, dest, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
        self.new = new

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: object, option_string: str | None = None) -> None:
        parser.error(renamed(option_string or "", self.new, values))


def renamed(old: str, new: str, value: object) -> str:
    """The sentence for an old spelling."""
    return f"{old} is {new} now: write {new} {value}"


def add_options(parser: argparse.ArgumentParser, defaults: object, advanced: bool = False) -> None:
    """The options of a settings class, under the titles of their groups; `advanced` shows those as well, at the end.

    defaults: an instance of it.

    Nothing has a default here: what is not typed is not in the namespace, and comes from the file or the class.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    found = list(options_of(type(defaults), instance=defaults))
    for each in sorted(found, key=lambda each: each.option.advanced):  # stable: advanced ones last
        title = ADVANCED if each.option.advanced else each.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], each, shown=advanced or not each.option.advanced)
    reading = groups.get("options") or parser.add_argument_group("options")
    reading.add_argument(CONFIG, type=Path, metavar="FILE.yaml", help="options from a file; what is typed wins")
    if any(each.option.advanced for each in found):
        reading.add_argument(ADVANCED_HELP, action="help", help="all options, also the rarely needed ones")
    reading.add_argument("-h", "--help", action="help", help="this text")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def _add(group: argparse._ArgumentGroup, each: Found, shown: bool) -> None:
    option = each.option
    text = _help(each) if shown else argparse.SUPPRESS
    if isinstance(each.default, bool):
        group.add_argument(f"--{dashed(each.name)}", action="store_true", default=argparse.SUPPRESS, help=text)
        group.add_argument(
            f"--no-{dashed(each.name)}", dest=each.name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        return
    facts: dict[str, object] = {"type": option.parse, "default": argparse.SUPPRESS, "help": text, "metavar": option.metavar or "NAME"}
    if option.choices:
        facts["choices"] = option.choices
    if option.positional:
        if option.many:
            facts["nargs"] = "*"
        elif each.default is not MISSING:
            facts |= {"nargs": "?", "default": None}  # a suppressed default would be parsed like a word
        group.add_argument(each.name, **facts)  # type: ignore[arg-type]
        return
    if option.many:
        facts |= {"nargs": "+", "action": "extend"}
    group.add_argument(f"--{dashed(each.name)}", **facts)  # type: ignore[arg-type]
    for old in option.formerly:
        group.add_argument(old, action=_Formerly, new=f"--{dashed(each.name)}")


def _help(each: Found) -> str:
    return (each.option.help + default_in_words(each)).replace("%", "%%")


def default_in_words(each: Found) -> str:
    """ " (default: 50)"; nothing where there is none, or the help speaks of it."""
    value = each.default
    if value is MISSING:
        return " (needed)"
    if value is None or isinstance(value, bool) or value == () or "default" in each.option.help:
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"


def read(defaults: T, namespace: argparse.Namespace) -> T:
    """The instance with what was typed and with what the file of --config says. Raises ValueError, or Needed where something is lacking."""
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items() if value is not None}
    file = typed.pop("config", None)
    given = import_module("diffalign.cli.config_file").from_file(defaults, file) if file else {}  # OmegaConf takes a second to import
    return assemble(type(defaults), {**given, **typed}, defaults)
