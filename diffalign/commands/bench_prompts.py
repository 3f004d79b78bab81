"""The judges of `diffalign bench parti | hpsv2 | drawbench`, which are rewards, and of `dpg` and `geneval2`, which ask questions."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from diffalign.commands import options

VLM = "vlm"
QUESTIONS = ("dpg_bench.csv", "dpg_bench/dpg_bench.csv")


class Later:
    """A judge that is loaded when it is first asked; a report of what was judged before asks nobody."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = cache(load)

    def __call__(self, *arguments: Any) -> Any:
        return self._load()(*arguments)

    def ask(self, *arguments: Any) -> Any:
        return self._load().ask(*arguments)

    def answer(self, *arguments: Any) -> Any:
        return self._load().answer(*arguments)


def build(args: argparse.Namespace, common: Mapping[str, Any]) -> Any:
    from diffalign.benchmarks.prompt_list import PromptBenchmark
    from diffalign.benchmarks.prompt_sets.lists import read_prompt_set

    return PromptBenchmark(read_prompt_set(args.benchmark, args.prompts), **common)


def settings(args: argparse.Namespace, benchmark: Any) -> dict[str, Any]:
    return {"prompt list": benchmark.prompts.version}


# ---- rewards ---------------------------------------------------------------------------------------------------------------------


def reward_names(args: argparse.Namespace) -> list[str]:
    """The rewards that judge: those that are only watched first, then those that a search may have optimised."""
    return [*(args.watch or ()), *(name for name, _ in args.reward or ())]


def require_rewards(args: argparse.Namespace) -> None:
    """Before hours of generation, not after. Raises ValueError where there is nothing to judge by."""
    if args.stage != "generate" and not reward_names(args) and not options.is_shapes(args.pipeline):
        raise ValueError(f"--reward or --watch is needed: {args.benchmark} has no rules of its own, its images are judged by reward models")


def with_rewards(args: argparse.Namespace, benchmark: Any, device: str) -> Any:
    from diffalign.benchmarks.prompt_sets.preference import RewardScorer
    from diffalign.hub import load_reward, reward_specs

    def later(name: str) -> Later:
        return Later(lambda: load_reward(name, device=device).members[name][0])

    names, specs = reward_names(args) or list(options.DEFAULT_REWARD), reward_specs()
    scorers = [RewardScorer(later(name), name, f"{name} ({specs[name].unit})", device) for name in names]
    return dataclasses.replace(benchmark, scorers=scorers)


def hpsv2_official(benchmark: Any, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """hpsv2.txt: each reward's styles, as the official evaluator prints them: mean and spread of ten groups."""
    if benchmark.name != "hpsv2":
        return
    from diffalign.benchmarks.prompt_sets.preference import hpsv2_table
    from diffalign.files import write_text

    lines = [
        f"{measure} {style:<14} {mean:.4f} {spread:.4f}"
        for measure in rows[0]["values"]
        for style, (mean, spread) in hpsv2_table(rows, measure).items()
    ]
    write_text(folder / "hpsv2.txt", "\n".join(lines) + "\n")


def challenges(benchmark: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """PartiPrompts' second division: challenge -> mean of the first measure."""
    if benchmark.name != "parti":
        return {}
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(benchmark.prompts.rows[row["index"]].metadata["challenge"], []).append(next(iter(row["values"].values())))
    return {challenge: sum(values) / len(values) for challenge, values in sorted(found.items())}


# ---- questions -------------------------------------------------------------------------------------------------------------------


def require_judge(args: argparse.Namespace) -> None:
    """Raises ValueError where nobody answers the questions."""
    if args.judge and args.answers:
        raise ValueError("--judge asks a model and --answers brings answers; give one of them")
    if args.stage != "generate" and not args.judge and not args.answers:
        what = "--judge (vlm, or a hub id or folder of a Qwen-VL model) or --answers FILE.json"
        raise ValueError(f"{what} is needed: {args.benchmark} is judged by answers to questions about its images")
    if args.answers and not args.answers.is_file():
        raise ValueError(f"--answers {args.answers} does not exist")


def _panel(args: argparse.Namespace, device: str) -> Any:
    from diffalign.benchmarks.models.vqa import Panel
    from diffalign.hub import judge_name, load_judge

    source = None if args.judge == VLM else args.judge
    return Panel(Later(lambda: load_judge(source, device=device)), judge_name(source), device)


def with_dpg_judge(args: argparse.Namespace, benchmark: Any, device: str) -> Any:
    from diffalign.benchmarks.dpg.judge import DpgScorer
    from diffalign.benchmarks.models.vqa import GivenAnswers

    answers = GivenAnswers.read(args.answers) if args.answers else _panel(args, device)
    return dataclasses.replace(benchmark, scorers=[DpgScorer(answers, dpg_questions(args, benchmark))])


def dpg_questions(args: argparse.Namespace, benchmark: Any) -> Any:
    """Item id -> questions, of every prompt that is run. Raises FileNotFoundError where the question file is not at hand."""
    from diffalign.benchmarks.dpg.judge import require_questions
    from diffalign.benchmarks.dpg.questions import parse_questions
    from diffalign.benchmarks.prompt_sets.lists import HOMES
    from diffalign.benchmarks.sources import read_source

    source = args.questions or args.prompts
    try:
        text = read_source(source, QUESTIONS, HOMES["dpg"])
    except FileNotFoundError as error:
        what = f"the questions of DPG-Bench are in dpg_bench.csv, which is not at {source}"
        raise FileNotFoundError(f"{what}; name that file with --questions") from error
    questions = parse_questions(text, str(source))
    require_questions(questions, benchmark.items())
    return questions


def dpg_ready(args: argparse.Namespace, benchmark: Any) -> None:
    if args.stage != "generate":
        dpg_questions(args, benchmark)


def dpg_categories(benchmark: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from diffalign.benchmarks.dpg.judge import categories

    return categories(rows, benchmark.scorers[0].questions)


def dpg_official(benchmark: Any, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from diffalign.benchmarks.dpg.judge import write_official

    write_official(folder, rows, dpg_categories(benchmark, rows))


def dpg_import(args: argparse.Namespace, benchmark: Any) -> None:
    """--images with upstream's grids: cut into OUT/tiles, which are judged instead."""
    from diffalign.benchmarks.dpg.judge import cut_grids

    items = benchmark.items()
    if any((args.images / f"{item.metadata['item_id']}.png").is_file() for item in items):
        cut_grids(items, args.images, args.out / "tiles")
        args.images = args.out / "tiles"


def dpg_export(benchmark: Any, folder: Path) -> None:
    from diffalign.benchmarks.dpg.judge import write_grids

    write_grids(benchmark.items(), folder)


def with_geneval2_judge(args: argparse.Namespace, benchmark: Any, device: str) -> Any:
    from diffalign.benchmarks.geneval2.judge import GenEval2Scorer, GivenScores

    scorer = GivenScores.read(args.answers) if args.answers else GenEval2Scorer(_panel(args, device))
    return dataclasses.replace(benchmark, scorers=[scorer])


def geneval2_official(benchmark: Any, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from diffalign.benchmarks.geneval2.judge import write_official

    write_official(folder, rows, benchmark.items())


def geneval2_skills(benchmark: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from diffalign.benchmarks.geneval2.judge import skills

    return skills(rows)
