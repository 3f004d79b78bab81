"""`--config FILE.yaml`: values for a command's options, by their names, checked as if they had been typed."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from diffalign.cli.arguments import renamed
from diffalign.options import Found, dashed, options_of


def from_file(defaults: object, file: Path) -> dict[str, object]:
    """Option name -> value, of a YAML file with the options' names. Raises ValueError naming the file and what is wrong in it.

    defaults: an instance of the settings class.
    """
    known = {each.name: each for each in options_of(type(defaults), instance=defaults)}
    formerly = {old: each for each in known.values() for old in each.option.formerly}
    values: dict[str, object] = {}
    for key, value in mapping(file).items():
        name = str(key).replace("-", "_")
        if name == "config":
            raise ValueError(f"{file}: a config cannot name another config")
        if f"--{dashed(name)}" in formerly:
            new = f"--{dashed(formerly[f'--{dashed(name)}'].name)}"
            raise ValueError(f"{file}: {renamed(f'--{dashed(name)}', new, value)}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{file}: unknown option {key!r}; {hint}")
        if value is not None:
            values[name] = _value(known[name], value, file)
    return values


def _value(each: Found, value: object, file: Path) -> object:
    """A value of the file as the option's own, checked as if it had been typed."""
    if isinstance(each.default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{file}: {each.name} must be true or false; got {value!r}")
        return value
    if isinstance(value, dict):
        value = [f"{name}={number}" for name, number in value.items()]
    words = value if isinstance(value, list) else [value]
    if any(isinstance(word, dict | list) for word in words):
        raise ValueError(f"{file}: {each.name} must be a value, a list or a flat mapping; got {value!r}")
    if len(words) != 1 and not each.option.many:
        raise ValueError(f"{file}: {each.name} takes one value; got {value!r}")
    parsed = []
    for word in map(str, words):
        try:
            parsed.append(each.option.parse(word))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(f"{file}: {each.name}: {error}") from error
        if each.option.choices and parsed[-1] not in each.option.choices:
            raise ValueError(f"{file}: {each.name} must be one of {', '.join(each.option.choices)}; got {word!r}")
    return tuple(parsed) if each.option.many else parsed[0]


def mapping(file: Path) -> dict[object, object]:
    """The file as a mapping. OmegaConf reads numbers such as 3e-5 as numbers, which plain YAML does not."""
    try:
        data = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except FileNotFoundError as error:
        raise ValueError(f"--config {file} does not exist") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"--config {file} must be a mapping of options, as in `limit: 60`; got {type(data).__name__}")
    return data
