"""`diffalign bench`: generate a benchmark's images with several methods, judge them, and print one table.

Every method starts from the same noises, and "none" (the same noises, no search) is always among them, since it is what the others are
compared with. Generation and judging meet only on disk: an interrupted run goes on where it stopped.
"""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffalign.commands import config, options
from diffalign.commands.generate import Interrupted
from diffalign.files import read_json, require_writable

BENCHMARKS = ("shapes",)
SPLITS = ("test", "validation", "train")
SHAPES_BATCH = 32
GRID_PROMPTS_PER_TASK = 2
SAME_IMAGE_TOLERANCE = 16  # of 255; a start that differs by more from "none" was not made from the same noise


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure methods on a benchmark",
        description="Generates a benchmark's images with each method from the same noises, judges them, and prints one table. Resumable.",
        allow_abbrev=False,
    )
    parser.add_argument("benchmark", type=benchmark_name, metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    parser.add_argument(
        "--method",
        type=options.method_name,
        nargs="+",
        default=["none", "best-of-n", "reno"],
        metavar="NAME",
        help=f"one or more of {', '.join(options.METHODS)}; none is always added (default: none best-of-n reno)",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="which prompts (default: %(default)s)")
    parser.add_argument("--limit", type=options.count, metavar="N", help="at most N prompts, spread evenly over the tasks")
    parser.add_argument("--samples", type=options.count, default=1, metavar="N", help="images per prompt (default: %(default)s)")
    seed_help = "each image's seed is drawn from this, its prompt and sample (default: %(default)s)"
    parser.add_argument("--seed", type=options.seed, default=0, metavar="N", help=seed_help)
    batch_help = f"images at once; speed and memory only (default: 1, shapes {SHAPES_BATCH})"
    parser.add_argument("--batch-size", type=options.count, metavar="N", help=batch_help)
    out_help = "images, rows, summary.json and table.md (default: outputs/bench-BENCHMARK)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    parser.add_argument("--overwrite", action="store_true", help="delete images that were made with other settings")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="also draw images before and after with the judge's verdicts")
    grid_help = "prompts of each task in it, drawn by --seed (default: %(default)s)"
    parser.add_argument("--grid-per-task", type=options.count, default=GRID_PROMPTS_PER_TASK, metavar="N", help=grid_help)
    options.add_model_options(parser)
    config.add_option(parser)
    parser.set_defaults(run=run)


def benchmark_name(text: str) -> str:
    if text not in BENCHMARKS:
        raise argparse.ArgumentTypeError(options.unknown("benchmark", text, BENCHMARKS))
    return text


def run(args: argparse.Namespace) -> int:
    """Generates what is missing, judges, reports. Raises ValueError or OSError with the sentence to show, Interrupted at Ctrl-C."""
    mix = options.reward_mix(args)
    args.out = args.out or Path(f"outputs/bench-{args.benchmark}")
    methods = ["none", *dict.fromkeys(name for name in args.method if name != "none")]
    options.require_gradient(methods, mix)
    require_writable(args.out)
    if args.grid:
        if args.grid.suffix.lower() != ".png":
            raise ValueError(f"--grid must name a .png file; got {args.grid}")
        require_writable(args.grid.parent)

    from diffalign.benchmarks.base import open_run
    from diffalign.benchmarks.shapes import ShapesBenchmark

    benchmark = ShapesBenchmark(args.split, args.samples, args.limit, args.seed)
    items = benchmark.items()
    for name in methods:
        open_run(args.out / name, run_settings(args, name, mix), args.overwrite)
    missing = {name: [item for item in items if not item.is_done(args.out / name)] for name in methods}
    total = len(items) * len(methods)
    if any(missing.values()):
        if sum(map(len, missing.values())) < total:
            print(f"{total - sum(map(len, missing.values()))} of {total} images are already in {args.out}; continuing")
        try:
            generate(args, missing, mix)
        except KeyboardInterrupt as stop:
            done = sum(item.is_done(args.out / name) for name in methods for item in items)
            raise Interrupted(f"interrupted: {done} of {total} images are finished in {args.out}; the same command continues") from stop
    print(report(args, benchmark, methods, mix), end="")
    print(f"\nrows, summary.json and table.md are in {args.out}")
    return 0


def run_settings(args: argparse.Namespace, method: str, mix: Mapping[str, float]) -> dict[str, Any]:
    """What a method's images and traces depend on. Limit and samples are not in it: a run may be extended by more of either."""
    return {
        "benchmark": args.benchmark,
        "split": args.split,
        "pipeline": args.pipeline,
        "method": method,
        "seed": args.seed,
        "reward": dict(mix),
        "watch": list(args.watch or ()),
        "iterations": None if method == "none" else args.iterations,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "dtype": args.dtype,
    }


def generate(args: argparse.Namespace, missing: Mapping[str, Sequence[Any]], mix: Mapping[str, float]) -> None:
    """Makes the missing items of each method, "none" first: the others record how far their start is from its image."""
    from diffalign.benchmarks.base import generate_missing
    from diffalign.files import write_json

    pipeline, reward = options.load_parts(args, mix)
    write_json(args.out / "machine.json", {"device": options.device_name(pipeline), "versions": options.versions()})
    for name, items in missing.items():
        if not items:
            continue
        method = options.build_method(name, reward, args.iterations)
        evaluations = args.iterations if method else 1
        with tqdm(total=len(items) * evaluations, unit="evaluation", desc=name, disable=None) as bar:
            make = maker(pipeline, reward, name, method, args, evaluations, bar)
            generate_missing(items, args.out / name, make, options.batch_size(args, SHAPES_BATCH))


def maker(
    pipeline: Any, reward: Any, name: str, method: Any, args: argparse.Namespace, evaluations: int, bar: tqdm
) -> Callable[[Sequence[Any]], list[Any]]:
    """The function from a batch of items to their images and traces."""
    import numpy as np

    from diffalign.benchmarks.base import Generated, read_image

    def make(batch: Sequence[Any]) -> list[Generated]:
        began, finished = time.perf_counter(), bar.n + len(batch) * evaluations
        output = pipeline(
            [item.prompt for item in batch],
            seed=[item.seed for item in batch],
            plugins=[method] if method else (),
            progress=lambda iteration, scores: bar.update(len(batch)),
            **options.stock_arguments(args),
        )
        seconds = (time.perf_counter() - began) / len(batch)
        if method is None:
            scores = options.score(reward, output.images, [item.prompt for item in batch], pipeline.device)
            traces = [{"method": "none", "best": 0, "rewards": rewards} for rewards in scores]
        else:
            traces = [output.trace.sample(i) for i in range(len(batch))]
            for item, trace, image in zip(batch, traces, output.initial_images, strict=True):
                without = read_image(item.image_path(args.out / "none")).astype(int)
                trace["start_difference"] = int(np.abs(np.asarray(image.convert("RGB")) - without).max())
        bar.update(finished - bar.n)  # samples that stopped early count as done
        return [
            Generated(image, options.finite_or_none({"seconds": round(seconds, 4), **trace}))
            for image, trace in zip(output.images, traces, strict=True)
        ]

    return make


def report(args: argparse.Namespace, benchmark: Any, methods: Sequence[str], mix: Mapping[str, float]) -> str:
    """Judges what lies on disk, writes results.jsonl, summary.json, table.md and the grid, and returns the tables."""
    from diffalign.benchmarks.report import Judged, summarise, write_report, write_rows

    items = benchmark.items()
    judged = {}
    for name in methods:
        folder = args.out / name
        judged[name] = Judged(benchmark.score(folder), [read_json(item.trace_path(folder)) for item in items])
        write_rows(folder / "results.jsonl", judged[name].rows)
    machine = read_json(args.out / "machine.json")
    config = {**run_settings(args, methods[-1], mix), "method": list(methods), "iterations": args.iterations}
    summary = {
        "benchmark": benchmark.name,
        "config": {**config, "samples": args.samples, "limit": args.limit},
        "command": shlex.join(["diffalign", *args.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine,
        "optimised": list(mix),
        **summarise(judged),
    }
    summary["facts"] = {
        "pipeline": f"{args.pipeline}, {args.split} split, seed {args.seed}, {args.iterations} evaluations per image",
        "device": summary["device"],
        "date": summary["date"],
        "command": f"`{summary['command']}`",
    }
    for name in methods[1:]:
        differences = [trace["start_difference"] for trace in judged[name].traces]
        summary["methods"][name]["largest_start_difference"] = max(differences)
        far = sum(difference > SAME_IMAGE_TOLERANCE for difference in differences)
        if far:
            print(f"warning: {far} images of {name} start elsewhere than none; the comparison is not paired", file=sys.stderr)
    if args.grid:
        draw_grid(args, items, judged, methods)
    return write_report(args.out, summary)


def draw_grid(args: argparse.Namespace, items: Sequence[Any], judged: Mapping[str, Any], methods: Sequence[str]) -> None:
    """Prompts drawn by the seed, the same number of each task, not chosen by result: "none" beside the last method."""
    import numpy as np
    from PIL import Image

    from diffalign.benchmarks.base import read_image
    from diffalign.files import whole_file
    from diffalign.plots import Pair, grid

    rng = np.random.default_rng(args.seed)
    chosen: list[int] = []
    for task in dict.fromkeys(item.task for item in items):
        candidates = [i for i, item in enumerate(items) if item.task == task and item.sample == 0]
        chosen += sorted(rng.permutation(candidates)[: args.grid_per_task].tolist())

    def pair(i: int) -> Pair:
        images = [Image.fromarray(read_image(items[i].image_path(args.out / name))) for name in ("none", methods[-1])]
        return Pair(items[i].prompt, *images, judged["none"].rows[i]["correct"], judged[methods[-1]].rows[i]["correct"])

    with whole_file(args.grid) as temporary:
        grid([pair(i) for i in chosen], columns=3).save(temporary, format="PNG")
    print(f"{args.grid}: {len(chosen)} prompts, none beside {methods[-1]}")
