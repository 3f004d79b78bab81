"""What each command takes, a class each, and what can be checked before anything heavy loads."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from diffalign import hub
from diffalign.benchmarks.context import STAGES, BenchmarkOptions, Context, NoOptions
from diffalign.benchmarks.table import BENCHMARKS, Row
from diffalign.cli import values
from diffalign.cli.options import DEFAULT_PIPELINE, DEFAULT_REWARD, Guidance, Model, Rewards, Search, is_shapes, require_gradient, sources
from diffalign.options import group, option

BUDGET = 50
JUDGE_BATCH = 8  # images shown to a scorer at once


@dataclass(frozen=True)
class Generate:
    """`diffalign generate`"""

    prompts: tuple[str, ...] = option((), "what to draw; quote each prompt", many=True, positional=True, metavar="PROMPT")
    prompts_file: Path | None = option(None, 'more prompts: one a line, or .jsonl with {"prompt": ...}', parse=Path, metavar="FILE")
    method: str = option("reno", f"{', '.join(values.SEARCHES)}", parse=values.search_name)
    budget: int = option(
        BUDGET, "evaluations of the generator, each image", parse=values.count, metavar="N", formerly=("--iterations", "--evaluations")
    )
    search: Search = group("", Search())
    seed: int = option(0, "every prompt uses this same seed", parse=values.seed, metavar="N")
    out: Path = option(Path("outputs/generate"), "a folder per prompt goes here", parse=Path, metavar="DIR")
    overwrite: bool = option(False, "make prompts anew that were made with other settings")
    rewards: Rewards = group("rewards", Rewards())
    model: Model = group("pipeline", Model())
    guidance: Guidance = group("guidance", Guidance())

    def check(self) -> None:
        for i, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {i + 1} on the command line is empty; write what to draw")
        if not self.prompts and not self.prompts_file:
            raise ValueError("there is no prompt; give one in quotes, or --prompts-file FILE with one a line")
        self.model.check()
        self.search.check([self.method], self.model.pipeline)
        mix = self.mix()
        require_gradient([self.method], mix)
        self.guidance.settings(self.model.pipeline)
        self.rewards.places(mix)

    def mix(self) -> dict[str, float]:
        """Without a search there is nothing to optimise, so rewards are loaded (seconds) only where they were asked for."""
        if self.method == "none" and not self.rewards.reward and not self.rewards.watch:
            return {}
        return self.rewards.mix(self.model.pipeline)


@dataclass(frozen=True)
class BenchRun:
    """Which images are made, and what is done with them."""

    limit: int | None = option(None, "at most N prompts, of each task alike", parse=values.count, metavar="N")
    samples: int = option(1, "images per prompt", parse=values.count, metavar="N")
    seed: int = option(0, "what each image's own seed is drawn from", parse=values.seed, metavar="N")
    stage: str = option("all", f"one step alone: {', '.join(STAGES)}", choices=STAGES, metavar="STAGE")
    images: Path | None = option(None, "judge images made elsewhere, and generate nothing", parse=Path, metavar="DIR")
    allow_missing: bool = option(False, "report although images are missing; says which")
    out: Path = option(Path("outputs"), "results", parse=Path, metavar="DIR")
    overwrite: bool = option(False, "delete images that were made with other settings")
    shard: str | None = option(
        None, "make and judge every N-th image from the I-th, counted from 0; without it, report on all", metavar="I/N", advanced=True
    )
    allow_changed_versions: bool = option(
        False, "continue a run that other versions of diffalign or its libraries began; the report says so", advanced=True
    )
    grid: Path | None = option(None, "draw images before and after with the verdicts", parse=Path, metavar="FILE.png", advanced=True)
    grid_per_task: int = option(2, "prompts of each task in it, drawn by --seed", parse=values.count, metavar="N", advanced=True)


@dataclass(frozen=True)
class Bench:
    """`diffalign bench NAME`"""

    benchmark: str = ""
    own: BenchmarkOptions = group("the benchmark's own", NoOptions())
    method: tuple[str, ...] = option(
        ("none", "best-of-n", "reno"), "one or more; none is always added", parse=values.search_name, many=True, metavar="NAME"
    )
    budget: int = option(
        BUDGET, "evaluations of the generator, each image", parse=values.count, metavar="N", formerly=("--iterations", "--evaluations")
    )
    search: Search = group("", Search())
    run: BenchRun = group("", BenchRun())
    rewards: Rewards = group("rewards", Rewards())
    model: Model = group("pipeline", Model())
    guidance: Guidance = group("guidance", Guidance())

    @property
    def row(self) -> Row:
        return BENCHMARKS[self.benchmark]

    @property
    def methods(self) -> list[str]:
        """With "none", which the others are compared with, first."""
        return ["none", *dict.fromkeys(name for name in self.method if name != "none")]

    def context(self) -> Context:
        """What the benchmark is told."""
        run = self.run
        names = (*self.rewards.watch, *(name for name, _ in self.rewards.reward))
        judges = names or (tuple(DEFAULT_REWARD) if is_shapes(self.model.pipeline) else ())
        return Context(self.benchmark, run.samples, run.limit, run.seed, run.stage, run.out, run.images, JUDGE_BATCH, judges)

    def mix(self) -> dict[str, float]:
        """Without a search nothing is optimised, so rewards are loaded only where they were asked for; the shapes models have a default.

        Where rewards are the judges, images get their scores when they are judged.
        """
        given = self.rewards.reward or self.rewards.watch
        if self.run.images or (self.methods == ["none"] and (self.row.by_reward or not (given or is_shapes(self.model.pipeline)))):
            return {}
        return self.rewards.mix(self.model.pipeline)

    def check(self) -> None:
        run, name = self.run, self.benchmark
        if not self.model.pipeline and not run.images:
            what = f"{name} needs a pipeline that draws real images, and the default, {DEFAULT_PIPELINE}, draws shapes alone"
            raise ValueError(
                f"--pipeline is needed: {what}; give a preset, a local folder or a hub id, or --images DIR to judge what is there"
            )
        self.own.check(self.context())
        if run.images and not run.images.is_dir():
            raise ValueError(f"--images {run.images} is not a folder")
        if run.grid and not self.row.verdicts:
            raise ValueError(f"--grid shows right and wrong images; {name} gives scores instead, so it has none")
        if run.grid and run.grid.suffix.lower() != ".png":
            raise ValueError(f"--grid must name a .png file; got {run.grid}")
        self.model.check()
        if not run.images:
            self.search.check(self.methods, self.model.pipeline)
        mix = self.mix()
        require_gradient(self.methods, mix)
        self.guidance.settings(self.model.pipeline)
        self.rewards.places(mix)


def bench_defaults(row: Row) -> Bench:
    """The options of one benchmark: what is its own, and its defaults for what all have."""
    return Bench(
        row.name,
        row.options(),
        run=BenchRun(samples=row.samples, out=Path(f"outputs/bench-{row.name}")),
        model=Model(pipeline=None if row.real else DEFAULT_PIPELINE),
    )


@dataclass(frozen=True)
class BenchList:
    """`diffalign bench ls`"""

    def check(self) -> None:
        pass


@dataclass(frozen=True)
class Compare:
    """`diffalign compare`"""

    runs: tuple[Path, ...] = option(
        (), "folders of judged methods, such as outputs/a/none", parse=Path, many=True, positional=True, metavar="RUN"
    )
    allow_missing: bool = option(False, "compare the images that all runs have; says how many they lack")
    out: Path | None = option(None, "compare.json, compare.md, compare.html and curves go here", parse=Path, metavar="DIR")

    def check(self) -> None:
        if len(self.runs) < 2:
            raise ValueError(f"compare takes two or more runs: diffalign compare RUN_A RUN_B ...; got {len(self.runs)}")
        if len({folder.resolve() for folder in self.runs}) < len(self.runs):
            raise ValueError("compare was given a run twice")


@dataclass(frozen=True)
class Score:
    """`diffalign score`"""

    folder: Path = option(MISSING, "where the images are", parse=Path, positional=True, metavar="FOLDER")
    reward: tuple[str, ...] = option(MISSING, "names that `diffalign rewards` lists", parse=values.scored_reward, many=True, metavar="NAME")
    prompt: str | None = option(None, "the prompt of every image", metavar="TEXT")
    prompts: Path | None = option(
        None, "CSV, TSV, JSON or JSONL from file names to prompts (default: what lies beside the images)", parse=Path, metavar="FILE"
    )
    match: str | None = option(None, "only images whose path ends like this, as in '*/after.png'", metavar="PATTERN")
    out: Path | None = option(None, "results and a plot (default: outputs/score-FOLDER)", parse=Path, metavar="DIR")
    overwrite: bool = option(False, "delete scores that were made with other settings")
    allow_failed: bool = option(False, "end well although some images could not be scored; they are listed")
    calibrate: Path | None = option(
        None, "also write where the scores lie, for --calibration of other commands", parse=Path, metavar="FILE.json"
    )
    audit: bool = option(False, "also measure how rewards answer to brightness, JPEG, crops, paraphrase: a table and a plot")
    source: tuple[tuple[str, str | None, str], ...] = option(
        (), "where a reward's weights lie; NAME:PART=PLACE for one part of several", parse=values.source, many=True, metavar="NAME=PLACE"
    )
    batch_size: int = option(8, "images at once; speed and memory only", parse=values.count, metavar="N")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps ... (default: the best there is)")
    dtype: str | None = option(None, "number type of the rewards (default: each one's own)", choices=values.DTYPES)

    def check(self) -> None:
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("--prompt is for all images and --prompts for each; give one of them")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt is empty; write what the images should show")
        if not self.folder.exists():
            raise ValueError(f"the folder {self.folder} does not exist")
        self.places()

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.reward))

    def places(self) -> dict[str, dict[str, str]]:
        """Reward -> part -> where its weights lie."""
        known = hub.reward_specs()
        return sources(self.source, {name: known[name] for name in self.names})


UNITS = ("z", "within", "quantile")


@dataclass(frozen=True)
class Calibrate:
    """`diffalign calibrate`"""

    reward: tuple[str, ...] = option(
        MISSING, "which rewards; those to watch too, so that reports can show them in the same unit", parse=values.reward_name, many=True,
        metavar="NAME",
    )  # fmt: skip
    prompts_file: Path | None = option(
        None, "one a line, or .jsonl (default with shapes: their training prompts)", parse=Path, metavar="FILE"
    )
    limit: int = option(150, "at most N prompts, spread over the file", parse=values.count, metavar="N")
    samples: int = option(4, "images per prompt", parse=values.count, metavar="N")
    unit: str = option("z", "z: over all images; within: inside each prompt, for these very prompts", choices=UNITS)
    logit: tuple[str, ...] = option(
        (), "of these, which are probabilities, to be compared as log-odds", parse=values.reward_name, many=True, metavar="NAME"
    )
    seed: int = option(0, "each image's seed is drawn from this", parse=values.seed, metavar="N")
    out: Path = option(Path("outputs/calibration.json"), "where to write it", parse=Path, metavar="FILE.json")
    source: tuple[tuple[str, str | None, str], ...] = option(
        (), "where a reward's weights lie", parse=values.source, many=True, metavar="NAME=PLACE", advanced=True
    )
    model: Model = group("pipeline", Model())

    def check(self) -> None:
        strange = sorted(set(self.logit) - set(self.reward))
        if strange:
            raise ValueError(f"--logit names {strange[0]}, which is not among --reward")
        if not self.prompts_file and not is_shapes(self.model.pipeline):
            raise ValueError(
                f"--prompts-file is needed with --pipeline {self.model.pipeline}: prompts such as the calibration will be used on"
            )
        self.model.check()
        known = hub.reward_specs()
        sources(self.source, {name: known[name] for name in self.reward})


@dataclass(frozen=True)
class CaptionPairs:
    """`diffalign caption`"""

    data: Path = option(MISSING, "holds pairs.jsonl; captioned.jsonl is written beside it", parse=Path, metavar="FOLDER")
    captioner: str = option("shapes", "shapes: what the detector sees; else a vision-language model of transformers, Hub id or folder")
    strategy: str = option(
        "seen", "seen: what each shows; perturbed: the prompt, said otherwise for the loser; hybrid: seen, said otherwise for the loser",
        choices=("seen", "perturbed", "hybrid"),
    )  # fmt: skip
    strength: str = option("medium", "how far from what it was is said otherwise", choices=("weak", "medium", "strong"))
    score: str | None = option(None, "a reward that says how well captions fit their images", parse=values.reward_name, metavar="NAME")
    batch_size: int = option(8, "images at once; speed and memory only", parse=values.count, metavar="N")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps ... (default: the best there is)")

    def check(self) -> None:
        if not self.data.is_dir():
            raise ValueError(f"the folder {self.data} does not exist")


@dataclass(frozen=True)
class RewardTable:
    """`diffalign rewards`"""

    name: str | None = option(None, "all that is known of one", parse=values.reward_name, positional=True)
    json: bool = option(False, "as JSON, for programs")

    def check(self) -> None:
        pass


@dataclass(frozen=True)
class Demo:
    """`diffalign demo`"""

    host: str = option("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int | None = option(None, "port (default: the first free one from 7860)", parse=values.port, metavar="N")

    def check(self) -> None:
        pass
