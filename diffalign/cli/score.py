"""`diffalign score`: rewards of images that exist already, one reward in memory at a time, resumable.

Images are found in a folder and everything below it, their prompts where people keep them (evaluation/image_prompts.py). A run that was
stopped goes on with what is missing; further rewards and further images may be added to it.
"""

from __future__ import annotations

import gc
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from diffalign import hub
from diffalign.benchmarks.base import Record
from diffalign.cli.commands import Score
from diffalign.evaluation import score_run
from diffalign.evaluation.image_files import ImageFile, first_names, list_images
from diffalign.evaluation.image_prompts import Prompt, find_prompts, require_text
from diffalign.evaluation.machine import best_device, machine, now
from diffalign.evaluation.processes import Interrupted
from diffalign.evaluation.score_run import Work, score_pending
from diffalign.files import differing_settings, read_json, require_writable, write_json
from diffalign.reports import audits, scores
from diffalign.reward_models import Spec
from diffalign.reward_models.audit import audit
from diffalign.rewards.calibration import from_scores

PROMPT_WAYS = (
    "give --prompt TEXT for all of them, --prompts FILE.csv with the columns file_name and prompt, NAME.txt beside NAME.png, "
    "or metadata.jsonl in the folder"
)
NAMED_FAILURES = 10
Places = Mapping[str, Mapping[str, str]]


def run(options: Score, command: str) -> int:
    """Scores what is missing, writes the results. Raises ValueError or OSError with the sentence to show, Interrupted at Ctrl-C."""
    names, known = options.names, hub.reward_specs()
    specs, places = {name: known[name] for name in names}, options.places()
    listing = list_images(options.folder, options.match)
    if listing.aside:
        print(f"note: left out, since they show other images or scores: {first_names(listing.aside)}")
    prompts = needed_prompts(options, specs, listing.images)
    out = options.out or Path("outputs") / f"score-{options.folder.resolve().name or 'root'}"
    kept = settings(options, specs, places)
    open_out(out, kept, options.overwrite)
    works = score(options, out, specs, places, listing.images, prompts)
    rows = scores.rows_of(listing.images, prompts, works)
    scores.write_results(out, rows, {name: asdict(spec) for name, spec in specs.items()}, {**facts(out, command), "settings": kept})
    print(scores.table(rows, names))
    print(f"results.csv, results.json and distributions.png are in {out}")
    if options.audit:
        print(audited(options, out, rows, names, places))
        print(f"audit.csv, audit.json and audit.png are in {out}")
    code = tell(rows, options.allow_failed)
    if options.calibrate:
        calibrate(options, rows, names, options.calibrate)
    return code


def needed_prompts(options: Score, specs: Mapping[str, Spec], images: Sequence[ImageFile]) -> dict[str, Prompt]:
    """The images' prompts, where a reward needs any or they were given.

    Raises ValueError where an image has none that is needed, unless failures are allowed.
    """
    needing = [name for name, spec in specs.items() if spec.needs_prompt]
    if options.prompt is not None:
        require_text(options.prompt, "--prompt")
    if not needing and options.prompt is None and options.prompts is None:
        return {}
    prompts = find_prompts(options.folder, images, options.prompt, options.prompts)
    without = [image.name for image in images if image.name not in prompts]
    if needing and without and not options.allow_failed:
        what = f"{len(without)} of {len(images)} images have no prompt ({first_names(without)}), which {needing[0]} needs"
        raise ValueError(f"{what}; {PROMPT_WAYS}")
    for origin, count in Counter(prompt.origin for prompt in prompts.values()).items():
        print(f"prompts: {count} from {origin}")
    return prompts


def settings(options: Score, specs: Mapping[str, Spec], places: Places) -> Record:
    """What scores depend on, besides the images and the prompts found beside them, which every score is kept with."""
    rewards: dict[str, dict[str, object]] = {}
    for name, spec in specs.items():
        rewards[name] = {"dtype": options.dtype or spec.dtype, **spec.checkpoint, **places.get(name, {})}
        if spec.needs_prompt:
            rewards[name] |= {"--prompt": options.prompt, "--prompts": str(options.prompts) if options.prompts else None}
    return {"folder": str(options.folder), "rewards": rewards}


def open_out(out: Path, new: Record, overwrite: bool) -> None:
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


def _flat(settings: Record, others: Record) -> Record:
    """Settings one by one, of the rewards that the other run has too."""
    flat = {f"{name} {key}": value for name in settings["rewards"] if name in others for key, value in settings["rewards"][name].items()}
    return {"folder": str(Path(str(settings.get("folder"))).resolve()), **flat}


def score(
    options: Score,
    out: Path,
    specs: Mapping[str, Spec],
    places: Places,
    images: Sequence[ImageFile],
    prompts: Mapping[str, Prompt],
) -> list[Work]:
    """Each reward's work, done. Only rewards with something to do are loaded."""
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
                    one_reward(options, out, work, places.get(work.reward), bar)
    except KeyboardInterrupt as stop:
        done = sum(len(work.scores) for work in works)
        raise Interrupted(f"interrupted: {done} of {total} scores are kept in {out}; the same command continues") from stop
    return works


def audited(options: Score, out: Path, rows: Sequence[Record], names: Sequence[str], places: Places) -> str:
    """The audit of every reward on the first images that all of them scored, written and as a table."""
    device = best_device(options.device)
    given = {name: places[name] for name in names if name in places}
    mix = hub.load_reward(dict.fromkeys(names, 1.0), sources=given, device=device, dtype=options.dtype)
    chosen = [row for row in rows if set(names) <= set(row["scores"])][: audits.MOST_IMAGES]
    pictures, prompts = [Image.open(options.folder / row["file"]) for row in chosen], [row["prompt"] or "" for row in chosen]
    found = {
        name: audit(mix.members[name][0], pictures, prompts, paraphrase=audits.paraphrase, batch=options.batch_size, device=device)
        for name in names
    }
    return audits.write(out, found, len(chosen))


def one_reward(options: Score, out: Path, work: Work, places: Mapping[str, str] | None, bar: tqdm) -> None:
    """Loads one reward, scores, and lets it go."""
    device = best_device(options.device)
    try:
        torch.zeros(1, device=device).item()  # before gigabytes are read for it
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).partition(chr(10))[0]})") from error
    mix = hub.load_reward(work.reward, sources={work.reward: places} if places else {}, device=device, dtype=options.dtype)
    write_json(out / "machine.json", machine(device))

    def parts(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return mix(images, prompts).parts[work.reward]

    score_pending(work, parts, device, options.batch_size, bar.update)
    del mix, parts
    gc.collect()  # before the next one is loaded: two may not fit together
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def facts(out: Path, command: str) -> Record:
    """When, how and where the scores were made."""
    return {"command": command, "date": now(), **(read_json(out / "machine.json") if (out / "machine.json").is_file() else {})}


def calibrate(options: Score, rows: Sequence[Record], names: Sequence[str], file: Path) -> None:
    """Writes the calibration of the rewards on these images."""
    found = {name: [row["scores"].get(name, float("nan")) for row in rows] for name in names}
    calibration = from_scores(found, [row["prompt"] or "" for row in rows], source=f"images of {options.folder}")
    file.parent.mkdir(parents=True, exist_ok=True)
    calibration.save(file)
    print(f"the calibration is in {file}")


def tell(rows: Sequence[Record], allow_failed: bool) -> int:
    """Says on stderr what was decided in reading images, and what could not be scored. 1 where there is any such and it is not allowed."""
    for note in dict.fromkeys(note for row in rows for note in row["notes"]):
        print(f"note: {note}: {first_names([row['file'] for row in rows if note in row['notes']])}", file=sys.stderr)
    failed = [row for row in rows if row["problems"]]
    if failed:
        print(f"diffalign: {len(failed)} of {len(rows)} images could not be scored, or not by every reward:", file=sys.stderr)
        for row in failed[:NAMED_FAILURES]:
            print(f"  {row['file']}: {scores.problem(row)}", file=sys.stderr)
        if len(failed) > NAMED_FAILURES:
            print(f"  and {len(failed) - NAMED_FAILURES} more, in results.csv", file=sys.stderr)
    return 1 if failed and not allow_failed else 0
