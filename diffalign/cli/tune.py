"""`diffalign train sft`, `dpo`, `kto`, `d3po`, `r0` and their kin: tune the pipeline's weights, one subcommand for each objective."""

from __future__ import annotations

import argparse
import ast
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.cli import own_arguments, values
from diffalign.cli.options import is_shapes
from diffalign.cli.prompts import read as read_prompts

DATA = {
    "pairs": "FOLDER holds pairs.jsonl with lines such as {\"prompt\": \"a red circle\", \"winner\": \"1.png\", \"loser\": \"2.png\"}; "
    "\"weight\", \"winner_caption\" and \"loser_caption\" may follow.",
    "votes": "FOLDER holds votes.jsonl with lines such as {\"prompt\": \"a red circle\", \"image\": \"1.png\", \"good\": true}, or pairs.",
    "prompts": "It makes its own images of the prompts and asks --reward what they are worth.",
}  # fmt: skip
WATCHED = 48
"""Held-out prompts that watched rewards look at where none are given: of the shapes world's validation split, spread over its tasks."""
TARGETS = {"attention": None, "linear": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "ff.net.0.proj")}
"""Names for --targets; None: the default of Adaptation."""


def add_parsers(kinds: Any) -> None:
    """One for each objective, below `diffalign train`."""
    from diffalign.training.table import TABLE

    for row in TABLE:
        text = f"{row.summary[0].upper()}{row.summary[1:]}. {DATA[row.data]} The result is a LoRA: `diffalign generate --lora DIR`."
        parser = kinds.add_parser(row.name, help=row.summary, description=text, allow_abbrev=False)
        add_options(parser, row)
        parser.set_defaults(run=run, objective=row.name)


def add_options(parser: argparse.ArgumentParser, row: Any) -> None:
    data_help = f"{row.data} of images, as `diffalign pairs` and people make them"
    if row.data == "prompts":
        prompts_help = "prompts to learn on, one a line (default with shapes: 1000 of training combinations)"
        parser.add_argument("--prompts-file", type=Path, metavar="FILE", help=prompts_help)
    else:
        parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help=data_help)
    parser.add_argument("--pipeline", type=values.pipeline_name, default="shapes", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(f"outputs/{row.name}"), metavar="DIR",
                        help="LoRA, card, metrics, checkpoint (default: %(default)s)")  # fmt: skip
    if row.rewards != "none":
        parser.add_argument("--reward", type=values.reward_weight, nargs="+", action="extend", metavar="NAME=WEIGHT",
                            help="what to learn from (default with shapes: shapes-reward)")  # fmt: skip
    watch_help = "rewards that decide which weights are kept and when to stop; looked at on held-out prompts, never optimised"
    parser.add_argument("--watch", type=values.reward_name, nargs="+", action="extend", metavar="NAME", help=watch_help)
    held_out_help = f"prompts for --watch, one a line (default with shapes: {WATCHED} of validation; else a share of the data's own)"
    parser.add_argument("--held-out-prompts", type=Path, metavar="FILE", help=held_out_help)
    set_help = "settings of the method, as in beta=500 or rollouts.images=8; the page of the method lists them"
    parser.add_argument("--set", type=setting, nargs="+", action="extend", metavar="NAME=VALUE", help=set_help)
    parser.add_argument("--paper", action="store_true", help="start from the published settings instead of ours")
    parser.add_argument("--steps", type=values.count, default=200, metavar="N", help="batches to learn from (default: %(default)s)")
    parser.add_argument("--lr", type=values.scale, default=1e-4, metavar="X", help="peak learning rate, absolute (default: %(default)s)")
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant", help="after the warm-up (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10, metavar="N", help="steps up to the peak (default: %(default)s)")
    parser.add_argument("--batch-size", type=values.count, default=16, metavar="N", help=f"{row.data} in a step (default: %(default)s)")
    parser.add_argument("--micro-batch", type=values.count, metavar="N", help="so many at once: less memory (default: all of the batch)")
    parser.add_argument("--updates", type=values.count, default=1, metavar="N", help="optimiser steps on a batch (default: %(default)s)")
    parser.add_argument("--rank", type=values.count, default=16, metavar="N", help="of the LoRA (default: %(default)s)")
    targets_help = "layers with an adapter: attention, linear (feed-forward too), or ends of names (default: attention)"
    parser.add_argument("--targets", nargs="+", default=["attention"], metavar="NAME", help=targets_help)
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA")
    budget_help = "how far the weights may move from where they began, L2 norm; further steps are drawn back to it (default: no limit)"
    parser.add_argument("--weight-budget", type=values.scale, metavar="X", help=budget_help)
    if row.data != "prompts":
        drop_help = "share of samples that learn under the empty prompt, so that guidance goes on working (default: %(default)s)"
        parser.add_argument("--drop-prompts", type=values.scale, default=0.1, metavar="X", help=drop_help)
    if row.data == "pairs":
        parser.add_argument("--flip", action="store_true", help="mirror both images of every other pair")
    evaluate_help = "steps between evaluations on held-out prompts, whose best weights are kept (default: none)"
    parser.add_argument("--evaluate-every", type=values.count, default=0, metavar="N", help=evaluate_help)
    parser.add_argument("--held-out", type=values.scale, default=0.1, metavar="X", help="share of prompts for that (default: %(default)s)")
    parser.add_argument("--patience", type=values.count, metavar="N", help="stop after so many evaluations without a better one")
    average_help = "decay of the moving average of the weights that is kept instead of the last ones"
    parser.add_argument("--average", type=values.scale, metavar="X", help=average_help)
    save_help = "steps between checkpoints (default: %(default)s)"
    parser.add_argument("--save-every", type=values.count, default=50, metavar="N", help=save_help)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=values.seed, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="bf16: the network computes in bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    parser.add_argument("--track", action="store_true", help="write TensorBoard files too (the extra `track`)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where encoded images are kept (default: latents/ in --out)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--dtype", choices=values.DTYPES, help="number type of the pipeline (default: the pipeline's own for the device)")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    own_arguments.add_config(parser)


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is read as Python would (numbers, True, None, tuples), else it is text."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, as in beta=500; got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def run(args: argparse.Namespace) -> int:
    """Tunes, and prints where the result lies and what was measured."""
    from diffalign.training.table import find_row

    row = find_row(args.objective)
    if row.data != "prompts" and not args.data.exists():  # before a pipeline is loaded for nothing
        raise ValueError(f"--data {args.data} does not exist; `diffalign pairs` makes such a folder for the shapes models")
    from diffalign.training.loop import LoopSettings
    from diffalign.training.policy import Adaptation
    from diffalign.tuning import train

    fields = ("steps", "lr", "warmup", "schedule", "batch_size", "micro_batch", "seed", "average", "precision", "save_every", "patience",
              "evaluate_every", "weight_budget")  # fmt: skip
    settings = LoopSettings(**{name: getattr(args, name) for name in fields}, updates_per_batch=args.updates)
    try:
        done = train(
            args.objective,
            pipeline=args.pipeline,
            data=learned_prompts(args) if row.data == "prompts" else args.data,
            out=args.out,
            reward=rewards(args) if row.rewards != "none" else None,
            watch=args.watch or (),
            held_out_prompts=held_out_prompts(args),
            settings=settings,
            adaptation=adaptation(args, Adaptation),
            objective_settings=dict(args.set or ()),
            paper=args.paper,
            drop_prompts=getattr(args, "drop_prompts", 0.0),
            flip=getattr(args, "flip", False),
            held_out=args.held_out,
            resume=args.resume,
            track=args.track,
            cache=args.cache,
            device=args.device,
            dtype=args.dtype,
            command=shlex.join(["diffalign", *args.argv]),
        )
    except FloatingPointError as error:  # a run that diverged is no bug to show a traceback of
        raise ValueError(str(error)) from error
    trained = done.trained
    kept = "" if trained.kept_step == trained.step else f"; the weights after step {trained.kept_step} are kept"
    print(f"{trained.step} steps in {trained.seconds:.0f} s{kept}")
    for each in (trained.figures, *trained.evaluations[-1:]):
        print("  " + "  ".join(f"{name} {value:.4g}" for name, value in each.items()))
    print(f"saved in {done.folder}; use it with `diffalign generate --lora {done.folder}`" if not args.full else
          f"saved in {done.folder / 'pipeline'}; use it with `diffalign generate --pipeline {done.folder / 'pipeline'}`")  # fmt: skip
    return 0


def adaptation(args: argparse.Namespace, made: Any) -> Any:
    """What of the network learns."""
    named = TARGETS.get(args.targets[0]) if len(args.targets) == 1 and args.targets[0] in TARGETS else tuple(args.targets)
    chosen = {} if named is None else {"targets": named}
    return made(rank=None if args.full else args.rank, checkpointing=args.checkpointing, **chosen)


def rewards(args: argparse.Namespace) -> Mapping[str, float]:
    """What is learned from. ValueError where nothing is given and no default fits."""
    if args.reward:
        return dict(args.reward)
    if is_shapes(args.pipeline):
        return {"shapes-reward": 1.0}
    raise ValueError(f"--reward is needed with --pipeline {args.pipeline}: the default reward knows shapes only")


def learned_prompts(args: argparse.Namespace) -> list[str]:
    """What an objective makes images of."""
    if args.prompts_file is not None:
        return read_prompts(args.prompts_file)
    if not is_shapes(args.pipeline):
        raise ValueError(f"--prompts-file is needed with --pipeline {args.pipeline}: prompts like those it will be used with")
    from diffalign.shapes.train.judged import annotator_rows

    return list(dict.fromkeys(row["prompt"] for row in annotator_rows(1000, 0)))


def held_out_prompts(args: argparse.Namespace) -> list[str]:
    """What watched rewards look at; none where the data's own are to be held out, or nothing is watched."""
    if args.held_out_prompts is not None:
        return read_prompts(args.held_out_prompts)
    if not args.watch or not is_shapes(args.pipeline):
        return []
    from diffalign.shapes.prompts import metadata

    by_task: dict[str, list[str]] = {}
    for row in metadata("validation"):
        by_task.setdefault(row["tag"], []).append(row["prompt"])
    each = -(-WATCHED // len(by_task))
    return [prompt for found in by_task.values() for prompt in found[:: max(len(found) // each, 1)][:each]]
