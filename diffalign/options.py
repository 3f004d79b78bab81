"""Settings that can be typed: a frozen dataclass whose fields carry one line of help each. Flags, YAML and Python share that definition.

    @dataclass(frozen=True)
    class Sampling:
        seed: int = option(0, "of the first image", parse=int)

`cli/arguments.py` makes a parser of such a class, docs/options.md is made of it, and Python calls it as it is. A command's class holds
groups of options, each a class of its own: `sampling: Sampling = group("sampling", Sampling())`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """How a field is written on the command line."""

    help: str
    """One line, without the default, which is added."""
    parse: Callable[[str], object] = str
    """From one word to a value; raises argparse.ArgumentTypeError or ValueError with the sentence to show."""
    metavar: str | None = None
    """What the word is called in help; without one, the field's name in capitals."""
    choices: Sequence[str] = ()
    """The words that are allowed; empty: whatever `parse` takes."""
    many: bool = False
    """Several words, and the option may be repeated; the value is a tuple."""
    positional: bool = False
    """Without a dash, by its place."""
    advanced: bool = False
    """Shown by --help-advanced alone."""
    formerly: tuple[str, ...] = ()
    """Names that it once had, as "--iterations": they are refused with the new one."""


@dataclass(frozen=True)
class Found:
    """An option of a class: the field's name, the titles of the groups it lies in, how it is written, and its default (MISSING: needed)."""

    name: str
    group: str
    option: Option
    default: object


class Needed(ValueError):
    """An option that must be given was not."""


def option(
    default: T,
    help: str,
    *,
    parse: Callable[[str], object] = str,
    metavar: str | None = None,
    choices: Sequence[str] = (),
    many: bool = False,
    positional: bool = False,
    advanced: bool = False,
    formerly: tuple[str, ...] = (),
) -> T:
    """A field of a settings class. default: `dataclasses.MISSING` where it must be given."""
    facts = Option(help, parse, metavar, choices, many, positional, advanced, formerly)
    made: T = field(default=default, metadata={"option": facts})
    return made


def group(title: str, default: T) -> T:
    """A field that holds options of its own, shown under `title`. default: an instance; its values are the options' defaults here."""
    made: T = field(default=default, metadata={"group": title})
    return made


def options_of(cls: type, title: str = "options", instance: object = None) -> Iterator[Found]:
    """Every option of a class and of its groups, in order. instance: where defaults are read from; the fields' own without one."""
    for each in fields(cls):
        default = _default(each, instance)
        if "group" in each.metadata:
            yield from options_of(type(default), each.metadata["group"] or title, default)
        elif "option" in each.metadata:
            yield Found(each.name, title, each.metadata["option"], default)


def assemble(cls: type[T], values: dict[str, object], instance: object = None) -> T:
    """An instance of a class from option name -> value; what is absent has its default.

    Raises Needed naming what is absent and has no default.
    """
    made: dict[str, object] = {}
    lacking = []
    for each in fields(cls):
        default = _default(each, instance)
        if "group" in each.metadata:
            made[each.name] = assemble(type(default), values, default)
        elif "option" in each.metadata:
            made[each.name] = values.get(each.name, default)
            if made[each.name] is MISSING:
                lacking.append(each.name if each.metadata["option"].positional else f"--{dashed(each.name)}")
        else:
            made[each.name] = default
    if lacking:
        raise Needed(f"the following arguments are required: {', '.join(lacking)}")
    return cls(**made)


def dashed(name: str) -> str:
    return name.replace("_", "-")


def _default(each: Field[object], instance: object) -> object:
    return each.default if instance is None else getattr(instance, each.name)
