"""The table of commands, one row for each: its words, what it takes, and the function that does it.

Read without anything heavy: a command's module, with torch and diffusers behind it, is imported by `run` once its arguments are checked.
That is why --help and a mistyped name answer at once, and why no function of the command line imports anything.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass
from importlib import import_module
from typing import Protocol

from diffalign.benchmarks.table import BENCHMARKS, Row
from diffalign.cli.commands import BenchList, Calibrate, CaptionPairs, Compare, Demo, Generate, RewardTable, Score, bench_defaults
from diffalign.cli.train_commands import Pairs, TrainLinear, TrainNoise, TrainSearched, tune_defaults
from diffalign.cli.values import searches_help
from diffalign.training import table as objectives


class Checked(Protocol):
    """What a command takes: a settings class."""

    def check(self) -> None:
        """Raises ValueError for what does not fit together or is needed and absent; nothing is loaded for it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Command:
    """A row of the table."""

    words: tuple[str, ...]
    """As they are typed: ("bench", "geneval")."""
    summary: str
    """In the list of commands."""
    description: str
    """Over its options."""
    takes: Checked
    """Its settings with their defaults."""
    target: str
    """"module:function" from settings and the typed command to an exit code, the module inside diffalign.cli."""
    epilog: str = ""
    """Under its options."""
    heavy: bool = False
    """Whether torch and diffusers are behind it: a terminal is told before the seconds that they take to import."""

    def run(self, options: Checked, command: str) -> int:
        module, _, function = self.target.partition(":")
        if self.heavy and sys.stderr.isatty():
            print("importing torch and diffusers ...", file=sys.stderr, flush=True)
        return getattr(import_module(f"diffalign.cli.{module}"), function)(options, command)


@dataclass(frozen=True)
class Group:
    """What several commands with the same first word are."""

    summary: str
    """In the list of commands."""
    metavar: str
    """What the second word names."""
    epilog: str = ""
    """Under the list of them."""


def bench_command(row: Row) -> Command:
    """A benchmark as a command."""
    description = f"{row.summary} ({row.paper})"
    return Command(
        words=("bench", row.name), summary=row.summary, description=description, takes=bench_defaults(row), target="bench:run", heavy=True
    )


LEARNS_FROM = {
    "pairs": 'FOLDER holds pairs.jsonl with lines such as {"prompt": "a red circle", "winner": "1.png", "loser": "2.png"};\n"weight", '
    '"winner_caption" and "loser_caption" may follow.',
    "votes": 'FOLDER holds votes.jsonl with lines such as {"prompt": "a red circle", "image": "1.png", "good": true}, or pairs.',
    "prompts": "It makes its own images of the prompts and asks --reward what they are worth.",
}


def tune_command(row: objectives.Row) -> Command:
    """An objective as a command."""
    description = (
        f"{row.summary[0].upper()}{row.summary[1:]}. {LEARNS_FROM[row.data]} The result is a LoRA: `diffalign generate --lora DIR`."
    )
    return Command(
        words=("train", row.name), summary=row.summary, description=description, takes=tune_defaults(row), target="tune:run", heavy=True
    )


COMMANDS: tuple[Command, ...] = (
    Command(
        words=("generate",),
        summary="make images, before and after a search for better noise",
        description="Makes an image of each prompt, and a better one by searching over the initial noise for what the rewards like.",
        takes=Generate(),
        target="generate:run",
        heavy=True,
        epilog=searches_help(),
    ),
    *(bench_command(row) for row in BENCHMARKS.values()),
    Command(
        words=("bench", "ls"),
        summary="list the benchmarks",
        description="Lists the benchmarks.",
        takes=BenchList(),
        target="bench_list:run",
    ),
    Command(
        words=("compare",),
        summary="compare judged runs image by image",
        description="Compares judged methods on the same images: intervals, paired tests, and what each gain cost.",
        takes=Compare(),
        target="compare:run",
    ),
    Command(
        words=("score",),
        summary="score images that exist already",
        description="Scores the images of a folder and those below it with rewards that `diffalign rewards` lists. Resumable.",
        takes=Score(folder=MISSING, reward=MISSING),
        target="score:run",
        heavy=True,
    ),
    Command(
        words=("rewards",),
        summary="list the rewards",
        description="Lists the rewards: what they are, where their weights come from, their licences and usual scores.",
        takes=RewardTable(),
        target="rewards:run",
    ),
    Command(
        words=("calibrate",),
        summary="measure rewards on a model's own images, for --calibration",
        description="Generates images with a pipeline, scores them with each reward, and writes mean, spread and quantiles.",
        takes=Calibrate(reward=MISSING),
        target="calibrate:run",
        heavy=True,
    ),
    Command(
        words=("train", "linear-ag"),
        summary="predict the unconditional branch from earlier predictions",
        description="Fits LinearAG to trajectories of the pipeline with full guidance: same steps, guidance scale and negative prompt as "
        "it will be used with.",
        takes=TrainLinear(),
        target="train:run_linear",
        heavy=True,
    ),
    Command(
        words=("train", "guidance-search"),
        summary="search a guidance policy under a budget of evaluations",
        description="Searches one option per step (unconditional, conditional, or guided at some strength) within a budget of evaluations.",
        takes=TrainSearched(),
        target="train:run_search",
        heavy=True,
    ),
    Command(
        words=("train", "find"),
        summary="learn to move noise towards what a reward likes, for all prompts",
        description="Trains a small network that moves the initial noise, for `--method amortised --policy DIR`.",
        takes=TrainNoise(),
        target="train_noise:run",
        heavy=True,
    ),
    *(tune_command(row) for row in objectives.TABLE),
    Command(
        words=("pairs",),
        summary="draw images of the shapes world and have them voted on",
        description="Draws images of training prompts of the shapes world and has a simulated annotator vote on them. The folder is what "
        "`diffalign train dpo --data FOLDER` and its kin learn from. A stopped run goes on where it was.",
        takes=Pairs(),
        target="pairs:run",
        heavy=True,
    ),
    Command(
        words=("caption",),
        summary="give each image of preference pairs a caption of its own",
        description="Writes two captions for each pair of images, for `diffalign train dcpo --data FOLDER/captioned.jsonl`. Resumable.",
        takes=CaptionPairs(data=MISSING),
        target="caption:run",
    ),
    Command(
        words=("demo",),
        summary="open the app in a browser",
        description="Opens the app in a browser.",
        takes=Demo(),
        target="demo:run",
    ),
)
GROUPS = {
    "bench": Group("measure methods on a benchmark", "BENCHMARK", searches_help()),
    "train": Group("tune a pipeline, or fit cheaper guidance or a noise policy to it", "METHOD"),
}
"""First words that several commands share."""
