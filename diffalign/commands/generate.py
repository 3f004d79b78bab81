"""`diffalign generate`: prompts to images before and after a search, one folder per prompt, resumable.

A prompt's folder appears whole or not at all, with trace.json in it; a later run with the same settings skips it. Every prompt is
generated with the same --seed, so an image depends on its prompt and settings alone, never on its place in the list or its batch.
"""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from diffalign.commands import evaluation, guidance, options, panels
from diffalign.files import differing_settings, read_json, require_writable, whole_folder, write_json

if TYPE_CHECKING:
    from diffalign.types import Evaluation

SLUG_LENGTH = 40
DEFAULT_OUT = Path("outputs/generate")
SHAPES_BATCH = 16


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with the sentence to leave the user with."""


@dataclass(frozen=True)
class Job:
    """One prompt, the folder it goes to, and the settings its result depends on."""

    prompt: str
    folder: Path
    settings: dict[str, Any]

    def is_done(self) -> bool:
        return (self.folder / "trace.json").is_file()


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="make images, before and after a search for better noise",
        description="Makes an image of each prompt, and a better one by searching over the initial noise for what the rewards like.",
        epilog=options.methods_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw; quote each prompt")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help='more prompts: one a line, or .jsonl with {"prompt": ...}')
    parser.add_argument(
        "--method",
        type=options.method_name,
        default="reno",
        metavar="NAME",
        help=f"{', '.join(options.METHODS)} (default: %(default)s); none makes the first image only, scored where --reward is given",
    )
    seed_help = "every prompt uses this same seed, whatever its place in the list (default: %(default)s)"
    parser.add_argument("--seed", type=options.seed, default=0, metavar="N", help=seed_help)
    batch_help = f"prompts at once; speed and memory only (default: 1, shapes {SHAPES_BATCH})"
    parser.add_argument("--batch-size", type=options.count, metavar="N", help=batch_help)
    out_help = "a folder per prompt goes here (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=out_help)
    parser.add_argument("--overwrite", action="store_true", help="make prompts anew that were made with other settings")
    options.add_model_options(parser)
    guidance.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generates what is missing. Raises ValueError or OSError with the sentence to show, Interrupted at Ctrl-C."""
    prompts = collect_prompts(args.prompts, args.prompts_file)
    # Without a search there is nothing to optimise, so rewards are loaded (seconds) only where they were asked for.
    mix = {} if args.method == "none" and not args.reward and not args.watch else options.reward_mix(args)
    options.require_gradient([args.method], mix)
    jobs = plan(prompts, args, mix)
    require_writable(args.out)
    pending = [job for job in jobs if must_make(job, args.overwrite)]
    if len(pending) < len(jobs):
        print(f"{len(jobs) - len(pending)} of {len(jobs)} prompts are already finished in {args.out} with these settings; skipped")
    try:
        if pending:
            make(pending, args, mix)
    except KeyboardInterrupt as stop:
        done = sum(job.is_done() for job in jobs)
        raise Interrupted(f"interrupted: {done} of {len(jobs)} prompts are finished in {args.out}; the same command continues") from stop
    print(f"{len(jobs)} prompt{'s' if len(jobs) > 1 else ''} finished in {args.out}")
    return 0


def collect_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of the file. Raises ValueError where there is none, or one is blank."""
    for i, prompt in enumerate(given):
        if not prompt.strip():
            raise ValueError(f"prompt {i + 1} on the command line is empty; write what to draw")
    prompts = [*given, *(read_prompts(file) if file else ())]
    if not prompts:
        raise ValueError("there is no prompt; give one in quotes, or --prompts-file FILE with one a line")
    return prompts


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; in a .jsonl file, each line's "prompt". Blank lines are skipped, and counted on stderr."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"--prompts-file {file} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--prompts-file {file} holds no prompt; write one a line")
    if len(numbered) < len(lines):
        print(f"note: {len(lines) - len(numbered)} blank lines of {file} skipped", file=sys.stderr)
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{file} line {number} must be a JSON object with a "prompt"; got {line[:80]!r}') from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{file} line {number}: "prompt" must be text that is not blank; got {prompt!r}')
        prompts.append(prompt)
    return prompts


def slug(prompt: str) -> str:
    """The prompt as a part of a file name: lower-case ASCII letters, digits and hyphens, at most SLUG_LENGTH, never empty."""
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:SLUG_LENGTH].strip("-") or "prompt"


def plan(prompts: Sequence[str], args: argparse.Namespace, mix: dict[str, float]) -> list[Job]:
    """The jobs, each with every setting that its image depends on. Batch size and device are not among them."""
    searching = args.method != "none"
    shared = {
        "pipeline": args.pipeline,
        "method": args.method,
        "seed": args.seed,
        "reward": mix,
        "watch": list(args.watch or ()),
        "budget": args.budget if searching else None,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance": guidance.settings(args),
        "dtype": args.dtype,
        **options.rule_settings(args),
    }
    return [Job(prompt, args.out / f"{i:05d}-{slug(prompt)}", {"prompt": prompt, **shared}) for i, prompt in enumerate(prompts)]


def must_make(job: Job, overwrite: bool) -> bool:
    """Whether the job is still to do. Raises ValueError where its folder was made with other settings and may not be replaced."""
    if not job.is_done():
        if job.folder.exists() and not overwrite and any(job.folder.iterdir()):
            what = f"{job.folder} exists and holds no trace.json, so it was not made here"
            raise ValueError(f"{what}; choose another --out, or --overwrite to replace it")
        return True
    found = read_json(job.folder / "trace.json")
    changed = differing_settings(found.get("settings", {}) if isinstance(found, dict) else {}, job.settings)
    if changed and not overwrite:
        what = "; ".join(change if len(change) < 120 else change[:117] + "..." for change in changed)
        raise ValueError(f"{job.folder} was made with other settings ({what}); choose another --out, or --overwrite to make it anew")
    return bool(changed)


def make(jobs: Sequence[Job], args: argparse.Namespace, mix: dict[str, float]) -> None:
    """Generates the jobs in batches and saves each batch before the next."""
    from diffalign.methods import build_method

    pipeline, reward = evaluation.load_parts(args, mix)
    method = None if args.method == "none" else build_method(args.method, reward, args.budget)
    steps = guidance.build(args)
    size = options.batch_size(args, SHAPES_BATCH)
    facts = evaluation.machine(pipeline.device)
    with tqdm(total=len(jobs) * (args.budget if method else 1), unit="evaluation", disable=None) as bar:
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            began = time.perf_counter()

            def progress(event: Evaluation) -> None:
                bar.update(len(event.rows))
                bar.set_postfix({name: f"{sum(values) / len(values):.4g}" for name, values in event.scores.items()}, refresh=False)

            output = pipeline(
                [job.prompt for job in batch],
                seed=[args.seed] * len(batch),
                plugins=[plugin for plugin in (method, steps) if plugin],
                progress=progress,
                **options.stock_arguments(args),
            )
            scores = None
            if reward and not method:
                scores = evaluation.score(reward, output.images, [job.prompt for job in batch], pipeline.device)
            seconds = (time.perf_counter() - began) / len(batch)
            for i, job in enumerate(batch):
                trace = output.trace.sample(i) if method else {"method": "none", "best": 0, "rewards": scores[i] if scores else {}}
                record = {
                    "prompt": job.prompt,
                    "seed": args.seed,
                    "settings": job.settings,
                    "truncated": output.truncated[i],  # the pipeline has also said it on stderr
                    "guidance": guidance.record(output.guidance, i, method is not None),
                    "seconds": round(seconds, 3),
                    **facts,
                    "method_settings": trace.pop("settings", {}),
                    **trace,
                    **({"reward_mix": reward.settings()} if options.rule_settings(args) else {}),
                }
                record = evaluation.finite_or_none(record)
                record |= panels.of_sample(args, mix, record)
                save(job, record, output, i)
                tqdm.write(summary_line(job, record))
            bar.update((start + len(batch)) * (bar.total // len(jobs)) - bar.n)  # samples that stopped early count as done


def save(job: Job, record: dict[str, Any], output: Any, i: int) -> None:
    """Writes the job's folder. Without a search there is no image after, no noise and no plot."""
    from safetensors.torch import save_file

    from diffalign.plots import rewards_plot, strip

    with whole_folder(job.folder) as folder:
        if output.trace is None:
            output.images[i].save(folder / "before.png")
        else:
            before, after = output.initial_images[i], output.images[i]
            before.save(folder / "before.png")
            after.save(folder / "after.png")
            totals = record["rewards"]["total"]
            labels = (f"before   reward {shown(totals[0])}", f"after   reward {shown(totals[record['best']])}")
            strip(before, after, labels).save(folder / "strip.png")
            rewards_plot(record).save(folder / "rewards.png")
            if output.noise is not None:
                save_file({"noise": output.noise[i].contiguous()}, folder / "noise.safetensors")
            if output.distribution is not None:
                output.distribution.rows([i]).save(folder / "distribution.safetensors")
        write_json(folder / "trace.json", record)


def summary_line(job: Job, record: dict[str, Any]) -> str:
    cost = f"{record['seconds']:.2f} s{guidance.summary(record['guidance'])}"
    totals = record["rewards"].get("total")
    if not totals:
        return f"{job.folder}: {cost}"
    if record["method"] == "none":
        return f"{job.folder}: total reward {shown(totals[0])}, {cost}"
    gain = f"{shown(totals[0])} -> {shown(totals[record['best']])} in {len(totals)} evaluations"
    return f"{job.folder}: total reward {gain}, {cost}"


def shown(score: float | None) -> str:
    return "not finite" if score is None else f"{score:.4g}"
