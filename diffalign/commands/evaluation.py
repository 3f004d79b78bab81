"""What commands that make images share once the arguments are read: loading, scoring, and what a record says of the machine."""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

DEFAULT_PIPELINE = "shapes-turbo"
# For the shapes pipelines; the others must be told, since this reward knows shapes alone.
DEFAULT_REWARD = {"shapes-reward": 1.0}


def load_parts(args: argparse.Namespace, mix: Mapping[str, float]) -> tuple[Any, Any]:
    """The pipeline, silent, and the reward on its device (None for an empty mix). This is where the heavy imports happen.

    Says at once on stderr what it loads, since that takes seconds, or minutes where it has to be downloaded.
    """
    parts = [f"the pipeline {args.pipeline}", *(f"reward {name}" for name in (*mix, *(args.watch or ()) * bool(mix)))]
    print(f"loading {', '.join(parts)} ...", file=sys.stderr, flush=True)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from diffalign.hub import load_pipeline, load_reward

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # loading is over in a second or two; downloads keep their bars
    pipeline = load_pipeline(args.pipeline, device=args.device, dtype=args.dtype, **memory_arguments(args))
    if pipeline.output_field != "images":
        raise ValueError(
            f"{args.pipeline} makes videos, which the commands cannot write yet; call it from Python, with rewards over frames "
            "(diffalign.rewards.frames.FrameReward)"
        )
    pipeline.set_progress_bar_config(disable=True)  # our own bar counts evaluations; one more per denoising step would bury it
    if not mix:
        return pipeline, None
    rules = {"rule": args.reward_rule, "gradient": args.reward_gradient, "calibration": args.calibration}
    return pipeline, load_reward(dict(mix), watch=tuple(args.watch or ()), **rules, device=str(pipeline.device))


def memory_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What --memory and --attention mean to load_pipeline. Raises ValueError for both ways of offloading at once."""
    ways = set(args.memory)
    if {"offload-text", "offload-all"} <= ways:
        raise ValueError("--memory takes offload-text or offload-all, not both: the latter includes the text encoders")
    offload = "all" if "offload-all" in ways else "text" if "offload-text" in ways else None
    return {
        "attention": args.attention,
        "gradient_checkpointing": "checkpointing" in ways,
        "sliced_decoder": "sliced-decoder" in ways,
        "offload": offload,
    }


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


def machine(device: Any) -> dict[str, Any]:
    """What a record says of where it was made."""
    return {"device": device_name(device), "versions": versions()}


def device_name(device: Any) -> str:
    """A torch device, or its name, in words that mean something on another machine."""
    import torch

    device = torch.device(device)
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
