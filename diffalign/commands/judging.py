"""What `diffalign bench` does with images that lie on disk: options of the judges, shards, judging, rows that runs have in common.

Options that belong to another benchmark are refused, not ignored. What differs between benchmarks is in kinds.py.
"""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.commands import options
from diffalign.commands.generate import Interrupted
from diffalign.commands.kinds import KINDS, Kind, owners
from diffalign.files import read_json, require_writable, write_rows

STAGES = ("all", "generate", "score", "report")
JUDGE_BATCH = 8
JUDGE_OPTIONS = ("detector", "clip", "prompts", "category", "phrases", "detections", "blip", "depth", "judge", "answers", "questions")


def add_options(parser: argparse.ArgumentParser) -> None:
    """--shard, --stage, --allow-missing, --images, and what the judges need."""
    shard_help = "make and judge every N-th image from the I-th, counted from 0; without it, the same command reports on all"
    parser.add_argument("--shard", type=shard, metavar="I/N", help=shard_help)
    stage_help = "stop after generating, judge what is there, or only report what was judged (default: %(default)s)"
    parser.add_argument("--stage", choices=STAGES, default="all", help=stage_help)
    missing_help = "report although images are missing or cannot be read; says which, and marks the result partial"
    parser.add_argument("--allow-missing", action="store_true", help=missing_help)
    images_help = "judge images that another program made, in the benchmark's own layout, and generate nothing"
    parser.add_argument("--images", type=Path, metavar="DIR", help=images_help)
    prompts = parser.add_argument_group("prompts, of all but shapes and geneval, which draw their own")
    prompts_help = "your clone of the benchmark, its file of prompts, or the raw URL of either; geneval: where NumPy draws other ones"
    prompts.add_argument("--prompts", metavar="DIR", help=prompts_help)
    prompts.add_argument("--category", nargs="+", metavar="NAME", help="t2i-compbench: which categories (default: all eight)")
    judge = parser.add_argument_group("judges")
    judge.add_argument(
        "--detector",
        metavar="NAME",
        help="geneval: the official .pth file, or hf; t2i-compbench: owlv2, grounding-dino (default: owlv2). Or a folder",
    )
    judge.add_argument("--clip", metavar="NAME", help="another hub id or folder of geneval's CLIP ViT-L/14 or of t2i-compbench's ViT-B/32")
    phrases_help = "t2i-compbench: noun phrases and tags of the prompts (default: OUT/phrases.json, made by spaCy where absent)"
    judge.add_argument("--phrases", type=Path, metavar="FILE.json", help=phrases_help)
    judge.add_argument("--detections", type=Path, metavar="FILE.json", help="t2i-compbench: your detector's boxes instead of --detector")
    judge.add_argument("--blip", metavar="NAME", help="t2i-compbench: another hub id or folder of BLIP-VQA")
    judge.add_argument("--depth", metavar="NAME", help="t2i-compbench: another hub id or folder of DPT-hybrid")
    judge.add_argument("--judge", metavar="NAME", help="dpg, geneval2: who answers: vlm, or a hub id or folder of a Qwen-VL model")
    answers_help = "dpg: answers that you bring instead; geneval2: the official evaluator's scores"
    judge.add_argument("--answers", type=Path, metavar="FILE.json", help=answers_help)
    judge.add_argument("--questions", metavar="FILE.csv", help="dpg: dpg_bench.csv, where --prompts does not hold it")


def shard(text: str) -> Any:
    from diffalign.benchmarks.scoring import Shard

    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def resolve(args: argparse.Namespace) -> None:
    """Fills in the benchmark's defaults. Raises ValueError for an option of another benchmark, or one that is needed and absent."""
    name, kind = args.benchmark, KINDS[args.benchmark]
    for option in JUDGE_OPTIONS:
        if getattr(args, option) is not None and option not in kind.options:
            raise ValueError(f"--{option} belongs to {' and '.join(owners(option))}, not to {name}")
    if args.split and not kind.splits:
        raise ValueError(f"{name} has no --split; leave it out")
    args.split = args.split or (kind.splits[0] if kind.splits else None)
    if args.split and args.split not in kind.splits:
        raise ValueError(f"--split of {name} must be one of {', '.join(kind.splits)}; got {args.split}")
    if not args.pipeline and not args.images:
        if name != "shapes":
            what = f"{name} needs a pipeline that draws real images, and the default, {options.DEFAULT_PIPELINE}, draws shapes alone"
            raise ValueError(
                f"--pipeline is needed: {what}; give a preset, a local folder or a hub id, or --images DIR to judge what is there"
            )
        args.pipeline = options.DEFAULT_PIPELINE
    args.samples = args.samples or kind.samples
    args.out = args.out or Path(f"outputs/bench-{name}")
    if kind.home and not args.prompts:
        raise ValueError(f"--prompts is needed: {kind.home}")
    kind.check(args)
    if args.images and kind.judge is None:
        raise ValueError(f"--images belongs to benchmarks of other programs' models, not to {name}")
    if args.images and not args.images.is_dir():
        raise ValueError(f"--images {args.images} is not a folder")
    if args.grid and not kind.verdicts:
        raise ValueError(f"--grid shows right and wrong images; {name} gives scores instead, so it has none")


def build(args: argparse.Namespace) -> Any:
    """The benchmark with its items, without models. Raises ValueError or FileNotFoundError where its prompts cannot be had."""
    common = {"samples": args.samples, "limit": args.limit, "seed": args.seed, "batch_size": JUDGE_BATCH}
    return KINDS[args.benchmark].build(args, common)


def with_judge(args: argparse.Namespace, benchmark: Any) -> Any:
    """The benchmark with its models loaded. The shapes world's judge needs none."""
    judge = KINDS[args.benchmark].judge
    return judge(args, benchmark, _device(args)) if judge else benchmark


def _device(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Share:
    """One process's part of a run, and its part in what is common to all."""

    shard: Any
    reports: bool = True
    """Whether this process sums up."""
    opens: bool = True
    """Whether it starts and deletes folders; of the processes of one launcher the main one alone."""
    wait: Callable[[], None] = lambda: None
    """Returns when all processes of the launcher have called it."""

    def main_first(self, act: Callable[[bool], None]) -> None:
        """Calls act(True) in the process that opens folders while the others wait, then act(False) in those.

        Where the first one fails the others go on and find the reason themselves, rather than wait for ever.
        """
        self.wait()  # all have looked at what there is before anything is deleted
        try:
            if self.opens:
                act(True)
        finally:
            self.wait()
        if not self.opens:
            act(False)


def share(args: argparse.Namespace) -> Share:
    """--shard, or under `accelerate launch` (torchrun, ...) the process's own part, each on its own device; else everything."""
    from diffalign.benchmarks.scoring import WHOLE, Shard

    if args.shard:
        return Share(args.shard, reports=args.shard.count == 1)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Share(WHOLE)
    from accelerate import PartialState

    state = PartialState(cpu=args.device == "cpu")
    args.device = args.device or str(state.device)
    own = Shard(state.process_index, state.num_processes)
    return Share(own, state.is_main_process, state.is_main_process, state.wait_for_everyone)


def judge(args: argparse.Namespace, benchmark: Any, methods: Sequence[str | Path], shard: Any) -> None:
    """Judges the shard's images that have not been judged, all methods, with one bar. What cannot be judged is said when reporting.

    Raises Interrupted at Ctrl-C.
    """
    from tqdm import tqdm

    from diffalign.benchmarks.scoring import score_missing

    tasks = benchmark.tasks()
    total = len(methods) * sum(len(task.part(shard)) for task in tasks)
    with tqdm(total=total, unit="image", desc="judging", disable=None) as bar:
        try:
            for name in methods:
                for task in tasks:
                    score_missing(task, folder_of(args, name), benchmark.batch_size, shard, bar.update)
        except KeyboardInterrupt as stop:
            raise Interrupted(f"interrupted: {bar.n} of {total} judgements are kept; the same command continues") from stop


def folder_of(args: argparse.Namespace, method: str | Path) -> Path:
    return method if isinstance(method, Path) else args.out / method


def rows_in_common(args: argparse.Namespace, benchmark: Any, methods: Sequence[Any]) -> tuple[dict[Any, list[Any]], dict[str, str]]:
    """Each method's rows, and the items left out with the reason: those that any method lacks, so that all are compared on the same ones.

    A method is a folder's name inside --out, or a folder of its own.

    Raises FileNotFoundError naming them where they are not allowed.
    """
    from diffalign.benchmarks.scoring import require_all

    if KINDS[args.benchmark].judge is None:
        return {name: benchmark.score(args.out / name) for name in methods}, {}
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
    return common, left_out


def quoted(benchmark: Any) -> dict[str, Any]:
    """The protocol in words, for the foot of the table."""

    def words(fact: Any) -> Any:
        if isinstance(fact, dict):
            return "; ".join(f"{name}: {words(value)}" for name, value in fact.items())
        return " + ".join(map(str, fact)) if isinstance(fact, list) else fact

    return {name: words(fact) for name, fact in benchmark.protocol().items()}


def run_images(args: argparse.Namespace) -> int:
    """Judges --images where they lie: scores/, results.jsonl and the official files go into that folder, the report to --out."""
    from diffalign.benchmarks.base import require_prompts
    from diffalign.reports.summary import Judged, write_report

    require_writable(args.out)
    part = share(args)
    kind, benchmark = KINDS[args.benchmark], build(args)
    kind.ready(args, benchmark)
    kind.bring(args, benchmark)
    folder = args.images
    require_prompts(benchmark.items(), folder)
    require_writable(folder)
    benchmark = with_judge(args, benchmark)
    if args.stage != "report":
        judge(args, benchmark, [folder], part.shard)
    part.wait()
    if not part.reports:
        print(f"shard {part.shard.index}/{part.shard.count} is judged; the same command with --stage report, and no --shard, sums all up")
        return 0
    rows, left_out = rows_in_common(args, benchmark, [folder])
    write_rows(folder / "results.jsonl", rows[folder])
    write_official(kind, benchmark, folder, rows[folder])
    write_units(args, benchmark, folder, rows[folder], left_out)
    judged = {folder.name: Judged(rows[folder], [{"rewards": {}}] * len(rows[folder]))}
    summary = {
        "benchmark": benchmark.name,
        **({"limited": limited} if (limited := benchmark.limited()) else {}),
        **({"partial": list(left_out.values())} if left_out else {}),
        **summed_up(kind, benchmark, judged),
        "facts": {**partial(left_out), **quoted(benchmark), "images": str(folder)},
    }
    print(write_report(args.out, summary), end="")
    return 0


def summed_up(kind: Kind, benchmark: Any, judged: Mapping[str, Any], optimised: Collection[str] = ()) -> dict[str, Any]:
    """The summary of every measure, the first at the top, and the benchmark's own division.

    optimised: rewards that a search climbed; where rewards judge, their tables say so.
    """
    from diffalign.reports.summary import measures, summarise

    def title(measure: str) -> str:
        mark = "" if not (kind.by_reward and optimised) else " (optimised)" if measure in optimised else " (watched)"
        return f"Mean {measure}{mark}"

    first, *others = measures(next(iter(judged.values())).rows)
    summary = {
        "measure": "Judge accuracy" if kind.verdicts else title(first) if first else "Mean scores",
        **summarise(judged, measure=first, pooled=kind.pooled),
    }
    if others:
        found = {name: {"measure": title(name), **summarise(judged, measure=name, pooled=kind.pooled)} for name in others}
        for further in found.values():
            for method in further["methods"].values():
                del method["rewards"], method["cost"]  # they stand at the top
        summary["further"] = found
    if kind.breakdown:
        heading, function = kind.breakdown
        summary["breakdown"] = {"title": heading, "methods": {name: function(benchmark, each.rows) for name, each in judged.items()}}
    return summary


def partial(left_out: Mapping[str, str]) -> dict[str, str]:
    """The line that marks a partial result, at the head of the facts."""
    if not left_out:
        return {}
    return {"PARTIAL": f"{len(left_out)} images cannot be judged and were left out, the first {next(iter(left_out.values()))}"}


def write_units(
    args: argparse.Namespace, benchmark: Any, folder: Path, rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]
) -> None:
    """units.jsonl, one row per image of the run: what it is, what it cost, and its verdict or what is wrong with it."""
    from diffalign.reports.summary import COSTS

    judged = {row["filename"]: row for row in rows}
    method = read_json(folder / "settings.json")["method"] if (folder / "settings.json").is_file() else folder.name
    units = []
    for item in benchmark.items():
        row, trace = judged.get(item.name, {}), read_json(item.trace_path(folder)) if item.trace_path(folder).is_file() else {}
        units.append(
            {
                "benchmark": benchmark.name,
                "index": item.index,
                "sample": item.sample,
                "tag": item.task,
                "prompt": item.prompt,
                "path": item.name,
                "method": method,
                "pipeline": None if args.images else args.pipeline,
                **{name: trace.get(name) for name in ("seed", "size", "sha256", *COSTS)},
                "status": "judged" if row else "left out",
                "error": None if row else left_out.get(item.name),
                **{name: row[name] for name in ("correct", "reason", "value", "values") if name in row},
            }
        )
    write_rows(folder / "units.jsonl", units)


def write_official(kind: Kind, benchmark: Any, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The files that the benchmark's own evaluator writes, what the figures must be quoted with, and a page of what went wrong."""
    from diffalign.files import write_json, write_text
    from diffalign.reports.pages import failures_page

    write_json(folder / "protocol.json", {"benchmark": benchmark.name, **benchmark.protocol()})
    notice = folder / "LIMITED.txt"  # beside files of official evaluators' formats, which have no place for it
    if limited := benchmark.limited():
        write_text(notice, f"Every figure in this folder is {limited}.\n")
    else:
        notice.unlink(missing_ok=True)
    if kind.judge is None:
        return
    kind.official(benchmark, folder, rows)
    title = ", ".join(filter(None, (benchmark.name, f"{folder.name}: what went wrong", limited)))
    write_text(folder / "failures.html", failures_page(rows, title))
