"""`diffalign train sft`, `dpo` and their kin: tune the pipeline's weights on pairs of images, of which one was preferred."""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from diffalign.commands import config, options

SUMMARIES = {
    "sft": "tune on the preferred images alone: the baseline",
    "dpo": "tune on preferences (Diffusion-DPO)",
    "inpo": "tune on preferences at the latents that lead to the images (DDIM-InPO)",
    "dcpo": "tune on preferences with a caption for each image (DCPO)",
    "mapo": "tune on preferences without a reference (MaPO)",
}
"""For each objective on pairs."""
WITH_BETA = {"dpo": "beta", "inpo": "preference", "dcpo": "objective", "mapo": "beta"}
"""Objective -> the field that beta, or the kernel with it, goes into."""
DATA = (
    "FOLDER holds pairs.jsonl with lines such as {\"prompt\": \"a red circle\", \"winner\": \"1.png\", \"loser\": \"2.png\"}; "
    "\"weight\", \"winner_caption\" and \"loser_caption\" may follow. The result is a LoRA: `diffalign generate --lora DIR`."
)  # fmt: skip


def add_parsers(kinds: Any) -> None:
    """One for each objective, below `diffalign train`."""
    for name, summary in SUMMARIES.items():
        parser = kinds.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {DATA}", allow_abbrev=False)
        add_options(parser, name)
        parser.set_defaults(run=run, objective=name)


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="pairs of images")
    parser.add_argument("--pipeline", type=options.pipeline_name, default="shapes", metavar="NAME", help="(default: %(default)s)")
    out = Path(f"outputs/{name}")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="LoRA, card, metrics, checkpoint (default: %(default)s)")
    parser.add_argument("--steps", type=options.count, default=200, metavar="N", help="batches to learn from (default: %(default)s)")
    parser.add_argument("--lr", type=options.scale, default=1e-4, metavar="X", help="peak learning rate, absolute (default: %(default)s)")
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant", help="after the warm-up (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10, metavar="N", help="steps up to the peak (default: %(default)s)")
    parser.add_argument("--batch-size", type=options.count, default=16, metavar="N", help="pairs in a step (default: %(default)s)")
    parser.add_argument("--micro-batch", type=options.count, metavar="N", help="pairs at once: less memory (default: all of the batch)")
    parser.add_argument("--rank", type=options.count, default=16, metavar="N", help="of the LoRA (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA")
    if name in WITH_BETA:
        parser.add_argument("--beta", type=options.scale, metavar="X", help="how much a difference counts (default: the method's own)")
    drop_help = "share of pairs that learn under the empty prompt, so that guidance goes on working (default: %(default)s)"
    parser.add_argument("--drop-prompts", type=options.scale, default=0.1, metavar="X", help=drop_help)
    parser.add_argument("--flip", action="store_true", help="mirror both images of every other pair")
    evaluate_help = "steps between evaluations on held-out prompts, whose best weights are kept (default: none)"
    parser.add_argument("--evaluate-every", type=options.count, default=0, metavar="N", help=evaluate_help)
    parser.add_argument("--held-out", type=options.scale, default=0.1, metavar="X", help="share of prompts for that (default: %(default)s)")
    parser.add_argument("--patience", type=options.count, metavar="N", help="stop after so many evaluations without a better one")
    average_help = "decay of the moving average of the weights that is kept instead of the last ones"
    parser.add_argument("--average", type=options.scale, metavar="X", help=average_help)
    parser.add_argument(
        "--save-every", type=options.count, default=50, metavar="N", help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=options.seed, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="bf16: the network computes in bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    parser.add_argument("--track", action="store_true", help="write TensorBoard files too (the extra `track`)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where encoded images are kept (default: latents/ in --out)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--dtype", choices=options.DTYPES, help="number type of the pipeline (default: the pipeline's own for the device)")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    config.add_option(parser)


def objective_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the objective is told of beta; nothing where nothing was asked for."""
    field = WITH_BETA.get(args.objective)
    if field is None or args.beta is None:
        return {}
    if field == "beta":
        return {field: args.beta}
    from diffalign.training.objectives.preference import DPO

    return {field: DPO(beta=args.beta)}


def run(args: argparse.Namespace) -> int:
    """Tunes, and prints where the result lies and what was measured."""
    from diffalign.training.data import PAIRS

    if args.data.is_dir() and not (args.data / PAIRS).is_file():  # before a pipeline is loaded for nothing
        raise ValueError(f"--data {args.data} has no {PAIRS}")
    from diffalign.training.loop import LoopSettings
    from diffalign.training.policy import Adaptation
    from diffalign.tuning import train

    fields = ("steps", "lr", "warmup", "schedule", "batch_size", "micro_batch", "seed", "average", "precision", "save_every")
    settings = LoopSettings(**{name: getattr(args, name) for name in fields}, evaluate_every=args.evaluate_every, patience=args.patience)
    try:
        done = train(
            args.objective,
            pipeline=args.pipeline,
            data=args.data,
            out=args.out,
            settings=settings,
            adaptation=Adaptation(rank=None if args.full else args.rank, checkpointing=args.checkpointing),
            objective_settings=objective_settings(args),
            drop_prompts=args.drop_prompts,
            flip=args.flip,
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
