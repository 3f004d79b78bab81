"""`diffalign score`: rewards of images that exist already, one reward in memory at a time, resumable.

Images are found in a folder and everything below it, their prompts where people keep them (image_prompts.py). A run that was stopped goes
on with what is missing; further rewards and further images may be added to it.
"""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
import gc
import shlex
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffalign.commands import config, evaluation, options
from diffalign.commands.generate import Interrupted
from diffalign.commands.image_files import ImageFile, first_names, list_images
from diffalign.commands.image_prompts import Prompt, find_prompts, require_text
from diffalign.files import differing_settings, read_json, require_writable, write_json

BATCH = 8
PROMPT_WAYS = (
    "give --prompt TEXT for all of them, --prompts FILE.csv with the columns file_name and prompt, NAME.txt beside NAME.png, "
    "or metadata.jsonl in the folder"
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "score",
        help="score images that exist already",
        description="Scores the images of a folder and those below it with rewards that `diffalign rewards` lists. Resumable.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the images are")
    reward_help = "one or more of the names that `diffalign rewards` lists"
    parser.add_argument("--reward", type=reward_name, nargs="+", action="extend", required=True, metavar="NAME", help=reward_help)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="the prompt of every image")
    table_help = "CSV, TSV, JSON or JSONL from file names to prompts (default: what lies beside the images, see docs/score.md)"
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help=table_help)
    match_help = "only images whose path ends like this, as in '*/after.png'; quote it"
    parser.add_argument("--match", metavar="PATTERN", help=match_help)
    source_help = "where a reward's weights lie: a folder, a file, a hub id; NAME:PART=PLACE for one part of several"
    parser.add_argument("--source", type=source, nargs="+", action="extend", default=[], metavar="NAME=PLACE", help=source_help)
    batch_help = "images at once; speed and memory only (default: %(default)s)"
    parser.add_argument("--batch-size", type=options.count, default=BATCH, metavar="N", help=batch_help)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--dtype", choices=options.DTYPES, help="number type of the rewards (default: each one's own)")
    out_help = "results.csv, results.json and a plot go here (default: outputs/score-FOLDER)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    parser.add_argument("--overwrite", action="store_true", help="delete scores that were made with other settings")
    parser.add_argument("--allow-failed", action="store_true", help="end well although some images could not be scored; they are listed")
    calibrate_help = "also write where each reward's scores lie, for --calibration of other commands; best on the base model's images"
    parser.add_argument("--calibrate", type=Path, metavar="FILE.json", help=calibrate_help)
    audit_help = "also measure how each reward answers to brightness, JPEG, crops, paraphrase and the like: a table and a plot"
    parser.add_argument("--audit", action="store_true", help=audit_help)
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    config.add_option(parser)
    parser.set_defaults(run=run)


def reward_name(text: str) -> str:
    name, equals, _ = text.partition("=")
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; it comes first, as in diffalign score {text} --reward NAME")
    options.reward_name(name)
    if equals:
        raise argparse.ArgumentTypeError(f"every reward is scored by itself, in its own unit, so {name} takes no weight; got {text!r}")
    return name


def source(text: str) -> tuple[str, str | None, str]:
    """NAME=PLACE or NAME:PART=PLACE as (name, part or None, place)."""
    target, equals, place = text.partition("=")
    name, colon, part = target.partition(":")
    if not equals or not place or (colon and not part):
        raise argparse.ArgumentTypeError(f"must be NAME=PLACE or NAME:PART=PLACE; got {text!r}")
    options.reward_name(name)
    return name, part or None, place


def run(args: argparse.Namespace) -> int:
    """Scores what is missing, writes the results. Raises ValueError or OSError with the sentence to show, Interrupted at Ctrl-C."""
    from diffalign.hub import reward_specs

    names = list(dict.fromkeys(args.reward))
    known = reward_specs()
    specs = {name: known[name] for name in names}
    places = sources(args.source, specs)
    listing = list_images(args.folder, args.match)
    if listing.aside:
        print(f"note: left out, since they show other images or scores: {first_names(listing.aside)}")
    prompts = needed_prompts(args, specs, listing.images)
    out = args.out or Path("outputs") / f"score-{args.folder.resolve().name or 'root'}"
    kept = settings(args, specs, places)
    open_out(out, kept, args.overwrite)
    works = score(args, out, specs, places, listing.images, prompts)

    from diffalign.commands import score_report

    rows = score_report.rows_of(listing.images, prompts, works)
    score_report.write_results(out, rows, specs, {**facts(args, out), "settings": kept})
    print(score_report.table(rows, names))
    print(f"results.csv, results.json and distributions.png are in {out}")
    if args.audit:
        print(audit(args, out, rows, names, places))
        print(f"audit.csv, audit.json and audit.png are in {out}")
    code = score_report.tell(rows, args.allow_failed)
    if args.calibrate:
        calibrate(args, rows, names)
    return code


def sources(given: Sequence[tuple[str, str | None, str]], specs: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Reward -> part -> where its weights lie. Raises ValueError for a reward not to score, a part it lacks, or two places for one."""
    from diffalign.reward_models import sources_of

    found: dict[str, dict[str, str]] = {}
    for name, part, place in given:
        if name not in specs:
            raise ValueError(f"--source names {name}, which is not among the rewards to score ({', '.join(specs)})")
        if not specs[name].checkpoint:
            raise ValueError(f"--source names {name}, which has no weights to load")
        part = part or next(iter(specs[name].checkpoint))
        if part in found.get(name, {}):
            raise ValueError(f"--source gives {name} two places for its {part}; give one")
        found.setdefault(name, {})[part] = place
    for name, places in found.items():
        sources_of(specs[name], places)
    return found


def needed_prompts(args: argparse.Namespace, specs: Mapping[str, Any], images: Sequence[ImageFile]) -> dict[str, Prompt]:
    """The images' prompts, where a reward needs any or they were given.

    Raises ValueError where an image has none that is needed, unless failures are allowed.
    """
    needing = [name for name, spec in specs.items() if spec.needs_prompt]
    if args.prompt is not None:
        if not args.prompt.strip():
            raise ValueError("--prompt is empty; write what the images should show")
        require_text(args.prompt, "--prompt")
    if not needing and args.prompt is None and args.prompts is None:
        return {}
    prompts = find_prompts(args.folder, images, args.prompt, args.prompts)
    without = [image.name for image in images if image.name not in prompts]
    if needing and without and not args.allow_failed:
        what = f"{len(without)} of {len(images)} images have no prompt ({first_names(without)}), which {needing[0]} needs"
        raise ValueError(f"{what}; {PROMPT_WAYS}")
    for origin, count in Counter(prompt.origin for prompt in prompts.values()).items():
        print(f"prompts: {count} from {origin}")
    return prompts


def settings(args: argparse.Namespace, specs: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """What scores depend on, besides the images and the prompts found beside them, which every score is kept with."""
    rewards: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        rewards[name] = {"dtype": args.dtype or spec.dtype, **spec.checkpoint, **places.get(name, {})}
        if spec.needs_prompt:
            rewards[name] |= {"--prompt": args.prompt, "--prompts": str(args.prompts) if args.prompts else None}
    return {"folder": str(args.folder), "rewards": rewards}


def open_out(out: Path, new: dict[str, Any], overwrite: bool) -> None:
    """Starts a folder of scores, or continues one; rewards may be added. Raises ValueError where it belongs to something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    marker = out / "settings.json"
    if marker.is_file():
        old = read_json(marker)
        if not isinstance(old, dict) or not isinstance(old.get("rewards"), dict):
            raise ValueError(f"{out} was made by another command; choose another --out")
        begun = {name: facts for name, facts in old["rewards"].items() if (out / "scores" / f"{name}.jsonl").is_file()}
        old = {**old, "rewards": begun}  # a reward that could not be loaded binds nobody
        changed = differing_settings(_flat(old, new["rewards"]), _flat(new, begun)) if begun else []
        if changed and not overwrite:
            what = "; ".join(change if len(change) < 200 else change[:197] + "..." for change in changed)
            raise ValueError(
                f"{out} holds scores made with other settings ({what}); choose another --out, or --overwrite to make them anew"
            )
        if changed:
            shutil.rmtree(out / "scores", ignore_errors=True)
        else:
            new = {**new, "rewards": {**begun, **new["rewards"]}}
    elif out.is_dir() and any(not path.name.startswith(".partial-") for path in out.iterdir()):
        raise ValueError(f"{out} holds other files and no scores; choose another --out")
    require_writable(out)
    write_json(marker, new)


def _flat(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Settings one by one, of the rewards that the other run has too."""
    flat = {f"{name} {key}": value for name in settings["rewards"] if name in others for key, value in settings["rewards"][name].items()}
    return {"folder": str(Path(str(settings.get("folder"))).resolve()), **flat}


def score(
    args: argparse.Namespace,
    out: Path,
    specs: Mapping[str, Any],
    places: Mapping[str, Any],
    images: Sequence[ImageFile],
    prompts: Mapping[str, Prompt],
) -> list[Any]:
    """Each reward's work, done. Only rewards with something to do are loaded."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from diffalign.commands import score_run

    digests, texts = score_run.Digests(), {name: prompt.text for name, prompt in prompts.items()}
    works = [score_run.open_work(name, out, images, texts if spec.needs_prompt else None, digests) for name, spec in specs.items()]
    total, left = sum(len(work.pending) + len(work.scores) for work in works), sum(len(work.pending) for work in works)
    if left < total:
        print(f"{total - left} of {total} scores are already in {out}; {'continuing' if left else 'nothing is left to score'}")
    try:
        with tqdm(total=left, unit="score", disable=None) as bar, logging_redirect_tqdm(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # what it warns of is an error or a note of ours
            for work in works:
                if work.pending:
                    bar.set_description(work.reward)
                    one_reward(args, out, work, places.get(work.reward), bar)
    except KeyboardInterrupt as stop:
        done = sum(len(work.scores) for work in works)
        raise Interrupted(f"interrupted: {done} of {total} scores are kept in {out}; the same command continues") from stop
    return works


def audit(args: argparse.Namespace, out: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str], places: Mapping[str, Any]) -> str:
    """The audit of every reward, written and as a table."""
    import torch

    from diffalign.commands.score_audit import write_audits
    from diffalign.hub import load_reward

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {name: places[name] for name in names if name in places}
    mix = load_reward(dict.fromkeys(names, 1.0), sources=given, device=device, dtype=args.dtype)
    return write_audits(out, {name: mix.members[name][0] for name in names}, rows, args.folder, device, args.batch_size)


def one_reward(args: argparse.Namespace, out: Path, work: Any, places: Any, bar: Any) -> None:
    """Loads one reward, scores, and lets it go."""
    import torch

    from diffalign.commands.score_run import score_pending
    from diffalign.hub import load_reward

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # before gigabytes are read for it
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).partition(chr(10))[0]})") from error
    mix = load_reward(work.reward, sources={work.reward: places} if places else {}, device=device, dtype=args.dtype)
    write_json(out / "machine.json", evaluation.machine(device))

    def scores(images: Any, prompts: Sequence[str]) -> Any:
        return mix(images, prompts).parts[work.reward]

    score_pending(work, scores, device, args.batch_size, bar.update)
    del mix, scores
    gc.collect()  # before the next one is loaded: two may not fit together
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def facts(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """When, how and where the scores were made."""
    return {
        "command": shlex.join(["diffalign", *args.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **(read_json(out / "machine.json") if (out / "machine.json").is_file() else {}),
    }


def calibrate(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Writes the calibration of the rewards on these images."""
    from diffalign.rewards.calibration import from_scores

    scores = {name: [row["scores"].get(name, float("nan")) for row in rows] for name in names}
    calibration = from_scores(scores, [row["prompt"] or "" for row in rows], source=f"images of {args.folder}")
    args.calibrate.parent.mkdir(parents=True, exist_ok=True)
    calibration.save(args.calibrate)
    print(f"the calibration is in {args.calibrate}")
