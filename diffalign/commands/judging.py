"""What `diffalign bench` needs to know of each benchmark: its options, how it is built, and how its judge's models are loaded.

Options that belong to another benchmark are refused, not ignored. Models are loaded when images are judged, after the generator is gone.
"""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.files import require_writable

BENCHMARKS = ("shapes", "geneval", "t2i-compbench")
SAMPLES = {"shapes": 1, "geneval": 4, "t2i-compbench": 10}  # the official protocols'
SPLITS = {"shapes": ("test", "validation", "train"), "geneval": (), "t2i-compbench": ("val", "val_seen", "val_unseen", "train")}
STAGES = ("all", "generate", "score", "report")
JUDGE_BATCH = 8
DETECTORS = {"t2i-compbench": "owlv2"}  # geneval's must be named, since two different ones are in use
# Option -> the benchmarks that it belongs to.
BELONGS = {
    "detector": ("geneval", "t2i-compbench"),
    "clip": ("geneval", "t2i-compbench"),
    "prompts": ("t2i-compbench",),
    "category": ("t2i-compbench",),
    "phrases": ("t2i-compbench",),
    "detections": ("t2i-compbench",),
    "blip": ("t2i-compbench",),
    "depth": ("t2i-compbench",),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """--shard, --stage, --allow-missing and the judges of GenEval and T2I-CompBench."""
    shard_help = "make and judge every N-th image from the I-th, counted from 0; without it, the same command reports on all"
    parser.add_argument("--shard", type=shard, metavar="I/N", help=shard_help)
    stage_help = "stop after generating, judge what is there, or only report what was judged (default: %(default)s)"
    parser.add_argument("--stage", choices=STAGES, default="all", help=stage_help)
    missing_help = "report although images are missing or cannot be read; says which, and marks the result partial"
    parser.add_argument("--allow-missing", action="store_true", help=missing_help)
    images_help = "judge images that another program made, in the benchmark's own layout, and generate nothing"
    parser.add_argument("--images", type=Path, metavar="DIR", help=images_help)
    judge = parser.add_argument_group("judges of geneval and t2i-compbench")
    judge.add_argument(
        "--detector",
        metavar="NAME",
        help="geneval: the official .pth file, or hf; t2i-compbench: owlv2, grounding-dino (default: owlv2). Or a folder",
    )
    judge.add_argument("--clip", metavar="NAME", help="another hub id or folder of geneval's CLIP ViT-L/14 or of t2i-compbench's ViT-B/32")
    judge.add_argument("--prompts", metavar="DIR", help="t2i-compbench: your clone of T2I-CompBench, or the URL of its examples/dataset")
    judge.add_argument("--category", nargs="+", metavar="NAME", help="t2i-compbench: which categories (default: all eight)")
    phrases_help = "t2i-compbench: noun phrases and tags of the prompts (default: OUT/phrases.json, made by spaCy where absent)"
    judge.add_argument("--phrases", type=Path, metavar="FILE.json", help=phrases_help)
    judge.add_argument("--detections", type=Path, metavar="FILE.json", help="t2i-compbench: your detector's boxes instead of --detector")
    judge.add_argument("--blip", metavar="NAME", help="t2i-compbench: another hub id or folder of BLIP-VQA")
    judge.add_argument("--depth", metavar="NAME", help="t2i-compbench: another hub id or folder of DPT-hybrid")


def shard(text: str) -> Any:
    from diffalign.benchmarks.scoring import Shard

    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def resolve(args: argparse.Namespace) -> None:
    """Fills in the benchmark's defaults. Raises ValueError for an option of another benchmark, or one that is needed and absent."""
    name = args.benchmark
    for option, owners in BELONGS.items():
        if getattr(args, option) is not None and name not in owners:
            raise ValueError(f"--{option} belongs to {' and '.join(owners)}, not to {name}")
    allowed = SPLITS[name]
    args.split = args.split or (allowed[0] if allowed else None)
    if args.split and not allowed:
        raise ValueError(f"{name} has no --split; leave it out")
    if args.split and args.split not in allowed:
        raise ValueError(f"--split of {name} must be one of {', '.join(allowed)}; got {args.split}")
    args.samples = args.samples or SAMPLES[name]
    args.out = args.out or Path(f"outputs/bench-{name}")
    if name == "t2i-compbench" and not args.prompts:
        raise ValueError("--prompts is needed: the folder of your clone of https://github.com/Karine-Huang/T2I-CompBench")
    if name == "geneval" and args.stage != "generate":
        _require_detector(args.detector)
    if args.images and name == "shapes":
        raise ValueError("--images belongs to geneval and t2i-compbench, not to shapes")
    if args.images and not args.images.is_dir():
        raise ValueError(f"--images {args.images} is not a folder")
    if args.grid and name == "t2i-compbench":
        raise ValueError("--grid shows right and wrong images; t2i-compbench gives scores instead, so it has none")


def _require_detector(source: str | None) -> None:
    """Before hours of generation, not after."""
    if source and (source == "hf" or Path(source).exists()):
        return
    from diffalign.benchmarks.geneval_models import OFFICIAL_URL

    got = f"{source} does not exist" if source else "none was given"
    raise ValueError(f"--detector is needed to judge, and {got}: the official file ({OFFICIAL_URL}), or hf for another training of it")


def build(args: argparse.Namespace) -> Any:
    """The benchmark with its items, without models. Raises ValueError or FileNotFoundError where its prompts cannot be had."""
    if args.benchmark == "shapes":
        from diffalign.benchmarks.shapes import ShapesBenchmark

        return ShapesBenchmark(args.split, args.samples, args.limit, args.seed)
    common = {"samples": args.samples, "limit": args.limit, "seed": args.seed, "batch_size": JUDGE_BATCH}
    if args.benchmark == "geneval":
        from diffalign.benchmarks.geneval import GenEvalBenchmark

        return GenEvalBenchmark(**common)
    from diffalign.benchmarks.t2i_compbench import T2ICompBench
    from diffalign.benchmarks.t2i_prompts import CATEGORIES

    return T2ICompBench(args.prompts, categories=args.category or tuple(CATEGORIES), split=args.split, **common)


def extra_settings(args: argparse.Namespace, benchmark: Any) -> dict[str, Any]:
    """What a run's images depend on besides the common settings: T2I-CompBench's lists, and its number of images, which names the files."""
    if args.benchmark != "t2i-compbench":
        return {}
    return {"samples": args.samples, "prompt lists": {category: found.version for category, found in benchmark.lists().items()}}


def with_judge(args: argparse.Namespace, benchmark: Any) -> Any:
    """The benchmark with its models loaded. The shapes world's judge needs none."""
    if args.benchmark == "shapes":
        return benchmark
    device = _device(args)
    if args.benchmark == "geneval":
        from diffalign.benchmarks.geneval_models import HUB_CLIP, load_scorer

        return dataclasses.replace(benchmark, scorer=load_scorer(args.detector, args.clip or HUB_CLIP, device))
    return _with_t2i_judges(args, benchmark, device)


def _with_t2i_judges(args: argparse.Namespace, benchmark: Any, device: str) -> Any:
    """Loads only what the categories need, each model once."""
    from diffalign.benchmarks import t2i_models
    from diffalign.benchmarks.t2i_numeracy import Vocabulary
    from diffalign.benchmarks.t2i_prompts import CATEGORIES, read_lines
    from diffalign.benchmarks.t2i_scorers import BlipVqaScorer, ClipScorer, NumeracyScorer, Spatial2DScorer, Spatial3DScorer
    from diffalign.benchmarks.t2i_three_in_one import Kinds

    wanted = {CATEGORIES[category].scorer for category in benchmark.categories}
    annotations = grammar(args, benchmark)
    blip = BlipVqaScorer(t2i_models.load_blip(args.blip or t2i_models.HUB_BLIP, device), annotations) if annotations else None
    uses_clip, uses_boxes = wanted & {"CLIPScore", "3-in-1"}, wanted & {"2D spatial", "3D spatial", "numeracy", "3-in-1"}
    clip = t2i_models.load_clip_score(args.clip or t2i_models.HUB_CLIP, device) if uses_clip else None
    finder = _finder(args, device) if uses_boxes else None
    depth = t2i_models.load_depth(args.depth or t2i_models.HUB_DEPTH, device) if "3D spatial" in wanted else None
    makers: Mapping[str, Callable[[], list[Any]]] = {
        "BLIP-VQA": lambda: [blip],
        "2D spatial": lambda: [Spatial2DScorer(finder)],
        "3D spatial": lambda: [Spatial3DScorer(finder, depth)],
        "numeracy": lambda: [NumeracyScorer(finder, Vocabulary.of(read_lines(args.prompts, "new_objects.txt")))],
        "CLIPScore": lambda: [ClipScorer(clip)],
        "3-in-1": lambda: [blip, Spatial2DScorer(finder, annotations), ClipScorer(clip, annotations)],
    }
    kinds = None
    if "3-in-1" in wanted:
        kinds = Kinds.of(*(read_lines(args.prompts, f"complex_val_{kind}.txt") for kind in ("spatial", "action")))
    scorers = {category: makers[CATEGORIES[category].scorer]() for category in benchmark.categories}
    return dataclasses.replace(benchmark, scorers=scorers, kinds=kinds)


def grammar(args: argparse.Namespace, benchmark: Any) -> Any:
    """Phrases and tags of the prompts that need them: from --phrases, else from OUT/phrases.json, which spaCy makes the first time.

    None where no category needs them. Raises ValueError where a prompt is not in the file, ImportError without file and spaCy.
    """
    from diffalign.benchmarks.t2i_language import Annotations, annotate
    from diffalign.benchmarks.t2i_prompts import CATEGORIES

    lists = benchmark.lists()
    needing = [category for category in lists if CATEGORIES[category].scorer in ("BLIP-VQA", "3-in-1")]
    prompts = [prompt for category in needing for prompt in lists[category].prompts]
    if not prompts:
        return None
    kept = args.out / "phrases.json"
    if not args.phrases and not kept.is_file():
        annotate(prompts).write(kept)
    annotations = Annotations.read(args.phrases or kept)
    for prompt in prompts:
        annotations[prompt]
    return annotations


def _finder(args: argparse.Namespace, device: str) -> Any:
    from diffalign.benchmarks.t2i_scorers import GivenDetections, OpenVocabulary

    if args.detections:
        from diffalign.benchmarks.t2i_detections import read_detections

        return GivenDetections(read_detections(args.detections))
    from diffalign.benchmarks.open_vocabulary import load_detector

    return OpenVocabulary(load_detector(args.detector or DETECTORS[args.benchmark], device))


def _device(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def share(args: argparse.Namespace) -> tuple[Any, Callable[[], bool]]:
    """This process's part of the images, and what to call when it is done, which says whether this process is to report.

    The part is --shard, or under `accelerate launch` (torchrun, ...) the process's own, each on its own device; else everything.
    """
    from diffalign.benchmarks.scoring import WHOLE, Shard

    if args.shard:
        return args.shard, lambda: args.shard.count == 1
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return WHOLE, lambda: True
    from accelerate import PartialState

    state = PartialState(cpu=args.device == "cpu")
    args.device = args.device or str(state.device)

    def finish() -> bool:
        state.wait_for_everyone()
        return state.is_main_process

    return Shard(state.process_index, state.num_processes), finish


def judge(args: argparse.Namespace, benchmark: Any, methods: Sequence[str | Path], shard: Any) -> None:
    """Judges the shard's images that have not been judged, all methods, with one bar. What cannot be judged is said when reporting."""
    from tqdm import tqdm

    from diffalign.benchmarks.scoring import score_missing

    tasks = benchmark.tasks()
    total = len(methods) * sum(len(shard.of(task.items)) for task in tasks)
    with tqdm(total=total, unit="image", desc="judging", disable=None) as bar:
        for name in methods:
            for task in tasks:
                score_missing(task, folder_of(args, name), benchmark.batch_size, shard, bar.update)


def folder_of(args: argparse.Namespace, method: str | Path) -> Path:
    return method if isinstance(method, Path) else args.out / method


def rows_in_common(args: argparse.Namespace, benchmark: Any, methods: Sequence[Any]) -> tuple[dict[Any, list[Any]], list[str]]:
    """Each method's rows, and the images left out: those that any method lacks, so that all are compared on the same ones.

    A method is a folder's name inside --out, or a folder of its own.

    Raises FileNotFoundError naming them where they are not allowed.
    """
    from diffalign.benchmarks.scoring import require_all

    if args.benchmark == "shapes":
        return {name: benchmark.score(args.out / name) for name in methods}, []
    rows, left_out = {}, {}
    for name in methods:
        folder = folder_of(args, name)
        rows[name], faults = benchmark.judged(folder)
        if not args.allow_missing:
            require_all(faults, len(rows[name]) + len(faults), folder)
        left_out.update({fault.item: f"{folder.name}/{fault.item}: {fault.problem}" for fault in faults})
    common = {name: [row for row in found if row["filename"] not in left_out] for name, found in rows.items()}
    if not all(common.values()):
        raise FileNotFoundError(f"no image has been judged for every method in {args.out}; the first: {next(iter(left_out.values()))}")
    return common, list(left_out.values())


def quoted(benchmark: Any) -> dict[str, Any]:
    """The protocol in words, for the foot of the table."""
    if benchmark.name == "shapes":
        return {}

    def words(fact: Any) -> Any:
        if isinstance(fact, dict):
            return "; ".join(f"{name}: {words(value)}" for name, value in fact.items())
        return " + ".join(map(str, fact)) if isinstance(fact, list) else fact

    return {name: words(fact) for name, fact in benchmark.protocol().items()}


def run_images(args: argparse.Namespace) -> int:
    """Judges --images where they lie: scores/, results.jsonl and the official files go into that folder, the report to --out."""
    from diffalign.benchmarks.report import Judged, summarise, write_report, write_rows

    folder = args.images
    require_writable(folder)
    require_writable(args.out)
    shard, finish = share(args)
    benchmark = build(args)
    if args.benchmark == "t2i-compbench":
        grammar(args, benchmark)
    benchmark = with_judge(args, benchmark)
    if args.stage != "report":
        judge(args, benchmark, [folder], shard)
    if not finish():
        print(f"shard {shard.index}/{shard.count} is judged; the same command with --stage report, and no --shard, sums all up")
        return 0
    rows, left_out = rows_in_common(args, benchmark, [folder])
    write_rows(folder / "results.jsonl", rows[folder])
    write_official(benchmark, folder, rows[folder])
    summary = {
        "benchmark": benchmark.name,
        **({"measure": "Mean scores"} if args.benchmark == "t2i-compbench" else {}),
        **({"partial": left_out} if left_out else {}),
        **summarise({folder.name: Judged(rows[folder], [{"rewards": {}}] * len(rows[folder]))}),
        "facts": {**partial(left_out), **quoted(benchmark), "images": str(folder)},
    }
    print(write_report(args.out, summary), end="")
    return 0


def partial(left_out: Sequence[str]) -> dict[str, str]:
    """The line that marks a partial result, at the head of the facts."""
    return {"PARTIAL": f"{len(left_out)} images cannot be judged and were left out, the first {left_out[0]}"} if left_out else {}


def write_official(benchmark: Any, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The files that the benchmark's own evaluator writes, what the figures must be quoted with, and a page of what went wrong."""
    from diffalign.benchmarks.pages import failures_page
    from diffalign.files import write_json, write_text

    if benchmark.name == "geneval":
        from diffalign.benchmarks.geneval_results import summary

        write_text(folder / "summary.txt", summary(rows))
    elif benchmark.name == "t2i-compbench":
        from diffalign.benchmarks.t2i_compbench import write_upstream_results

        write_upstream_results(folder, rows)
    else:
        return
    write_json(folder / "protocol.json", {"benchmark": benchmark.name, **benchmark.protocol()})
    write_text(folder / "failures.html", failures_page(rows, f"{benchmark.name}, {folder.name}: what went wrong"))
