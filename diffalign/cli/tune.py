"""`diffalign train sft`, `dpo`, `kto`, `d3po`, `r0` and their kin: tune the pipeline's weights, one command for each objective."""

from __future__ import annotations

from dataclasses import asdict

from diffalign.cli.options import is_shapes
from diffalign.cli.prompts import read as read_prompts
from diffalign.cli.train_commands import WATCHED, FromPairs, FromPrompts, FromVotes, Tune, Weights, chosen_reward
from diffalign.shapes.prompts import metadata
from diffalign.shapes.train.judged import annotator_rows
from diffalign.training.loop import LoopSettings
from diffalign.training.policy import Adaptation
from diffalign.tuning import train

TARGETS = {"attention": None, "linear": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "ff.net.0.proj")}
"""Names for --targets; None: the default of Adaptation."""


def run(options: Tune, command: str) -> int:
    """Tunes, and prints where the result lies and what was measured."""
    source, watching, place = options.source, options.watching, options.place
    try:
        done = train(
            options.objective,
            pipeline=place.pipeline,
            data=learned_prompts(source) if isinstance(source, FromPrompts) else source.data,
            out=options.folder,
            reward=chosen_reward(source.reward, place.pipeline) if isinstance(source, FromPrompts) else None,
            watch=watching.watch,
            held_out_prompts=held_out_prompts(options),
            settings=settings(options),
            adaptation=adaptation(options.weights),
            objective_settings=dict(options.set),
            paper=options.paper,
            drop_prompts=source.drop_prompts if isinstance(source, FromVotes) else 0.0,
            flip=isinstance(source, FromPairs) and source.flip,
            held_out=watching.held_out,
            resume=options.resume,
            track=options.track,
            cache=options.cache,
            device=place.device,
            dtype=place.dtype,
            command=command,
        )
    except FloatingPointError as error:  # a run that diverged is no bug to show a traceback of
        raise ValueError(str(error)) from error
    trained = done.trained
    kept = "" if trained.kept_step == trained.step else f"; the weights after step {trained.kept_step} are kept"
    print(f"{trained.step} steps in {trained.seconds:.0f} s{kept}")
    for each in (trained.figures, *trained.evaluations[-1:]):
        print("  " + "  ".join(f"{name} {value:.4g}" for name, value in each.items()))
    tuned = f"--pipeline {done.folder / 'pipeline'}" if options.weights.full else f"--lora {done.folder}"
    print(f"saved in {tuned.partition(' ')[2]}; use it with `diffalign generate {tuned}`")
    return 0


def settings(options: Tune) -> LoopSettings:
    """How the run goes."""
    weights, watching = options.weights, options.watching
    return LoopSettings(
        **asdict(options.loop),
        updates_per_batch=options.updates,
        precision=weights.precision,
        weight_budget=weights.weight_budget,
        evaluate_every=watching.evaluate_every,
        patience=watching.patience,
    )


def adaptation(weights: Weights) -> Adaptation:
    """What of the network learns."""
    named = TARGETS.get(weights.targets[0], weights.targets) if len(weights.targets) == 1 else weights.targets
    chosen = {} if named is None else {"targets": named}
    return Adaptation(rank=None if weights.full else weights.rank, checkpointing=weights.checkpointing, **chosen)


def learned_prompts(source: FromPrompts) -> list[str]:
    """What an objective makes images of."""
    if source.prompts_file is not None:
        return read_prompts(source.prompts_file)
    return list(dict.fromkeys(row["prompt"] for row in annotator_rows(1000, 0)))


def held_out_prompts(options: Tune) -> list[str]:
    """What watched rewards look at; none where the data's own are to be held out, or nothing is watched."""
    watching = options.watching
    if watching.held_out_prompts is not None:
        return read_prompts(watching.held_out_prompts)
    if not watching.watch or not is_shapes(options.place.pipeline):
        return []
    by_task: dict[str, list[str]] = {}
    for row in metadata("validation"):
        by_task.setdefault(row["tag"], []).append(row["prompt"])
    each = -(-WATCHED // len(by_task))
    return [prompt for found in by_task.values() for prompt in found[:: max(len(found) // each, 1)][:each]]
