"""`diffalign generate`: prompts to images before and after a search, one folder per prompt, resumable.

A prompt's folder appears whole or not at all, with trace.json in it; a later run with the same settings skips it. Every prompt is
generated with the same --seed, so an image depends on its prompt and settings alone, up to the rounding that differs with a batch's size;
`--batch-size 1` is exact. docs/generate.md says how exact a resumed run is.
"""

# ruff: noqa: T201  (a command speaks to its user)

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from diffalign.commands import evaluation, guidance, options, panels, resolved
from diffalign.files import differing_settings, read_json, require_writable, whole_folder, write_json

if TYPE_CHECKING:
    from diffalign.types import Evaluation

SLUG_LENGTH = 40
DEFAULT_OUT = Path("outputs/generate")
SHAPES_BATCH = 16
RESOLVED = ("preset", "weights")  # versions stand in the trace; each prompt is a record of its own, so they may differ


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
    options.warn_of_unknown_words(args.pipeline, prompts)
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
            make(jobs, {job.folder for job in pending}, args, mix)
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
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python holds bytes that it cannot decode
            raise ValueError(f"a prompt must be text, and {prompt[:100]!r} holds bytes or marks that are none; write it in UTF-8")
    return prompts


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; in a .jsonl file, each line's "prompt". Blank lines and # comments are skipped, and counted on stderr.

    A prompt that begins with # has to stand in a .jsonl file.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"--prompts-file {file} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    blank = len(lines) - len(numbered)
    comments = [number for number, line in numbered if line.startswith("#")]
    numbered = [(number, line) for number, line in numbered if number not in set(comments)]
    if not numbered:
        raise ValueError(f"--prompts-file {file} holds no prompt; write one a line")
    skipped = [f"{count} {kind} lines" for count, kind in ((blank, "blank"), (len(comments), "comment")) if count]
    if skipped:
        print(f"note: {' and '.join(skipped)} of {file} skipped", file=sys.stderr)
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
        **{name: fact for name, fact in resolved.before_loading(args).items() if name in RESOLVED},
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
    made = found.get("settings", {}) if isinstance(found, dict) else {}
    unknown = {name for name in RESOLVED if made.get(name) is None or job.settings.get(name) is None}  # of before 2026-11-24, or of a hub
    sides = ({name: value for name, value in side.items() if name not in unknown} for side in (made, job.settings))
    changed = differing_settings(*sides, within=("preset",))
    if changed and not overwrite:
        what = "; ".join(change if len(change) < 120 else change[:117] + "..." for change in changed)
        raise ValueError(f"{job.folder} was made with other settings ({what}); choose another --out, or --overwrite to make it anew")
    return bool(changed)


def make(jobs: Sequence[Job], pending: Collection[Path], args: argparse.Namespace, mix: dict[str, float]) -> None:
    """Makes the jobs whose folders are pending, and saves each batch before the next.

    A batch is cut by the places in the list, whatever is there already: its size moves the last digits of its images, so a run that was
    stopped makes the whole of a batch again to add what it lacks, and has what an uninterrupted one has.
    """
    from diffalign.methods import build_method

    pipeline, reward = evaluation.load_parts(args, mix)
    method = None if args.method == "none" else build_method(args.method, reward, args.budget)
    steps = guidance.build(args)
    size = options.batch_size(args, SHAPES_BATCH)
    facts = evaluation.machine(pipeline.device)
    facts["resolved"] = resolved.after_loading(pipeline, args)
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    batches = [batch for batch in batches if any(job.folder in pending for job in batch)]
    budget, made = args.budget if method else 1, 0
    with tqdm(total=sum(map(len, batches)) * budget, unit="evaluation", disable=None) as bar:
        for batch in batches:
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
                if job.folder not in pending:
                    continue
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
            made += len(batch)
            bar.update(made * budget - bar.n)  # samples that stopped early count as done


def save(job: Job, record: dict[str, Any], output: Any, i: int) -> None:
    """Writes the job's folder. Without a search there is no image after, no noise and no plot."""
    import safetensors.torch

    from diffalign.reports.plots import rewards_plot, strip

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
                data = safetensors.torch.save({"noise": output.noise[i : i + 1].contiguous()})  # "1 ...", as latents= takes it
                (folder / "noise.safetensors").write_bytes(data)  # its own writer hides why a write failed
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
