"""A method's folder of images: what made them, and whether a run may go on in it.

    FOLDER/settings.json                     what made the images; a run with other settings is refused
    FOLDER/00012/metadata.jsonl              the prompt's row, one JSON object
    FOLDER/00012/samples/00000.png           one image per sample
    FOLDER/00012/traces/00000.json           how that image came about; written last, so its presence marks the item done

So generation resumes where it stopped, any program's images can be judged, and our images can be judged by upstream's code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffalign.benchmarks.base import Item, Record
from diffalign.files import differing_settings, read_json, write_json

ENTRY_BY_ENTRY = ("preset", "versions", "resolved")
ABSENT_BEFORE = ("preset", "weights", "versions", "resolved")
"""What runs of before 2026-11-24 do not record; a run without it is continued, and records it from then on."""


def check_run(folder: Path, settings: Record, overwrite: bool = False, other_versions: bool = False) -> bool:
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


def open_run(folder: Path, settings: Record, overwrite: bool = False, other_versions: bool = False) -> None:
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


def record_session(folder: Path, session: Record) -> None:
    """Adds where and when images are made to an open run, where it does not know that place yet."""
    marker = folder / "settings.json"
    found = read_json(marker)
    sessions = found.get("sessions", [])
    if all({**each, "date": None} != {**session, "date": None} for each in sessions):
        write_json(marker, {**found, "sessions": [*sessions, session]})


def _changed(old: Record, new: Record, other_versions: bool) -> list[str]:
    known = {name for name in ABSENT_BEFORE if old.get(name) is None or new.get(name) is None} | {"sessions"}
    known |= {"versions"} if other_versions else set()
    pair = ({name: value for name, value in each.items() if name not in known} for each in (old, new))
    return differing_settings(*pair, within=ENTRY_BY_ENTRY)


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
