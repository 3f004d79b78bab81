"""From a word of the command line to a value; each raises argparse.ArgumentTypeError with the sentence to show. Nothing heavy loads."""

from __future__ import annotations

import argparse
import ast
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffalign import hub
from diffalign.methods.table import METHODS, NOISE, STEP, names, suggestion
from diffalign.pipelines.presets import PRESETS, get_preset
from diffalign.rewards import names as rules

SEARCHES = ("none", *names(NOISE))  # none: no search
GUIDANCE = ("full", *names(STEP))  # full: the pipeline's own guidance
DTYPES = ("float32", "float16", "bfloat16")
SEED_LIMIT = 2**63  # what torch.Generator takes


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a table, with the nearest one that is."""
    return f"unknown {kind} {name!r}; {suggestion(name, list(known))}"


def searches_help() -> str:
    """A line for each search over noise, to stand under a command's options."""
    lines = [f"  {row.name:<12} {row.summary}" for row in METHODS if row.kind == NOISE]
    return "\n".join(["methods:", f"  {'none':<12} no search: the image that the seed gives", *lines])


# ---- names -----------------------------------------------------------------------------------------------------------------------


def pipeline_name(text: str) -> str:
    """A preset, a local folder, or a hub id "owner/name"."""
    if text not in PRESETS and ("/" in text or os.sep in text or Path(text).is_dir()):
        return text
    try:
        get_preset(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def reward_name(text: str) -> str:
    known = hub.reward_specs()
    if text not in known:
        raise argparse.ArgumentTypeError(unknown("reward", text, known))
    return text


def reward_weight(text: str) -> tuple[str, float]:
    """NAME=WEIGHT, or NAME alone for a weight of 1."""
    name, equals, number = text.partition("=")
    reward_name(name)
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise argparse.ArgumentTypeError(f"the weight of {name} must be a finite number other than 0, as in {name}=0.5; got {number!r}")
    return name, weight


def scored_reward(text: str) -> str:
    """A reward of `diffalign score`, where there is nothing to weigh and the folder comes first."""
    name, equals, _ = text.partition("=")
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; it comes first, as in diffalign score {text} --reward NAME")
    reward_name(name)
    if equals:
        raise argparse.ArgumentTypeError(f"every reward is scored by itself, in its own unit, so {name} takes no weight; got {text!r}")
    return name


def source(text: str) -> tuple[str, str | None, str]:
    """NAME=PLACE or NAME:PART=PLACE as (name, part or None, place)."""
    target, equals, place = text.partition("=")
    name, colon, part = target.partition(":")
    if not equals or not place or (colon and not part):
        raise argparse.ArgumentTypeError(f"must be NAME=PLACE or NAME:PART=PLACE; got {text!r}")
    reward_name(name)
    return name, part or None, place


def reward_rule(text: str) -> str:
    """NAME or NAME=NUMBER of a rule that makes several rewards one."""
    return _rule(text, rules.RULES, "rule")


def gradient_rule(text: str) -> str:
    return _rule(text, rules.GRADIENT_RULES, "gradient rule")


def _rule(text: str, table: Mapping[str, rules.Named], kind: str) -> str:
    try:
        rules.parse(text, table, kind)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def search_name(text: str) -> str:
    if text not in SEARCHES:
        raise argparse.ArgumentTypeError(unknown("method", text, SEARCHES))
    return text


def guidance_name(text: str) -> str:
    if text not in GUIDANCE:
        raise argparse.ArgumentTypeError(unknown("guidance method", text, GUIDANCE))
    return text


def lora(text: str) -> Path:
    """A .safetensors file, or a folder with one, as diffusers and `diffalign train` write it."""
    given = Path(text)
    if given.is_dir() and len(list(given.glob("*.safetensors"))) == 1:
        return given
    if given.is_file() and given.suffix == ".safetensors":
        return given
    raise argparse.ArgumentTypeError(f"must be a .safetensors file of LoRA weights, or a folder with one such file; got {text!r}")


def setting(text: str) -> tuple[str, object]:
    """NAME=VALUE; the value is read as Python would (numbers, True, None, tuples), else it is text."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, as in beta=500; got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


# ---- numbers ---------------------------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1, None)


def count_or_none(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0, None)


def seed(text: str) -> int:
    return _whole(text, 0, SEED_LIMIT - 1)


def port(text: str) -> int:
    return _whole(text, 0, 65535)


def scale(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0; got {text!r}")
    return value


def seconds(text: str) -> float:
    """A finite number above 0."""
    if not (value := scale(text)):
        raise argparse.ArgumentTypeError(f"must be greater than 0; got {text!r}")
    return value


def cosine(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not -1 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a cosine, above -1 and at most 1, as in 0.995; got {text!r}")
    return value


def refresh(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 2, got {text!r}")
    return int(text)


def _whole(text: str, least: int, most: int | None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"between {least} and {most}"
        raise argparse.ArgumentTypeError(f"must be a whole number, {limits}; got {text!r}")
    return value
