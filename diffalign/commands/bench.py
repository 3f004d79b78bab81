"""`diffalign bench`: generate a benchmark's images with several methods, judge them, and print one table.

Every method starts from the same noises, and "none" (the same noises, no search) is always among them, since it is what the others are
compared with. Generation and judging meet only on disk: an interrupted run goes on where it stopped.
"""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
import io
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffalign.commands import compare, config, evaluation, judging, lora, options, panels, resolved
from diffalign.commands.generate import Interrupted
from diffalign.commands.kinds import KINDS
from diffalign.files import read_json, require_writable, write_rows

COMPARE = "compare"
SHAPES_BATCH = 32
GRID_PROMPTS_PER_TASK = 2
SAME_IMAGE_TOLERANCE = 16  # of 255; a start that differs by more from "none" was not made from the same noise


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure methods on a benchmark",
        description="Generates a benchmark's images with each method from the same noises, judges them, and prints one table. Resumable.",
        epilog=options.methods_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = f"{', '.join(KINDS)}; or compare, which takes the folders of two or more judged methods"
    parser.add_argument("benchmark", type=benchmark_name, metavar="BENCHMARK", help=what)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="compare: RUN_A RUN_B ..., such as outputs/a/none outputs/a/reno")
    parser.add_argument(
        "--method",
        type=options.method_name,
        nargs="+",
        default=["none", "best-of-n", "reno"],
        metavar="NAME",
        help=f"one or more of {', '.join(options.METHODS)}; none is always added (default: none best-of-n reno)",
    )
    splits = list(dict.fromkeys(split for kind in KINDS.values() for split in kind.splits))
    parser.add_argument("--split", choices=splits, help="which prompts (default: shapes test, t2i-compbench val)")
    limit_help = "at most N prompts, as many of each task as goes, drawn in the same way in every run"
    parser.add_argument("--limit", type=options.count, metavar="N", help=limit_help)
    defaults = ", ".join(f"{name} {kind.samples}" for name, kind in KINDS.items())
    parser.add_argument("--samples", type=options.count, metavar="N", help=f"images per prompt (default: {defaults})")
    seed_help = "each image's seed is drawn from this, its prompt and sample (default: %(default)s)"
    parser.add_argument("--seed", type=options.seed, default=0, metavar="N", help=seed_help)
    batch_help = f"images at once; speed and memory only (default: 1, shapes {SHAPES_BATCH})"
    parser.add_argument("--batch-size", type=options.count, metavar="N", help=batch_help)
    out_help = "images, rows, summary.json and table.md (default: outputs/bench-BENCHMARK)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    parser.add_argument("--overwrite", action="store_true", help="delete images that were made with other settings")
    versions_help = "continue a run that other versions of diffalign, torch, diffusers or transformers began; the report says so"
    parser.add_argument("--allow-changed-versions", action="store_true", help=versions_help)
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="also draw images before and after with the judge's verdicts")
    grid_help = "prompts of each task in it, drawn by --seed (default: %(default)s)"
    parser.add_argument("--grid-per-task", type=options.count, default=GRID_PROMPTS_PER_TASK, metavar="N", help=grid_help)
    lora_help = "tuned LoRA weights to put on the pipeline: a .safetensors file or the folder with it"
    parser.add_argument("--lora", type=lora.path, metavar="PATH", help=lora_help)
    judging.add_options(parser)
    options.add_model_options(parser, pipeline=None)
    config.add_option(parser)
    parser.set_defaults(run=run)


def benchmark_name(text: str) -> str:
    known = (*KINDS, COMPARE)
    if text not in known:
        raise argparse.ArgumentTypeError(options.unknown("benchmark", text, known))
    return text


def run(args: argparse.Namespace) -> int:
    """Generates what is missing, judges, reports. Raises ValueError or OSError with the sentence to show, Interrupted at Ctrl-C."""
    if args.benchmark == COMPARE:
        return compare.run(args)
    if args.runs:
        raise ValueError(f"only compare takes runs; got {' '.join(args.runs)} after {args.benchmark}")
    judging.resolve(args)
    if args.images:
        return judging.run_images(args)
    kind = KINDS[args.benchmark]
    methods = ["none", *dict.fromkeys(name for name in args.method if name != "none")]
    # Without a search nothing is optimised, so rewards are loaded only where they were asked for; the shapes models have a default.
    # Where rewards are the judges, images get their scores when they are judged.
    unwatched = methods == ["none"] and (kind.by_reward or not (args.reward or args.watch or options.is_shapes(args.pipeline)))
    mix = {} if unwatched else options.reward_mix(args)
    options.require_gradient(methods, mix)
    require_writable(args.out)
    if args.grid:
        if args.grid.suffix.lower() != ".png":
            raise ValueError(f"--grid must name a .png file; got {args.grid}")
        require_writable(args.grid.parent)

    from diffalign.benchmarks.base import check_run

    benchmark = judging.build(args)
    kind.ready(args, benchmark)  # fails before hours of generation, not after
    options.warn_of_unknown_words(args.pipeline, [item.prompt for item in benchmark.items()])
    share = judging.share(args)
    settings = {name: {**run_settings(args, name, mix), **kind.settings(args, benchmark)} for name in methods}
    known = resolved.before_loading(args)
    makes = args.stage in ("all", "generate")
    may = (args.overwrite and makes, args.allow_changed_versions)
    stale = [name for name in methods if check_run(args.out / name, {**settings[name], **known}, *may)]
    if makes:
        complete(args, settings, stale, mix, benchmark.items(), share)
    for name in methods:
        kind.export(benchmark, args.out / name)
    if args.stage == "generate":
        print(f"images are in {args.out}; --stage score judges them")
        return 0
    benchmark = judging.with_judge(args, benchmark)
    if args.stage != "report" and kind.judge:
        judging.judge(args, benchmark, methods, share.shard)
    share.wait()
    if not share.reports:
        where = f"shard {share.shard.index}/{share.shard.count} is done in {args.out}"
        print(f"{where}; the same command with --stage report, and no --shard, sums all up")
        return 0
    print(report(args, benchmark, methods, mix), end="")
    print(f"\nrows, summary.json and table.md are in {args.out}")
    return 0


def complete(
    args: argparse.Namespace,
    settings: Mapping[str, Mapping[str, Any]],
    stale: Sequence[str],
    mix: Mapping[str, float],
    items: Sequence[Any],
    share: judging.Share,
) -> None:
    """Makes the images that are not there yet. settings: method -> its own. stale: methods whose images are to be deleted first.

    Folders are opened, and images deleted, when the models are there: a call that cannot make images leaves everything as it was.
    Raises Interrupted at Ctrl-C.
    """
    from diffalign.benchmarks.base import open_run, record_session

    items, total = share.shard.of(items), len(share.shard.of(items)) * len(settings)
    missing = {name: [item for item in items if name in stale or not item.is_done(args.out / name)] for name in settings}
    lacking = sum(map(len, missing.values()))
    if 0 < lacking < total:
        print(f"{total - lacking} of {total} images are already in {args.out}; continuing")
    parts = None
    try:
        if lacking:
            parts = evaluation.load_parts(args, mix)
            if args.lora:
                lora.load(parts[0], args.lora)
        known = {**resolved.before_loading(args), **({"resolved": resolved.after_loading(parts[0], args)} if parts else {})}

        def start(main: bool) -> None:
            for name in settings:
                open_run(args.out / name, {**settings[name], **known}, args.overwrite and main, args.allow_changed_versions)
                if parts and missing[name]:
                    record_session(args.out / name, {**resolved.session(parts[0].device), "versions": known["versions"]})

        share.main_first(start)
        if parts:
            generate(args, *parts, {name: items for name, lacks in missing.items() if lacks})
    except KeyboardInterrupt as stop:
        done = sum(item.is_done(args.out / name) for name in settings for item in items)
        raise Interrupted(f"interrupted: {done} of {total} images are finished in {args.out}; the same command continues") from stop


def run_settings(args: argparse.Namespace, method: str, mix: Mapping[str, float]) -> dict[str, Any]:
    """What a method's images and traces depend on. Limit and samples are not in it: a run may be extended by more of either."""
    unoptimised = method == "none" and KINDS[args.benchmark].by_reward
    return {
        "benchmark": args.benchmark,
        "split": args.split,
        "pipeline": args.pipeline,
        **({"lora": lora.identity(args.lora)} if args.lora else {}),
        "method": method,
        "seed": args.seed,
        # Of images that no search made the rewards are notes; where rewards judge, they are not even that.
        "reward": {} if unoptimised else dict(mix),
        "watch": [] if unoptimised else list(args.watch or ()),
        "budget": None if method == "none" else args.budget,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "dtype": args.dtype,
        **options.rule_settings(args),
    }


def generate(args: argparse.Namespace, pipeline: Any, reward: Any, wanted: Mapping[str, Sequence[Any]]) -> None:
    """Makes what is missing of each method's items, "none" first: the others record how far their start is from its image."""
    from diffalign.benchmarks.base import generate_missing, to_make
    from diffalign.files import write_json
    from diffalign.methods import build_method

    write_json(args.out / "machine.json", evaluation.machine(pipeline.device))
    if reward:
        write_json(args.out / "reward.json", reward.settings())
    size = options.batch_size(args, SHAPES_BATCH)
    for name, items in wanted.items():
        method = None if name == "none" else build_method(name, reward, args.budget)
        budget = args.budget if method else 1
        images = sum(map(len, to_make(items, args.out / name, size)))
        with tqdm(total=images * budget, unit="evaluation", desc=name, disable=None) as bar, one_warning_of_cut_text():
            generate_missing(items, args.out / name, maker(pipeline, reward, name, method, args, budget, bar), size)


@contextmanager
def one_warning_of_cut_text() -> Iterator[None]:
    """Lists of long prompts would warn with every batch; the report says how many were cut."""
    seen: list[str] = []

    def first(record: logging.LogRecord) -> bool:
        cut = "are longer than the model" in record.msg
        seen.extend([record.msg] * cut)
        return not cut or len(seen) == 1

    logger = logging.getLogger("diffalign.pipelines.inputs")
    logger.addFilter(first)
    try:
        yield
    finally:
        logger.removeFilter(first)


def maker(
    pipeline: Any, reward: Any, name: str, method: Any, args: argparse.Namespace, budget: int, bar: tqdm
) -> Callable[[Sequence[Any]], list[Any]]:
    """The function from a batch of items to their images and traces."""
    import numpy as np
    from PIL import Image

    from diffalign.benchmarks.base import Generated, encoded, read_image
    from diffalign.commands.cost import Meter

    def make(batch: Sequence[Any]) -> list[Generated]:
        finished = bar.n + len(batch) * budget
        with Meter(pipeline) as meter:
            output = pipeline(
                [item.prompt for item in batch],
                seed=[item.seed for item in batch],
                plugins=[method] if method else (),
                progress=lambda event: bar.update(len(event.rows)),
                **options.stock_arguments(args),
            )
        if method is None:
            prompts = [item.prompt for item in batch]
            scores = evaluation.score(reward, output.images, prompts, pipeline.device) if reward else [{} for _ in batch]
            traces = [{"method": "none", "best": 0, "rewards": rewards} for rewards in scores]
            costs = meter.costs(len(batch))
        else:
            traces = [output.trace.sample(i) for i in range(len(batch))]
            costs = meter.costs(len(batch), [len(trace["rewards"]["total"]) for trace in traces])
            for item, trace, image in zip(batch, traces, output.initial_images, strict=True):
                without = read_image(item.image_path(args.out / "none")).astype(int)
                start = np.asarray(Image.open(io.BytesIO(encoded(item, image))).convert("RGB"))  # with a JPEG's losses, where it is one
                trace["start_difference"] = int(np.abs(start - without).max())
        bar.update(finished - bar.n)  # samples that stopped early count as done
        return [
            Generated(image, evaluation.finite_or_none({**cost, "cut_text": cut, **trace}))
            for image, cost, cut, trace in zip(output.images, costs, output.truncated, traces, strict=True)
        ]

    return make


def report(args: argparse.Namespace, benchmark: Any, methods: Sequence[str], mix: Mapping[str, float]) -> str:
    """Judges what lies on disk, writes results.jsonl, summary.json, table.md and the grid, and returns the tables."""
    from diffalign.reports.summary import Judged, write_report

    items, kind = benchmark.items(), KINDS[args.benchmark]
    rows, left_out = judging.rows_in_common(args, benchmark, methods)
    judged = {}
    for name in methods:
        folder, reported = args.out / name, {row["filename"] for row in rows[name]}
        judged[name] = Judged(rows[name], [read_json(item.trace_path(folder)) for item in items if item.name in reported])
        write_rows(folder / "results.jsonl", judged[name].rows)
        judging.write_official(kind, benchmark, folder, judged[name].rows)
        judging.write_units(args, benchmark, folder, judged[name].rows, left_out)
    machine = read_json(args.out / "machine.json")
    made = {name: read_json(args.out / name / "settings.json") for name in methods}
    config = {**run_settings(args, methods[-1], mix), "method": list(methods), "budget": args.budget}
    summary = {
        "benchmark": benchmark.name,
        **({"limited": limited} if (limited := benchmark.limited()) else {}),
        "config": {**config, "samples": args.samples, "limit": args.limit},
        "made": {
            name: {key: found.get(key) for key in ("resolved", "preset", "weights", "versions", "sessions")} for name, found in made.items()
        },
        "command": shlex.join(["diffalign", *args.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine,
        "optimised": list(mix),
        **judging.summed_up(kind, benchmark, judged, mix),
        **panels.of_methods(args, mix, {name: result.traces for name, result in judged.items()}),
    }
    panels.draw(args.out, summary)
    if left_out:
        summary["partial"] = list(left_out.values())
    cut = sum(bool(trace.get("cut_text")) for trace in judged["none"].traces)
    split = f"{args.split} split, " if args.split else ""
    summary["facts"] = {
        **judging.partial(left_out),
        **judging.quoted(benchmark),
        **({"cut prompts": f"of {cut} of {len(judged['none'].traces)} images the model did not read the end of the prompt"} if cut else {}),
        "pipeline": f"{args.pipeline}, {split}seed {args.seed}, budget of {args.budget} evaluations per image",
        **how_made(made),
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


def how_made(made: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The settings that images were made with, and what changed while they were made. made: method -> what its settings.json holds."""
    facts = {}
    if values := made["none"].get("resolved"):
        facts["made with"] = resolved.in_words(values)
    sessions = [session for found in made.values() for session in found.get("sessions", [])]
    devices = list(dict.fromkeys(session["device"] for session in sessions))
    if len(devices) > 1:
        facts["SEVERAL DEVICES"] = "; ".join(devices)
    versions = [{name: version for name, version in session["versions"].items() if version} for session in sessions]
    changed = [name for name in versions[0] if len({str(each.get(name)) for each in versions}) > 1] if versions else []
    if changed:
        of_each = (f"{name} {' and '.join(dict.fromkeys(str(each.get(name)) for each in versions))}" for name in changed)
        facts["CHANGED VERSIONS"] = "; ".join(of_each)
    return facts


def draw_grid(args: argparse.Namespace, items: Sequence[Any], judged: Mapping[str, Any], methods: Sequence[str]) -> None:
    """Prompts drawn by the seed, the same number of each task, not chosen by result: "none" beside the last method."""
    import numpy as np
    from PIL import Image

    from diffalign.benchmarks.base import read_image
    from diffalign.files import whole_file
    from diffalign.reports.plots import Pair, grid

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
