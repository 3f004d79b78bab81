"""The benchmarks of `diffalign bench`, one row each: options they take, official number of images, and the functions that serve them.

The functions import what they need when they are called; models are loaded when images are judged, after the generator is gone.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.commands import bench_prompts, bench_t2i

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Kind:
    """What the command needs to know of a benchmark.

    samples: images per prompt of the official protocol. options: those of the judge that it takes. splits: the first is the default.
    home: where its prompts come from, if the user has to bring them. verdicts: judged right or wrong, rather than by scores.
    pooled: "overall" is the mean over prompts, not over tasks. by_reward: judged by the rewards that --reward and --watch name.
    build(args, common): the benchmark without models. judge(args, benchmark, device): with them. check(args): raises ValueError before
    anything is made. ready(args, benchmark): the same, once prompts are read. settings: what images depend on besides the common settings.
    official(benchmark, folder, rows): writes what the official evaluator writes. export(benchmark, folder): its layout, where ours differs.
    bring(args, benchmark): the reverse, for --images. breakdown: (title, function from benchmark and rows to group -> number).
    """

    samples: int
    build: Callable[[argparse.Namespace, Mapping[str, Any]], Any]
    options: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    home: str | None = None
    verdicts: bool = False
    pooled: bool = False
    by_reward: bool = False
    judge: Callable[[argparse.Namespace, Any, str], Any] | None = None
    check: Callable[[argparse.Namespace], None] = lambda args: None
    ready: Callable[[argparse.Namespace, Any], Any] = lambda args, benchmark: None
    settings: Callable[[argparse.Namespace, Any], dict[str, Any]] = lambda args, benchmark: {}
    official: Callable[[Any, Path, Rows], None] = lambda benchmark, folder, rows: None
    export: Callable[[Any, Path], None] = lambda benchmark, folder: None
    bring: Callable[[argparse.Namespace, Any], None] = lambda args, benchmark: None
    breakdown: tuple[str, Callable[[Any, Rows], dict[str, float]]] | None = None


def _shapes(args: argparse.Namespace, common: Mapping[str, Any]) -> Any:
    from diffalign.benchmarks.shapes import ShapesBenchmark

    return ShapesBenchmark(args.split, args.samples, args.limit, args.seed)


def _geneval(args: argparse.Namespace, common: Mapping[str, Any]) -> Any:
    from diffalign.benchmarks.geneval.benchmark import GenEvalBenchmark

    return GenEvalBenchmark(**common, source=args.prompts)


def _geneval_check(args: argparse.Namespace) -> None:
    if args.stage == "generate" or (args.detector and (args.detector == "hf" or Path(args.detector).exists())):
        return
    from diffalign.benchmarks.geneval.weights import OFFICIAL_URL

    got = f"{args.detector} does not exist" if args.detector else "none was given"
    raise ValueError(f"--detector is needed to judge, and {got}: the official file ({OFFICIAL_URL}), or hf for another training of it")


def _geneval_judge(args: argparse.Namespace, benchmark: Any, device: str) -> Any:
    from diffalign.benchmarks.geneval.weights import HUB_CLIP, load_scorer

    return dataclasses.replace(benchmark, scorer=load_scorer(args.detector, args.clip or HUB_CLIP, device))


def _geneval_official(benchmark: Any, folder: Path, rows: Rows) -> None:
    from diffalign.benchmarks.geneval.results import summary
    from diffalign.files import write_text

    write_text(folder / "summary.txt", summary(rows))


def _t2i_ready(args: argparse.Namespace, benchmark: Any) -> None:
    if args.stage != "generate":
        bench_t2i.grammar(args, benchmark)


_PREFERENCE: dict[str, Any] = {
    "samples": 1,
    "build": bench_prompts.build,
    "options": ("prompts",),
    "pooled": True,
    "by_reward": True,
    "judge": bench_prompts.with_rewards,
    "check": bench_prompts.require_rewards,
    "settings": bench_prompts.settings,
}

KINDS: Mapping[str, Kind] = {
    "shapes": Kind(1, _shapes, splits=("test", "validation", "train", "hard"), verdicts=True),
    "geneval": Kind(
        4,
        _geneval,
        options=("detector", "clip", "prompts"),
        verdicts=True,
        judge=_geneval_judge,
        check=_geneval_check,
        official=_geneval_official,
    ),
    "t2i-compbench": Kind(
        10,
        bench_t2i.build,
        options=("detector", "clip", "prompts", "category", "phrases", "detections", "blip", "depth"),
        splits=("val", "val_seen", "val_unseen", "train"),
        home="the folder of your clone of https://github.com/Karine-Huang/T2I-CompBench",
        judge=bench_t2i.with_judge,
        ready=_t2i_ready,
        settings=bench_t2i.settings,
        official=bench_t2i.official,
    ),
    "dpg": Kind(
        4,
        bench_prompts.build,
        options=("prompts", "judge", "answers", "questions"),
        home="your clone of https://github.com/TencentQQGYLab/ELLA",
        pooled=True,
        judge=bench_prompts.with_dpg_judge,
        check=bench_prompts.require_judge,
        ready=bench_prompts.dpg_ready,
        settings=bench_prompts.settings,
        official=bench_prompts.dpg_official,
        export=bench_prompts.dpg_export,
        bring=bench_prompts.dpg_import,
        breakdown=("Categories of questions, percent of yes", bench_prompts.dpg_categories),
    ),
    "geneval2": Kind(
        1,
        bench_prompts.build,
        options=("prompts", "judge", "answers"),
        home="your clone of https://github.com/facebookresearch/GenEval2, or its geneval2_data.jsonl",
        pooled=True,
        judge=bench_prompts.with_geneval2_judge,
        check=bench_prompts.require_judge,
        settings=bench_prompts.settings,
        official=bench_prompts.geneval2_official,
        breakdown=("Skills, 100 x the mean probability of the right answer", bench_prompts.geneval2_skills),
    ),
    "parti": Kind(
        **_PREFERENCE,
        home="your clone of https://github.com/google-research/parti, or its PartiPrompts.tsv",
        breakdown=("By challenge, mean of the first reward", bench_prompts.challenges),
    ),
    "hpsv2": Kind(
        **_PREFERENCE,
        home="the folder with anime.json, concept-art.json, paintings.json and photo.json of zhwang/HPDv2, or its URL",
        official=bench_prompts.hpsv2_official,
    ),
    "drawbench": Kind(**_PREFERENCE, home="DrawBench as a .csv with the columns Prompts and Category, or a text file"),
}


def owners(option: str) -> tuple[str, ...]:
    """The benchmarks that take an option of the judge."""
    return tuple(name for name, kind in KINDS.items() if option in kind.options)
