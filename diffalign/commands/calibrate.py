"""`diffalign calibrate`: where rewards' scores lie on images of a model, so that a rule can compare them (docs/reward_mixing.md)."""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffalign.commands import evaluation, options
from diffalign.commands.generate import read_prompts
from diffalign.files import require_writable

DEFAULT_OUT = Path("outputs/calibration.json")
SAMPLES, LIMIT, SHAPES_BATCH = 4, 150, 32
UNITS = ("z", "within", "quantile")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="measure rewards on a model's own images, for --calibration",
        description="Generates images with a pipeline, scores them with each reward, and writes mean, spread and quantiles.",
        allow_abbrev=False,
    )
    name_help = "a preset, a local folder, or a hub id (default: %(default)s)"
    parser.add_argument("--pipeline", type=options.pipeline_name, default=options.DEFAULT_PIPELINE, metavar="NAME", help=name_help)
    reward_help = "which rewards; those to watch too, so that reports can show them in the same unit"
    parser.add_argument("--reward", type=options.reward_name, nargs="+", required=True, metavar="NAME", help=reward_help)
    prompts_help = "one a line, or .jsonl (default with the shapes pipelines: their training prompts)"
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help=prompts_help)
    limit_help = "at most N prompts, spread over the file (default: %(default)s)"
    parser.add_argument("--limit", type=options.count, default=LIMIT, metavar="N", help=limit_help)
    parser.add_argument("--samples", type=options.count, default=SAMPLES, metavar="N", help="images per prompt (default: %(default)s)")
    unit_help = "z: over all images; within: inside each prompt, for use on these very prompts; quantile (default: %(default)s)"
    parser.add_argument("--unit", choices=UNITS, default="z", help=unit_help)
    logit_help = "of these, which are probabilities, to be compared as log-odds"
    parser.add_argument("--logit", type=options.reward_name, nargs="+", default=[], metavar="NAME", help=logit_help)
    parser.add_argument(
        "--seed", type=options.seed, default=0, metavar="N", help="each image's seed is drawn from this (default: %(default)s)"
    )
    parser.add_argument("--steps", type=options.count, metavar="N", help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--guidance-scale", type=options.scale, metavar="X", help="classifier-free guidance (default: the pipeline's own)")
    batch_help = f"images at once; speed and memory only (default: 1, shapes {SHAPES_BATCH})"
    parser.add_argument("--batch-size", type=options.count, metavar="N", help=batch_help)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--dtype", choices=options.DTYPES, help="number type of the pipeline (default: the pipeline's own for the device)")
    options.add_memory_options(parser)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="FILE.json", help="where to write it (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generates, scores, writes. Raises ValueError or OSError with the sentence to show."""
    strange = sorted(set(args.logit) - set(args.reward))
    if strange:
        raise ValueError(f"--logit names {strange[0]}, which is not among --reward")
    prompts = collect(args)
    require_writable(args.out.parent)

    from diffalign.rewards.calibration import from_scores

    texts, scores = measure(args, prompts)
    source = f"{args.pipeline}, {len(prompts)} prompts, {args.samples} images of each, seed {args.seed}"
    transforms = dict.fromkeys(args.logit, "logit")
    calibration = from_scores(scores, texts, unit=args.unit, transforms=transforms, source=source)
    calibration.save(args.out)
    for name, member in calibration.members.items():
        within = "" if member.within is None else f", {member.within:.4g} within prompts"
        print(f"{name}: mean {member.mean:.4g}, standard deviation {member.std:.4g}{within}, {member.n} images")
    print(f"the calibration is in {args.out}")
    return 0


def collect(args: argparse.Namespace) -> list[str]:
    """The prompts, all different, at most --limit of them. Raises ValueError where there are none to be had."""
    if args.prompts_file:
        prompts = read_prompts(args.prompts_file)
    elif options.is_shapes(args.pipeline):
        from diffalign.shapes.prompts import prompts as shapes_prompts

        prompts = shapes_prompts("train")
    else:
        raise ValueError(f"--prompts-file is needed with --pipeline {args.pipeline}: prompts such as the calibration will be used on")
    prompts = list(dict.fromkeys(prompts))
    count = min(args.limit, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def measure(args: argparse.Namespace, prompts: list[str]) -> tuple[list[str], dict[str, list[float]]]:
    """Prompts and scores of every image. Images are not kept."""
    from diffalign.benchmarks.base import item_seed

    args.watch, args.reward_rule, args.reward_gradient, args.calibration = None, "weighted", None, None
    pipeline, reward = evaluation.load_parts(args, dict.fromkeys(args.reward, 1.0))
    jobs = [(prompt, item_seed(args.seed, i, k)) for i, prompt in enumerate(prompts) for k in range(args.samples)]
    size, texts, scores = options.batch_size(args, SHAPES_BATCH), [], {name: [] for name in args.reward}
    for at in tqdm(range(0, len(jobs), size), unit="batch", disable=None):
        batch, seeds = zip(*jobs[at : at + size], strict=True)
        output = pipeline(list(batch), seed=list(seeds), **options.stock_arguments(args))
        for trace in evaluation.score(reward, output.images, batch, pipeline.device):
            for name in args.reward:
                scores[name] += trace[name]
        texts += batch
    return texts, scores
