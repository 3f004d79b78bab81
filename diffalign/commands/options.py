"""Options that several subcommands share: what they accept, their defaults, and what they mean together."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.commands.evaluation import DEFAULT_PIPELINE, DEFAULT_REWARD
from diffalign.methods.table import METHODS as METHODS_TABLE
from diffalign.methods.table import NOISE, find_method, names, suggestion

METHODS = ("none", *names(NOISE))  # none: no search
DTYPES = ("float32", "float16", "bfloat16")
MEMORY = ("checkpointing", "sliced-decoder", "offload-text", "offload-all")
SEED_LIMIT = 2**63  # what torch.Generator takes


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a table, with the nearest one that is."""
    return f"unknown {kind} {name!r}; {suggestion(name, list(known))}"


def pipeline_name(text: str) -> str:
    """A preset, a local folder, or a hub id "owner/name"."""
    from diffalign.pipelines.presets import PRESETS, get_preset

    if text not in PRESETS and ("/" in text or os.sep in text or Path(text).is_dir()):
        return text
    try:
        get_preset(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def reward_name(text: str) -> str:
    from diffalign.hub import reward_specs

    names = reward_specs()
    if text not in names:
        raise argparse.ArgumentTypeError(unknown("reward", text, names))
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


def reward_rule(text: str) -> str:
    """NAME or NAME=NUMBER of a rule that makes several rewards one."""
    return _rule(text, "RULES", "rule")


def gradient_rule(text: str) -> str:
    return _rule(text, "GRADIENT_RULES", "gradient rule")


def _rule(text: str, table: str, kind: str) -> str:
    from diffalign.rewards import names

    try:
        names.parse(text, getattr(names, table), kind)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def method_name(text: str) -> str:
    if text not in METHODS:
        raise argparse.ArgumentTypeError(unknown("method", text, METHODS))
    return text


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1, None)


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


def _whole(text: str, least: int, most: int | None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"between {least} and {most}"
        raise argparse.ArgumentTypeError(f"must be a whole number, {limits}; got {text!r}")
    return value


class Formerly(argparse.Action):
    """An option that has another name now: an error that says so."""

    def __init__(self, option_strings: Sequence[str], dest: str, new: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, help=help)
        self.new = new

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.error(f"{option_string} is {self.new} now: write {self.new} {values}")


def methods_help() -> str:
    """A line for each search over noise, to stand under a command's options."""
    lines = [f"  {row.name:<12} {row.summary}" for row in METHODS_TABLE if row.kind == NOISE]
    return "\n".join(["methods:", f"  {'none':<12} no search: the image that the seed gives", *lines])


def add_model_options(parser: argparse.ArgumentParser, pipeline: str | None = DEFAULT_PIPELINE) -> None:
    """--pipeline, --reward, --watch and what concerns the machine. pipeline: the default; None: it depends on what is asked for."""
    default = pipeline or f"{DEFAULT_PIPELINE} for shapes, needed otherwise"
    pipeline_help = f"a preset, a local folder, or a hub id (default: {default})"
    parser.add_argument("--pipeline", type=pipeline_name, default=pipeline, metavar="NAME", help=pipeline_help)
    default = " ".join(f"{name}={weight}" for name, weight in DEFAULT_REWARD.items())
    parser.add_argument(
        "--reward",
        type=reward_weight,
        nargs="+",
        action="extend",
        metavar="NAME=WEIGHT",
        help=f"what to optimise: a weighted sum (default with the shapes pipelines: {default})",
    )
    watch_help = "rewards to report without optimising them"
    parser.add_argument("--watch", type=reward_name, nargs="+", action="extend", metavar="NAME", help=watch_help)
    add_rule_options(parser)
    budget_help = "evaluations of the generator for each image, the same for every method (default: %(default)s)"
    parser.add_argument("--budget", type=count, default=50, metavar="N", help=budget_help)
    for old in ("--iterations", "--evaluations"):
        parser.add_argument(old, action=Formerly, new="--budget", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=count, metavar="N", help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--guidance-scale", type=scale, metavar="X", help="classifier-free guidance (default: the pipeline's own)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="number type of the pipeline (default: the pipeline's own for the device)")
    add_memory_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """--memory and --attention, of every command that loads a pipeline."""
    parser.add_argument("--memory", choices=MEMORY, nargs="+", default=(), metavar="WAY", help=f"spend less of it: {', '.join(MEMORY)}")
    parser.add_argument("--attention", choices=("sdpa", "xformers"), default="sdpa", help="torch's own, or that of the extra xformers")


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """--reward-rule, --reward-gradient, --calibration; docs/reward_mixing.md says when to use which."""
    from diffalign.rewards.names import GRADIENT_RULES, RULES, forms

    rule_help = f"how several rewards become one: {forms(RULES)} (default: %(default)s)"
    parser.add_argument("--reward-rule", type=reward_rule, default="weighted", metavar="NAME", help=rule_help)
    gradient_help = f"how their gradients become one, for reno: {forms(GRADIENT_RULES)} (default: as the rule has it)"
    parser.add_argument("--reward-gradient", type=gradient_rule, metavar="NAME", help=gradient_help)
    calibration_help = "common units of the rewards, which every rule but weighted needs; `diffalign calibrate` makes one"
    parser.add_argument("--calibration", type=Path, metavar="FILE.json", help=calibration_help)


def rule_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the rule adds to a run's settings: nothing where nothing was asked for. A calibration counts by its content, not its path."""
    settings: dict[str, Any] = {}
    if args.reward_rule != "weighted":
        settings["reward_rule"] = args.reward_rule
    if args.reward_gradient:
        settings["reward_gradient"] = args.reward_gradient
    if args.calibration:
        settings["calibration"] = hashlib.sha256(args.calibration.read_bytes()).hexdigest()[:16]
    return settings


def check_rule(args: argparse.Namespace) -> None:
    """Raises ValueError where the rule lacks its calibration, or the file is not there. Before anything is loaded."""
    from diffalign.rewards.names import RULES

    name = args.reward_rule.partition("=")[0]
    if RULES[name].calibrated and not args.calibration:
        raise ValueError(f"--reward-rule {name} compares rewards, so it needs --calibration FILE.json; `diffalign calibrate` makes one")
    if args.calibration and not args.calibration.is_file():
        raise ValueError(f"--calibration {args.calibration} does not exist; `diffalign calibrate` makes one")


def warn_of_unknown_words(pipeline: str | None, prompts: Sequence[str]) -> None:
    """Says on stderr, before anything runs, where the embedded models are given words that they have never read."""
    from diffalign.shapes.words import warning

    text = warning(prompts) if is_shapes(pipeline) else None
    if text:
        print(f"warning: {text}", file=sys.stderr)  # noqa: T201


def is_shapes(pipeline: str | None) -> bool:
    return pipeline in ("shapes", "shapes-turbo")


def reward_mix(args: argparse.Namespace) -> dict[str, float]:
    """The rewards to optimise, in the order given. Raises ValueError for one given twice, none where no default fits, a rule amiss."""
    check_rule(args)
    given: Sequence[tuple[str, float]] = args.reward or ()
    names = [name for name, _ in given]
    twice = {name for name in names if names.count(name) > 1} | (set(names) & set(args.watch or ()))
    if twice:
        raise ValueError(f"reward {', '.join(sorted(twice))} is given more than once; name each in --reward or --watch, once")
    if given:
        return dict(given)
    if is_shapes(args.pipeline):
        # the default weights are of native units; calibrated rewards count alike
        return dict.fromkeys(DEFAULT_REWARD, 1.0) if args.calibration else dict(DEFAULT_REWARD)
    raise ValueError(f"--reward is needed with --pipeline {args.pipeline}: the default reward knows shapes only")


def require_gradient(methods: Iterable[str], mix: Mapping[str, float]) -> None:
    """Raises ValueError where a method needs a gradient that a reward does not have, as the table of rewards says."""
    from diffalign.hub import reward_specs

    flat = [name for name in mix if not reward_specs()[name].differentiable]
    climbing = [name for name in methods if name != "none" and find_method(name, NOISE).needs_gradient]
    if flat and climbing:
        raise ValueError(f"reward {flat[0]!r} has no gradient, which {climbing[0]} climbs; --watch it, or use --method best-of-n")


def batch_size(args: argparse.Namespace, shapes_default: int) -> int:
    """The given --batch-size; else one image at a time, or `shapes_default` for the embedded models, which are tiny."""
    return args.batch_size or (shapes_default if is_shapes(args.pipeline) else 1)


def stock_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The diffusers arguments that were given; what is absent is left to the preset."""
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    return {name: value for name, value in given.items() if value is not None}
