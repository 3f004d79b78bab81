"""Until `train` and `pairs` take settings classes too: the words that their argparse options are read by."""

from __future__ import annotations

from argparse import Namespace

from diffalign.cli.options import is_shapes
from diffalign.cli.values import DTYPES, count, pipeline_name, reward_name, reward_weight, scale, seed

__all__ = ["DTYPES", "count", "is_shapes", "pipeline_name", "reward_name", "reward_weight", "scale", "seed"]


def batch_size(args: Namespace, shapes_default: int) -> int:
    return args.batch_size or (shapes_default if is_shapes(args.pipeline) else 1)


def stock_arguments(args: Namespace) -> dict[str, int | float]:
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    return {name: value for name, value in given.items() if value is not None}
