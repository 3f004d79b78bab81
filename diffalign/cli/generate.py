"""`diffalign generate`: prompts to images before and after a search, one folder per prompt, resumable.

A prompt's folder appears whole or not at all, with trace.json in it; a later run with the same settings skips it. Every prompt is
generated with the same --seed, so an image depends on its prompt and settings alone, up to the rounding that differs with a batch's size;
`--batch-size 1` is exact. docs/generate.md says how exact a resumed run is.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from tqdm import tqdm

from diffalign.benchmarks.base import Record
from diffalign.cli import guidance_words, parts, prompts
from diffalign.cli.commands import Generate
from diffalign.evaluation import machine, panels, resolved
from diffalign.evaluation.processes import Interrupted
from diffalign.files import differing_settings, read_json, require_writable, whole_folder, write_json
from diffalign.reports.plots import rewards_plot, strip
from diffalign.types import Evaluation

if TYPE_CHECKING:
    from diffalign.pipelines.outputs import AlignedOutput

SLUG_LENGTH = 40
SHAPES_BATCH = 16
RESOLVED = ("preset", "weights")  # versions stand in the trace; each prompt is a record of its own, so they may differ


@dataclass(frozen=True)
class Job:
    """One prompt, the folder it goes to, and the settings its result depends on."""

    prompt: str
    folder: Path
    settings: Record

    def is_done(self) -> bool:
        return (self.folder / "trace.json").is_file()


def run(options: Generate, command: str) -> int:
    """Generates what is missing. Raises ValueError or OSError with the sentence to show, Interrupted at Ctrl-C."""
    texts = prompts.collect(options.prompts, options.prompts_file)
    parts.warn_of_unknown_words(options.model.pipeline, texts)
    mix = options.mix()
    jobs = plan(texts, options, mix)
    require_writable(options.out)
    pending = [job for job in jobs if must_make(job, options.overwrite)]
    if len(pending) < len(jobs):
        done = len(jobs) - len(pending)
        print(f"{done} of {len(jobs)} prompts are already finished in {options.out} with these settings; skipped")
    try:
        if pending:
            make(jobs, {job.folder for job in pending}, options, mix)
    except KeyboardInterrupt as stop:
        done = sum(job.is_done() for job in jobs)
        where = f"{done} of {len(jobs)} prompts are finished in {options.out}"
        raise Interrupted(f"interrupted: {where}; the same command continues") from stop
    print(f"{len(jobs)} prompt{'s' if len(jobs) > 1 else ''} finished in {options.out}")
    return 0


def slug(prompt: str) -> str:
    """The prompt as a part of a file name: lower-case ASCII letters, digits and hyphens, at most SLUG_LENGTH, never empty."""
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:SLUG_LENGTH].strip("-") or "prompt"


def plan(texts: Sequence[str], options: Generate, mix: dict[str, float]) -> list[Job]:
    """The jobs, each with every setting that its image depends on. Batch size and device are not among them."""
    model = options.model
    replaced = {"steps": model.steps, "guidance_scale": model.guidance_scale, "dtype": model.dtype}
    shared = {
        "pipeline": model.pipeline,
        **({"lora": parts.lora_identity(model.lora)} if model.lora else {}),
        "method": options.method,
        "seed": options.seed,
        "reward": mix,
        "watch": list(options.rewards.watch),
        **parts.search_settings(options.method, options.budget, options.search),
        **replaced,
        "guidance": options.guidance.settings(model.pipeline),
        **options.rewards.settings(),
        **{name: fact for name, fact in resolved.before_loading(str(model.pipeline), replaced).items() if name in RESOLVED},
    }
    return [Job(text, options.out / f"{i:05d}-{slug(text)}", {"prompt": text, **shared}) for i, text in enumerate(texts)]


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


def make(jobs: Sequence[Job], pending: Collection[Path], options: Generate, mix: dict[str, float]) -> None:
    """Makes the jobs whose folders are pending, and saves each batch before the next.

    A batch is cut by the places in the list, whatever is there already: its size moves the last digits of its images, so a run that was
    stopped makes the whole of a batch again to add what it lacks, and has what an uninterrupted one has.
    """
    pipeline, reward = parts.load_parts(options.model, options.rewards, mix)
    method = parts.search_method(options.method, reward, options.budget, options.search)
    steps = parts.guidance_method(options.guidance)
    size = options.model.batch(SHAPES_BATCH)
    facts = machine.machine(pipeline.device)
    facts["resolved"] = resolved.after_loading(pipeline, options.model.arguments())
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    batches = [batch for batch in batches if any(job.folder in pending for job in batch)]
    budget, made = options.budget if method else 1, 0
    known = options.search.seconds is None  # how many evaluations there will be
    with tqdm(total=sum(map(len, batches)) * budget if known else None, unit="evaluation", disable=None) as bar:
        for batch in batches:
            began = time.perf_counter()

            def progress(event: Evaluation) -> None:
                bar.update(len(event.rows))
                bar.set_postfix({name: f"{sum(values) / len(values):.4g}" for name, values in event.scores.items()}, refresh=False)

            output = pipeline(
                [job.prompt for job in batch],
                seed=[options.seed] * len(batch),
                plugins=[plugin for plugin in (parts.of_batch(method, options.search, len(batch)), steps) if plugin],
                progress=progress,
                **options.model.arguments(),
            )
            scores = None
            if reward and not method:
                scores = parts.score_images(reward, output.images, [job.prompt for job in batch], pipeline.device)
            seconds = (time.perf_counter() - began) / len(batch)
            for i, job in enumerate(batch):
                if job.folder not in pending:
                    continue
                trace = output.trace.sample(i) if method else {"method": "none", "best": 0, "rewards": scores[i] if scores else {}}
                record = {
                    "prompt": job.prompt,
                    "seed": options.seed,
                    "settings": job.settings,
                    "truncated": output.truncated[i],  # the pipeline has also said it on stderr
                    "guidance": guidance_words.record(output.guidance, i, method is not None),
                    "seconds": round(seconds, 3),
                    **facts,
                    "method_settings": trace.pop("settings", {}),
                    **trace,
                    **({"reward_mix": reward.settings()} if options.rewards.settings() else {}),
                }
                record = machine.finite_or_none(record)
                record |= panels.of_sample(mix, options.rewards.watch, options.rewards.calibration, record)
                save(job, record, output, i)
                tqdm.write(summary_line(job, record))
            made += len(batch)
            bar.update(made * budget - bar.n if known else 0)  # samples that stopped early count as done


def save(job: Job, record: Record, output: AlignedOutput, i: int) -> None:
    """Writes the job's folder. Without a search there is no image after, no noise and no plot."""
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


def summary_line(job: Job, record: Record) -> str:
    cost = f"{record['seconds']:.2f} s{guidance_words.summary(record['guidance'])}"
    totals = record["rewards"].get("total")
    if not totals:
        return f"{job.folder}: {cost}"
    if record["method"] == "none":
        return f"{job.folder}: total reward {shown(totals[0])}, {cost}"
    gain = f"{shown(totals[0])} -> {shown(totals[record['best']])} in {len(totals)} evaluations"
    return f"{job.folder}: total reward {gain}, {cost}"


def shown(score: float | None) -> str:
    return "not finite" if score is None else f"{score:.4g}"
