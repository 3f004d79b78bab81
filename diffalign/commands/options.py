"""Options that several subcommands share: what they accept, their defaults, and the parts they stand for."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

DEFAULT_PIPELINE = "shapes-turbo"
# For the shapes pipelines; the others must be told, since these rewards know shapes alone. shapes-clip counts in hundredths of a cosine.
DEFAULT_REWARD = {"shapes-clip": 0.2, "shapes-preference": 1.0}
METHODS = ("none", "best-of-n", "reno", "reno-paper")
DTYPES = ("float32", "float16", "bfloat16")
SEED_LIMIT = 2**63  # what torch.Generator takes


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a table, with the nearest one that is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def pipeline_name(text: str) -> str:
    """A preset, a local folder, or a hub id "owner/name"."""
    from diffalign.pipelines.presets import PRESETS, get_preset

    if text not in PRESETS and ("/" in text or os.sep in text or Path(text).is_dir()):
        return text
    try:
        get_preset(text)
    except (ValueError, NotImplementedError) as error:
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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--pipeline, --reward, --watch and what concerns the machine."""
    pipeline_help = "a preset, a local folder, or a hub id (default: %(default)s)"
    parser.add_argument("--pipeline", type=pipeline_name, default=DEFAULT_PIPELINE, metavar="NAME", help=pipeline_help)
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
    parser.add_argument(
        "--iterations",
        "--evaluations",
        dest="iterations",
        type=count,
        default=50,
        metavar="N",
        help="evaluations of the reward per image, the same budget for every method (default: %(default)s)",
    )
    parser.add_argument("--steps", type=count, metavar="N", help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--guidance-scale", type=scale, metavar="X", help="classifier-free guidance (default: the pipeline's own)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="number type of the pipeline (default: the pipeline's own for the device)")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """--reward-rule, --reward-gradient, --calibration; docs/reward_mixing.md says when to use which."""
    rule_help = "how several rewards become one: weighted, worst-case, soft-min=0.3, uncertainty=0.5, geometric (default: %(default)s)"
    parser.add_argument("--reward-rule", type=reward_rule, default="weighted", metavar="NAME", help=rule_help)
    gradient_help = "how their gradients become one, for reno: equal, pcgrad, mgda (default: as the rule has it)"
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


def is_shapes(pipeline: str) -> bool:
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
    climbing = [name for name in methods if name.startswith("reno")]
    if flat and climbing:
        raise ValueError(f"reward {flat[0]!r} has no gradient, which {climbing[0]} climbs; --watch it, or use --method best-of-n")


def batch_size(args: argparse.Namespace, shapes_default: int) -> int:
    """The given --batch-size; else one image at a time, or `shapes_default` for the embedded models, which are tiny."""
    return args.batch_size or (shapes_default if is_shapes(args.pipeline) else 1)


def load_parts(args: argparse.Namespace, mix: Mapping[str, float]) -> tuple[Any, Any]:
    """The pipeline, silent, and the reward on its device (None for an empty mix). This is where the heavy imports happen."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from diffalign.hub import load_pipeline, load_reward

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # loading is over in a second or two; downloads keep their bars
    pipeline = load_pipeline(args.pipeline, device=args.device, dtype=args.dtype)
    pipeline.set_progress_bar_config(disable=True)  # our own bar counts evaluations; one more per denoising step would bury it
    if not mix:
        return pipeline, None
    rules = {"rule": args.reward_rule, "gradient": args.reward_gradient, "calibration": args.calibration}
    return pipeline, load_reward(dict(mix), watch=tuple(args.watch or ()), **rules, device=str(pipeline.device))


def build_method(name: str, reward: Any, evaluations: int) -> Any:
    """The method at a budget of `evaluations`, or None for "none". "reno-paper" is ReNO with the settings of its paper.

    "reno" spends half of its budget on drawing starts: on the shapes world climbing alone raises the reward more than what the judge sees
    (scripts/reno_settings.py measures both).
    """
    if name == "none":
        return None
    from diffalign.methods import find_method

    try:
        if name == "reno-paper":
            return replace(find_method("reno").paper(reward), iterations=evaluations)
        if name == "reno":
            return find_method(name)(reward, iterations=evaluations, starts=max(evaluations // 2, 1))
        return find_method(name)(reward, evaluations=evaluations)
    except TypeError as error:  # the reward has no gradient: the user's choice, not a mistake of ours
        raise ValueError(str(error)) from error


def score(reward: Any, images: Sequence[Any], prompts: Sequence[str], device: Any) -> list[dict[str, list[float]]]:
    """Every reward of each finished image (PIL), in a trace's form: one evaluation each."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).to(device)
    with torch.no_grad():
        reward.prepare(prompts)
        scores = reward(pixels.permute(0, 3, 1, 2).float() / 255, prompts)
    columns = {name: values.tolist() for name, values in {"total": scores.total, **scores.parts, **scores.watched}.items()}
    return [{name: [values[i]] for name, values in columns.items()} for i in range(len(images))]


def stock_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The diffusers arguments that were given; what is absent is left to the preset."""
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    return {name: value for name, value in given.items() if value is not None}


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    from diffalign import __version__

    found = {"diffalign": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "open_clip_torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(pipeline: Any) -> str:
    """The device in words that mean something on another machine."""
    import torch

    device = torch.device(pipeline.device)
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def finite_or_none(data: Any) -> Any:
    """The same data with numbers that JSON cannot hold (nan, inf) replaced by None."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: finite_or_none(value) for key, value in data.items()}
    return [finite_or_none(value) for value in data] if isinstance(data, list | tuple) else data
