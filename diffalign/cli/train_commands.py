"""What `diffalign train METHOD` and `diffalign pairs` take, a class each, and what can be checked before anything heavy loads."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from diffalign import hub
from diffalign.amortise import BATCH_SIZE, LR, STEPS
from diffalign.cli import values
from diffalign.cli.options import DEFAULT_PIPELINE, DEFAULT_REWARD, Model, is_shapes
from diffalign.options import group, option
from diffalign.training.table import Row

MULTISTEP = "shapes"
"""The embedded model that is tuned, and whose guidance is fitted: the one-step model has none."""
WATCHED = 48
"""Held-out prompts that watched rewards look at where none are given: of the shapes world's validation split, spread over its tasks."""


def require_prompts(file: Path | None, pipeline: str | None) -> None:
    """Raises ValueError where there are no prompts to take."""
    if file is None and not is_shapes(pipeline):
        raise ValueError(f"--prompts-file is needed with --pipeline {pipeline}: prompts like those it will be used with")


def chosen_reward(given: tuple[tuple[str, float], ...], pipeline: str | None) -> dict[str, float]:
    """What is learned from. Raises ValueError where nothing is given and no default fits."""
    if given:
        return dict(given)
    if is_shapes(pipeline):
        return dict(DEFAULT_REWARD)
    raise ValueError(f"--reward is needed with --pipeline {pipeline}: the default reward knows shapes only")


# ---- cheaper guidance ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectories:
    """What guidance is fitted on."""

    prompts_file: Path | None = option(None, "prompts, one a line (default with shapes: its validation split)", parse=Path, metavar="FILE")
    negative_prompt: str | None = option(None, "as it will be used", metavar="TEXT")
    seed: int = option(0, "trajectory i has seed N + i", parse=values.seed, metavar="N")


@dataclass(frozen=True)
class TrainLinear:
    """`diffalign train linear-ag`"""

    samples: int = option(200, "trajectories", parse=values.count, metavar="N")
    budget: float | None = option(
        None, "share of all evaluations; the fit chooses the steps (default: the paper's plan)", parse=values.scale, metavar="X"
    )
    tail: str = option(
        "conditional", "of the paper's plan: no guidance in the second half, or predicted", choices=("conditional", "estimate")
    )
    out: Path = option(Path("outputs/linear-ag"), "where it is written", parse=Path, metavar="DIR")
    on: Trajectories = group("trajectories", Trajectories())
    model: Model = group("pipeline", Model(pipeline=MULTISTEP))

    def check(self) -> None:
        self.model.check()
        require_prompts(self.on.prompts_file, self.model.pipeline)


@dataclass(frozen=True)
class TrainSearched:
    """`diffalign train guidance-search`"""

    budget: float = option(0.75, "share of all evaluations", parse=values.scale, metavar="X")
    iterations: int = option(80, "steps of the optimiser", parse=values.count, metavar="N")
    out: Path = option(Path("outputs/guidance-search"), "where it is written", parse=Path, metavar="DIR")
    on: Trajectories = group("trajectories", Trajectories())
    model: Model = group("pipeline", Model(pipeline=MULTISTEP))

    def check(self) -> None:
        self.model.check()
        require_prompts(self.on.prompts_file, self.model.pipeline)


# ---- what learns step by step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """How a run goes; the names and the defaults are those of training.loop.LoopSettings."""

    steps: int = option(200, "batches to learn from", parse=values.count, metavar="N")
    lr: float = option(1e-4, "peak learning rate, absolute", parse=values.scale, metavar="X")
    batch_size: int = option(16, "samples in a step", parse=values.count, metavar="N")
    micro_batch: int | None = option(None, "so many at once: less memory (default: all)", parse=values.count, metavar="N")
    seed: int = option(0, "what is random comes from it", parse=values.seed, metavar="N")
    schedule: str = option("constant", "after the warm-up", choices=("constant", "cosine"), advanced=True)
    warmup: int = option(10, "steps up to the peak", parse=values.count_or_none, metavar="N", advanced=True)
    average: float | None = option(
        None, "keep a moving average of the weights, of this decay", parse=values.scale, metavar="X", advanced=True
    )
    save_every: int = option(50, "steps between checkpoints", parse=values.count, metavar="N", advanced=True)


@dataclass(frozen=True)
class Place:
    """Which pipeline learns, and where."""

    pipeline: str = option(MULTISTEP, "a preset, a local folder, or a hub id", parse=values.pipeline_name)
    device: str | None = option(None, "cpu, cuda:1, ... (default: the best there is)")
    dtype: str | None = option(None, "number type (default: the pipeline's own for the device)", choices=values.DTYPES, advanced=True)


@dataclass(frozen=True)
class FromVotes:
    """Images that were liked or not."""

    data: Path = option(MISSING, "of images, as `diffalign pairs` and people make them", parse=Path, metavar="FOLDER")
    drop_prompts: float = option(
        0.1, "share of samples under the empty prompt, so that guidance goes on working", parse=values.scale, metavar="X", advanced=True
    )

    def check(self, pipeline: str) -> None:
        if not self.data.exists():
            raise ValueError(f"--data {self.data} does not exist; `diffalign pairs` makes such a folder for the shapes models")


@dataclass(frozen=True)
class FromPairs(FromVotes):
    """Pairs of images."""

    flip: bool = option(False, "mirror both images of every other pair")


@dataclass(frozen=True)
class FromPrompts:
    """Images that it makes itself, and what rewards say of them."""

    prompts_file: Path | None = option(None, "one a line (default with shapes: 1000 of training combinations)", parse=Path, metavar="FILE")
    reward: tuple[tuple[str, float], ...] = option(
        (), "to learn from (default with shapes: shapes-reward)", parse=values.reward_weight, many=True, metavar="NAME=WEIGHT"
    )

    def check(self, pipeline: str) -> None:
        chosen_reward(self.reward, pipeline)
        require_prompts(self.prompts_file, pipeline)


@dataclass(frozen=True)
class Watching:
    """When the weights are looked at, and by what."""

    evaluate_every: int = option(0, "steps between evaluations, whose best weights are kept", parse=values.count_or_none, metavar="N")
    patience: int | None = option(None, "stop after so many without a better one", parse=values.count, metavar="N")
    watch: tuple[str, ...] = option((), "rewards that decide, never optimised", parse=values.reward_name, many=True, metavar="NAME")
    held_out_prompts: Path | None = option(
        None, f"for --watch, one a line (default with shapes: {WATCHED} of validation; else a share of the data's own)", parse=Path,
        metavar="FILE", advanced=True,
    )  # fmt: skip
    held_out: float = option(0.1, "that share", parse=values.scale, metavar="X", advanced=True)


@dataclass(frozen=True)
class Weights:
    """What of the network learns."""

    rank: int = option(16, "of the LoRA", parse=values.count, metavar="N")
    full: bool = option(False, "train all weights instead of a LoRA")
    precision: str = option("no", "bf16: the network computes in bfloat16", choices=("no", "bf16"))
    checkpointing: bool = option(False, "less memory, a third more time")
    targets: tuple[str, ...] = option(
        ("attention",), "layers with an adapter: attention, linear (feed-forward too), or ends of names", many=True, metavar="NAME",
        advanced=True,
    )  # fmt: skip
    weight_budget: float | None = option(
        None, "how far weights may move from where they began, L2 norm; a step beyond is drawn back", parse=values.scale, metavar="X",
        advanced=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Tune:
    """`diffalign train dpo` and the other objectives"""

    objective: str = ""
    source: FromVotes | FromPrompts = group("", FromPairs(data=MISSING))
    out: Path | None = option(None, "LoRA, card, checkpoint (default: outputs/METHOD)", parse=Path, metavar="DIR")
    resume: bool = option(False, "go on from the checkpoint in --out")
    set: tuple[tuple[str, object], ...] = option(
        (), "settings of the method, as in beta=500", parse=values.setting, many=True, metavar="NAME=VALUE"
    )
    paper: bool = option(False, "start from the published settings")
    loop: Loop = group("training", Loop())
    updates: int = option(1, "optimiser steps on a batch", parse=values.count, metavar="N", advanced=True)
    watching: Watching = group("evaluation", Watching())
    weights: Weights = group("weights", Weights())
    place: Place = group("pipeline", Place())
    track: bool = option(False, "write TensorBoard files too (the extra `track`)", advanced=True)
    cache: Path | None = option(None, "of encoded images (default: latents/ in --out)", parse=Path, metavar="DIR", advanced=True)

    @property
    def folder(self) -> Path:
        return self.out or Path("outputs") / self.objective

    def check(self) -> None:
        self.source.check(self.place.pipeline)


def tune_defaults(row: Row) -> Tune:
    """The options of one objective."""
    kinds = {"pairs": FromPairs(data=MISSING), "votes": FromVotes(data=MISSING), "prompts": FromPrompts()}
    return Tune(row.name, kinds[row.data])


@dataclass(frozen=True)
class TrainNoise:
    """`diffalign train find`"""

    prompts_file: Path | None = option(None, "one a line (default with shapes: its training prompts)", parse=Path, metavar="FILE")
    reward: tuple[tuple[str, float], ...] = option(
        (), "to learn from (default with shapes: shapes-reward)", parse=values.reward_weight, many=True, metavar="NAME=WEIGHT"
    )
    form: str = option(
        "residual", "residual: reads the noise too; distribution: FIND's, of the prompt alone", choices=("residual", "distribution")
    )
    pull: float = option(0.5, "price of a nat an entry away from normal noise", parse=values.scale, metavar="X")
    out: Path = option(Path("outputs/noise"), "the policy, its card, the checkpoint", parse=Path, metavar="DIR")
    resume: bool = option(False, "go on from the checkpoint in --out")
    clip: float = option(1.0, "greatest norm of a sample's reward gradient", parse=values.scale, metavar="X", advanced=True)
    width: int = option(192, "entries of a token in the network", parse=values.count, metavar="N", advanced=True)
    blocks: int = option(2, "of the network", parse=values.count, metavar="N", advanced=True)
    patch: int = option(2, "side of a patch of the noise", parse=values.count, metavar="N", advanced=True)
    loop: Loop = group("training", Loop(steps=STEPS, lr=LR, batch_size=BATCH_SIZE, schedule="cosine", warmup=20))
    track: bool = option(False, "write TensorBoard files too (the extra `track`)", advanced=True)
    pipeline: str = option(DEFAULT_PIPELINE, "a preset, a local folder, or a hub id", parse=values.pipeline_name)
    device: str | None = option(None, "cpu, cuda:1, ... (default: the best there is)")

    def check(self) -> None:
        require_prompts(self.prompts_file, self.pipeline)
        specs = hub.reward_specs()
        flat = [name for name in chosen_reward(self.reward, self.pipeline) if not specs[name].differentiable]
        if flat:
            raise ValueError(f"reward {flat[0]!r} has no gradient, which a noise policy learns from; `--method find` asks for none")


# ---- what there is to learn from -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """`diffalign pairs`"""

    out: Path = option(Path("outputs/pairs"), "images and votes", parse=Path, metavar="DIR")
    prompts: int = option(300, "how many", parse=values.count, metavar="N")
    images: int = option(8, "of each prompt", parse=values.count, metavar="N")
    flips: float = option(0.1, "share of wrong votes", parse=values.scale, metavar="X")
    votes: int | None = option(None, "pairs altogether (default: all there are)", parse=values.count, metavar="N")
    captions: str = option(
        "seen", "two a pair, for dcpo: what each image shows; the prompt, perturbed for the loser; or both",
        choices=("seen", "perturbed", "hybrid"),
    )  # fmt: skip
    strength: str = option("medium", "of that", choices=("weak", "medium", "strong"))
    seed: int = option(0, "of images and votes", parse=values.seed, metavar="N")
    model: Model = group("pipeline", Model(pipeline=MULTISTEP, steps=20, guidance_scale=3.0, batch_size=64))

    def check(self) -> None:
        self.model.check()
