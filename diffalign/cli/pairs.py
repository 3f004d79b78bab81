"""`diffalign pairs`: images of the shapes world's training prompts with votes by a simulated annotator, to tune on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffalign.cli import own_arguments, values
from diffalign.files import require_writable


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "pairs",
        help="draw images of the shapes world and have them voted on",
        description="Draws images of training prompts of the shapes world and has a simulated annotator vote on them. The folder is what "
        "`diffalign train dpo --data FOLDER` and its kin learn from. A stopped run goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/pairs"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--pipeline", type=values.pipeline_name, default="shapes", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--lora", type=values.lora, metavar="PATH", help="tuned weights on top of it, for another round")
    parser.add_argument("--prompts", type=values.count, default=300, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--images", type=values.count, default=8, metavar="N", help="of each prompt (default: %(default)s)")
    parser.add_argument("--steps", type=values.count, default=20, metavar="N", help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=values.scale, default=3.0, metavar="X", help="(default: %(default)s)")
    parser.add_argument("--flips", type=values.scale, default=0.1, metavar="X", help="share of wrong votes (default: %(default)s)")
    parser.add_argument("--votes", type=values.count, metavar="N", help="pairs altogether (default: all there are)")
    captions_help = "two captions a pair, for dcpo: what each image shows; the prompt, perturbed for the loser; or both (default: seen)"
    parser.add_argument("--captions", choices=("seen", "perturbed", "hybrid"), default="seen", help=captions_help)
    parser.add_argument("--strength", choices=("weak", "medium", "strong"), default="medium", help="of that (default: %(default)s)")
    parser.add_argument("--seed", type=values.seed, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=values.count, default=64, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    own_arguments.add_config(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draws, and prints how many pairs there are."""
    require_writable(args.out)
    from tqdm import tqdm

    from diffalign.cli.parts import load_lora, lora_identity
    from diffalign.hub import load_pipeline
    from diffalign.shapes.pairs import Annotator, Drawing, make_pairs

    drawing = Drawing(args.prompts, args.images, args.steps, args.guidance_scale, args.seed)
    annotator = Annotator(args.flips, args.votes, captions=args.captions, strength=args.strength, seed=args.seed)
    pipe = load_pipeline(args.pipeline, device=args.device)
    if args.lora is not None:
        load_lora(pipe, args.lora)
    model = args.pipeline if args.lora is None else f"{args.pipeline} + {lora_identity(args.lora)}"
    with tqdm(total=drawing.prompts * drawing.images, unit="image", disable=None) as bar:
        about = make_pairs(pipe, args.out, drawing, annotator, model=model, size=pipe.default_size(), batch_size=args.batch_size,
                           progress=bar.update)  # fmt: skip
    print(f"{about['images']} images, {about['right']:.1%} of them right by the judge; {about['pairs']} pairs of "
          f"{about['prompts with pairs']} prompts in {args.out}")  # fmt: skip
    return 0
