"""`diffalign train`: fit what the other commands use: weights tuned by preference, and guidance that costs less."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffalign.cli import own_arguments, tune, values
from diffalign.cli.options import FROM_FILE, is_shapes
from diffalign.cli.prompts import read as read_prompts
from diffalign.files import require_writable

SHAPES_BATCH, SHAPES_SEARCH_BATCH = 20, 8


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("train", help="tune a pipeline, or fit cheaper guidance to it", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    linear = kinds.add_parser(
        "linear-ag",
        help="predict the unconditional branch from earlier predictions",
        description="Fits LinearAG to trajectories of the pipeline with full guidance: same steps, guidance scale and negative prompt as "
        "it will be used with.",
        allow_abbrev=False,
    )
    _add_common(linear, Path("outputs/linear-ag"), SHAPES_BATCH)
    linear.add_argument("--samples", type=values.count, default=200, metavar="N", help="trajectories (default: %(default)s)")
    budget_help = "share of all evaluations, 0.65 say: the fit chooses the steps to evaluate (default: the paper's plan)"
    linear.add_argument("--budget", type=values.scale, metavar="X", help=budget_help)
    tail_help = "of the paper's plan: no guidance in the second half, or predicted guidance (default: %(default)s)"
    linear.add_argument("--tail", choices=("conditional", "estimate"), default="conditional", help=tail_help)
    linear.set_defaults(run=run_linear)
    search = kinds.add_parser(
        "guidance-search",
        help="search a guidance policy under a budget of evaluations",
        description="Searches one option per step (unconditional, conditional, or guided at some strength) within a budget of evaluations.",
        allow_abbrev=False,
    )
    _add_common(search, Path("outputs/guidance-search"), SHAPES_SEARCH_BATCH)
    search.add_argument("--budget", type=values.scale, default=0.75, metavar="X", help="share of all evaluations (default: %(default)s)")
    search.add_argument("--iterations", type=values.count, default=80, metavar="N", help="steps of the optimiser (default: %(default)s)")
    search.set_defaults(run=run_search)
    tune.add_parsers(kinds)


def _add_common(parser: argparse.ArgumentParser, out: Path, batch: int) -> None:
    parser.add_argument("--pipeline", type=values.pipeline_name, default="shapes", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts, one a line (default with shapes: its validation split)")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="as it will be used")
    parser.add_argument("--steps", type=values.count, metavar="N", help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--guidance-scale", type=values.scale, metavar="X", help="(default: the pipeline's own)")
    parser.add_argument("--seed", type=values.seed, default=0, metavar="N", help="trajectory i has seed N + i (default: %(default)s)")
    parser.add_argument("--batch-size", type=values.count, metavar="N", help=f"at once (default: 1, shapes {batch})")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--dtype", choices=values.DTYPES, help="number type of the pipeline (default: the pipeline's own for the device)")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    own_arguments.add_config(parser)


def run_linear(args: argparse.Namespace) -> int:
    """Fits LinearAG and prints how well every step is predicted."""
    prompts = training_prompts(args)
    require_writable(args.out.parent)
    from diffalign.methods.linear_guidance import LinearSettings
    from diffalign.methods.linear_guidance_fit import HELD_OUT_EVERY, LinearFit

    if args.samples < HELD_OUT_EVERY:
        raise ValueError(f"--samples must be at least {HELD_OUT_EVERY}, of which one is held out; got {args.samples}")
    settings = LinearSettings(tail=args.tail, budget=args.budget)
    pipeline = load(args)
    fit = LinearFit(settings)
    size = own_arguments.batch_size(args, SHAPES_BATCH)
    with tqdm(total=args.samples, unit="trajectory", disable=None) as bar:
        for start in range(0, args.samples, size):
            numbers = range(start, min(start + size, args.samples))
            pipeline(
                [prompts[i % len(prompts)] for i in numbers],
                seed=[args.seed + i for i in numbers],
                plugins=[fit],
                output_type="latent",
                **negative(args),
                **own_arguments.stock_arguments(args),
            )
            bar.update(len(numbers))
    coefficients = fit.solve()
    coefficients.save(args.out)
    evaluations = sum(2 if branch == "both" else 1 for branch in coefficients.branches)
    print(f"{coefficients.samples} trajectories fitted, {coefficients.held_out} held out")
    print("error of the predicted guidance, as a share of its size, on what was held out:")
    for step, residual in sorted(coefficients.residuals.items()):
        print(f"  step {step:3d}  {residual:.4f}{'' if step in coefficients.by_step else '  (too large: not guided)'}")
    print("steps that evaluate both branches: " + " ".join(str(i) for i, branch in enumerate(coefficients.branches) if branch == "both"))
    print(f"{evaluations} evaluations instead of {2 * len(coefficients.branches)}; saved in {args.out}")
    return 0


def run_search(args: argparse.Namespace) -> int:
    """Searches a policy and prints it."""
    prompts = training_prompts(args)
    require_writable(args.out)
    from diffalign.methods.guidance_search import SearchSettings, search
    from diffalign.pipelines.batches import fixed_batches

    settings = SearchSettings(budget=args.budget, iterations=args.iterations)
    pipeline = load(args)
    arguments = {**pipeline.defaults, **own_arguments.stock_arguments(args)}
    missing = [name for name in ("num_inference_steps", "guidance_scale") if name not in arguments]
    if missing:
        raise ValueError(f"--{' and --'.join(name.replace('num_inference_', '').replace('_', '-') for name in missing)} must be given with "
                         f"--pipeline {args.pipeline}, which has no defaults of its own")  # fmt: skip
    size = own_arguments.batch_size(args, SHAPES_SEARCH_BATCH)
    batches = fixed_batches(pipeline, prompts, size, args.seed, own_arguments.stock_arguments(args), args.negative_prompt)
    with batches as sample, tqdm(total=settings.iterations, disable=None) as bar:

        def progress(iteration: int, values: Any) -> None:
            bar.update()
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)

        policy = search(sample, arguments["num_inference_steps"], arguments["guidance_scale"], settings, progress)
    policy.save(args.out / FROM_FILE["searched"])
    evaluations = sum(1 if strength in (0.0, 1.0) else 2 for strength in policy.strengths)
    print("strength of guidance at every step (0: unconditional alone, 1: conditional alone):")
    print("  " + " ".join(f"{strength:g}" for strength in policy.strengths))
    print(f"{evaluations} evaluations instead of {2 * len(policy.strengths)}; saved in {args.out}")
    return 0


def training_prompts(args: argparse.Namespace) -> list[str]:
    """Raises ValueError where there are none to take."""
    if args.prompts_file is not None:
        return read_prompts(args.prompts_file)
    if not is_shapes(args.pipeline):
        raise ValueError(f"--prompts-file is needed with --pipeline {args.pipeline}: prompts like those it will be used with")
    from diffalign.shapes.prompts import prompts

    ordered = prompts("validation")
    return random.Random(0).sample(ordered, len(ordered))  # the split is sorted by task, and the first few should hold all


def load(args: argparse.Namespace) -> Any:
    from diffalign.hub import load_pipeline

    pipeline = load_pipeline(args.pipeline, device=args.device, dtype=args.dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def negative(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}
