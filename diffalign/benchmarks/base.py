"""What a benchmark is: a list of items to generate, and a judge of a folder. The two meet only on disk, in GenEval's layout.

    FOLDER/settings.json                     what made the images; a run with other settings is refused
    FOLDER/00012/metadata.jsonl              the prompt's row, one JSON object
    FOLDER/00012/samples/00000.png           one image per sample
    FOLDER/00012/traces/00000.json           how that image came about; written last, so its presence marks the item done

So generation resumes where it stopped, any program's images can be judged, and our images can be judged by upstream's code.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from diffalign.files import differing_settings, read_json, whole_file, write_json, write_text

SHUFFLE = "prompts of a limited run, 1"  # the seed of --limit; another one draws other prompts
FORMATS = {".png": {"format": "PNG"}, ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0}}


@dataclass(frozen=True)
class Item:
    """One image to make: `index` is the prompt's row, `sample` counts the images of that prompt, `seed` belongs to this item alone.

    `path`: the image's place inside a method's folder, .png or .jpg, where a benchmark does not name files as GenEval does.
    """

    index: int
    sample: int
    seed: int
    task: str
    prompt: str
    metadata: Mapping[str, Any]
    path: str | None = None

    @property
    def name(self) -> str:
        """The image's path inside a method's folder."""
        return self.path or f"{self.index:05d}/samples/{self.sample:05d}.png"

    def image_path(self, folder: Path) -> Path:
        return folder / self.name

    def trace_path(self, folder: Path) -> Path:
        image = self.image_path(folder)
        if image.parent.name == "samples":
            return image.parent.parent / "traces" / f"{image.stem}.json"
        return (folder / "traces" / self.name).with_suffix(".json")

    def is_done(self, folder: Path) -> bool:
        """Whether the image lies there, as long as it was written; what was cut short or deleted since is made again."""
        try:
            written = read_json(self.trace_path(folder)).get("bytes")
            return written in (None, self.image_path(folder).stat().st_size)  # None: of an older version
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Generated:
    """An image and, as plain JSON data, how it came about: at least "seconds", "best" and "rewards" (name -> one score per evaluation)."""

    image: Image.Image
    trace: Mapping[str, Any]


class Benchmark(Protocol):
    """A set of prompts with rules to judge by. `score` returns one row per item, in the order of `items()`; a missing image is an error."""

    name: str

    def items(self) -> list[Item]: ...

    def score(self, folder: Path) -> list[dict[str, Any]]: ...


def item_seed(seed: int, index: int, sample: int) -> int:
    """A 32-bit seed from the run's seed, the prompt's row and the sample: the same whatever the batch size, order or limit."""
    return int(np.random.SeedSequence([seed, index, sample]).generate_state(1)[0])


def spread_over_tasks(tasks: Sequence[str], limit: int | None) -> list[int]:
    """Indices of `limit` rows (None: all), as many from each task as goes, in order. What a smaller limit takes, a larger one takes too.

    Lists are sorted by topic, so the first rows of a task are no sample of it. Each task is shuffled instead, in every run in the same
    way: by a hash of the row's place in its task, which no library's random stream can change.
    """
    places: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        places.setdefault(task, []).append(index)
    turns = []
    for members in places.values():
        order = sorted(range(len(members)), key=lambda place: hashlib.sha256(f"{SHUFFLE} {place}".encode()).digest())
        turns += [(turn, members[place]) for turn, place in enumerate(order)]
    return sorted(index for _, index in sorted(turns)[:limit])


def limited_to(tasks: Sequence[str], limit: int | None) -> str | None:
    """What a result of fewer than all prompts must be quoted with, "limited to 10 prompts a task (60 of 312)"; None for all prompts."""
    if limit is None or limit >= len(tasks):
        return None
    counts = Counter(tasks[index] for index in spread_over_tasks(tasks, limit))
    least, most = min(counts.values()), max(counts.values())
    each = f"{least}" if least == most else f"{least} to {most}"
    where = "a task" if len(set(tasks)) == len(counts) else f"of {len(counts)} of {len(set(tasks))} tasks"
    return f"limited to {each} prompt{'s' if most > 1 else ''} {where} ({limit} of {len(tasks)})"


ENTRY_BY_ENTRY = ("preset", "versions", "resolved")
ABSENT_BEFORE = ("preset", "weights", "versions", "resolved")
"""What runs of before 2026-11-24 do not record; a run without it is continued, and records it from then on."""


def check_run(folder: Path, settings: Mapping[str, Any], overwrite: bool = False, other_versions: bool = False) -> bool:
    """Whether `folder` holds images made with other settings, which `overwrite` allows to delete. Nothing is written.

    other_versions: images made with other versions of libraries are no other settings. Raises ValueError where the folder holds images
    made with other settings and they may not be deleted, or files that are not ours.
    """
    marker = folder / "settings.json"
    if not marker.is_file():
        if folder.is_dir() and any(not path.name.startswith(".partial-") for path in folder.iterdir()):
            raise ValueError(f"{folder} exists and was not made by this benchmark (it has no settings.json); choose another --out")
        return False
    changed = _changed(read_json(marker), settings, other_versions)
    if changed and not overwrite:
        what = f"{folder} holds images made with other settings ({'; '.join(changed)})"
        advice = "choose another --out, or --overwrite to make them anew"
        if all(change.startswith("versions ") for change in changed):
            advice += ", or --allow-changed-versions to go on and say so in the report"
        raise ValueError(f"{what}; {advice}")
    return bool(changed)


def open_run(folder: Path, settings: Mapping[str, Any], overwrite: bool = False, other_versions: bool = False) -> None:
    """Starts a folder of images made with `settings`, or continues one. `overwrite` deletes a folder made with other settings.

    Raises ValueError as `check_run` does.
    """
    marker = folder / "settings.json"
    if check_run(folder, settings, overwrite, other_versions):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = read_json(marker) if marker.is_file() else {}
    missing = {name: value for name, value in settings.items() if found.get(name) is None}
    if missing or not found:
        write_json(marker, {**found, **missing})


def record_session(folder: Path, session: Mapping[str, Any]) -> None:
    """Adds where and when images are made to an open run, where it does not know that place yet."""
    marker = folder / "settings.json"
    found = read_json(marker)
    sessions = found.get("sessions", [])
    if all({**each, "date": None} != {**session, "date": None} for each in sessions):
        write_json(marker, {**found, "sessions": [*sessions, session]})


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], other_versions: bool) -> list[str]:
    known = {name for name in ABSENT_BEFORE if old.get(name) is None or new.get(name) is None} | {"sessions"}
    known |= {"versions"} if other_versions else set()
    pair = ({name: value for name, value in each.items() if name not in known} for each in (old, new))
    return differing_settings(*pair, within=ENTRY_BY_ENTRY)


def to_make(items: Sequence[Item], folder: Path, batch_size: int) -> list[list[Item]]:
    """The batches with missing items, made up as in a run that was never stopped, since a batch's size moves the last digits of its images.

    The traces of the images that are there say who was made together; a batch that lacks an image is made again as a whole. What no trace
    speaks of is cut into new batches, in order.
    """
    known = {item.name: item for item in items}
    together: dict[str, list[str]] = {}
    for item in items:
        if item.trace_path(folder).is_file():
            members = read_json(item.trace_path(folder)).get("batch", [item.name])
            together.update(dict.fromkeys(members, members))
    missing = [item for item in items if not item.is_done(folder)]
    again = {tuple(together[item.name]): None for item in missing if item.name in together}
    fresh = [item for item in missing if item.name not in together]
    batches = [[known[name] for name in members if name in known] for members in again]
    return batches + [fresh[start : start + batch_size] for start in range(0, len(fresh), batch_size)]


def generate_missing(
    items: Sequence[Item],
    folder: Path,
    generate: Callable[[Sequence[Item]], Sequence[Generated]],
    batch_size: int,
) -> int:
    """Makes the items that `folder` lacks, in the batches of `to_make`, saving each batch before the next. Returns how many it saved."""
    saved = 0
    for batch in to_make(items, folder, batch_size):
        names = {"batch": [item.name for item in batch]} if len(batch) > 1 else {}
        for item, generated in zip(batch, generate(batch), strict=True):
            if not item.is_done(folder):
                save(item, Generated(generated.image, {**generated.trace, **names}), folder)
                saved += 1
    return saved


def save(item: Item, generated: Generated, folder: Path) -> None:
    """Writes one item's row, image and trace, the trace last."""
    image_path, trace_path = item.image_path(folder), item.trace_path(folder)
    for path in (image_path, trace_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if item.path is None:  # GenEval's folder belongs to one prompt
        write_text(image_path.parent.parent / "metadata.jsonl", json.dumps(item.metadata) + "\n")
    data = encoded(item, generated.image)
    with whole_file(image_path) as temporary:
        temporary.write_bytes(data)
    facts = {
        "prompt": item.prompt,
        "index": item.index,
        "sample": item.sample,
        "seed": item.seed,
        "size": list(generated.image.size),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(trace_path, {**facts, **generated.trace})


def encoded(item: Item, image: Image.Image) -> bytes:
    """The image as it is written to the disk."""
    buffer = io.BytesIO()
    image.save(buffer, **FORMATS[Path(item.name).suffix])
    return buffer.getvalue()


def read_image(path: Path) -> np.ndarray:
    """An image as "h w 3" uint8. Raises ValueError naming the file where it is cut short or no image."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is not a whole image ({error}); delete it and run again") from error


def require_prompts(items: Sequence[Item], folder: Path) -> None:
    """Compares the prompts that lie beside images, NNNNN/metadata.jsonl, with the benchmark's own; a folder without is taken as it is.

    Raises ValueError naming the first that differs: a folder that was filtered or numbered anew would be judged by the wrong prompts.
    """
    for item in items:
        file = item.image_path(folder).parent.parent / "metadata.jsonl"
        if item.path is not None or item.sample or not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file} must be a JSON object with a "prompt" ({error}); copy it again or delete it') from error
        if found != item.prompt:
            raise ValueError(
                f"{file} says {found!r}, and prompt {item.index} of this benchmark is {item.prompt!r}; the folder is of other prompts, or "
                "was filtered or numbered anew: give its images the numbers of their prompts"
            )


def require_complete(items: Sequence[Item], folder: Path) -> None:
    """Raises FileNotFoundError where any image is missing: a mean over the rest would look like a result."""
    missing = [item.name for item in items if not item.image_path(folder).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(items)} images (first {missing[0]}); generate them before judging, or set a --limit"
        )
