"""Which files of a folder are the images to score: every image in it and below it, except pictures that are about images.

Hidden files and folders are left alone, and folders that are links are not entered, so that no image counts twice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffalign.images import SUFFIXES, is_image_name

# Files that mark a folder -> the pictures beside them that are images; the others show several at once, or scores.
_PICTURES_ABOUT_IMAGES: tuple[tuple[tuple[str, ...], frozenset[str]], ...] = (
    (("trace.json",), frozenset({"before.png", "after.png"})),  # diffalign generate: strip.png, rewards.png
    (("metadata.jsonl", "samples"), frozenset()),  # GenEval's layout: grid.png
    (("summary.json", "table.md"), frozenset()),  # diffalign bench: its grid
    (("results.json", "scores"), frozenset()),  # diffalign score: distributions.png
)
NAMED_IN_ERRORS = 3


@dataclass(frozen=True)
class ImageFile:
    """name: the path inside the folder with "/" between its parts; bytes that are no UTF-8 are written out, as in caf\\xe9.png."""

    path: Path
    name: str


@dataclass(frozen=True)
class Listing:
    """images: in the order of their names. aside: names of pictures that are about images. others: how many files are no images."""

    images: tuple[ImageFile, ...]
    aside: tuple[str, ...]
    others: int


def list_images(folder: Path, match: str | None = None) -> Listing:
    """The images of a folder. match: a pattern for the end of the path, such as "after.png" or "reno/*/samples/*.png".

    Raises ValueError where the folder is missing, is a file, or holds no image; OSError where it cannot be read.
    """
    if not folder.exists():
        raise ValueError(f"the folder {folder} does not exist")
    if not folder.is_dir():
        parent = folder.parent
        raise ValueError(f"{folder} is a file; give its folder, and --match for this file alone: {parent} --match '{folder.name}'")
    images, aside, others = [], [], 0
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        kept = _kept({*folders, *files})
        for file in files:
            if file.startswith("."):
                continue
            path = Path(place) / file
            if not is_image_name(file) or (path.exists() and not path.is_file()):  # a broken link is an image that fails, a pipe is none
                others += 1
                continue
            name = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")
            if kept is not None and file not in kept:
                aside.append(name)
            elif match is None or PurePosixPath(name).match(match):
                images.append(ImageFile(path, name))
    if not images:
        found = f"{others} other files, and {len(aside)} pictures about images" if aside else f"{others} other files"
        what = f"no image in {folder} matches --match {match!r}" if match else f"there is no image in {folder}, which holds {found}"
        raise ValueError(what if match else f"{what}; an image's name ends in {', '.join(SUFFIXES)}")
    return Listing(tuple(sorted(images, key=lambda image: image.name)), tuple(sorted(aside)), others)


def first_names(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - NAMED_IN_ERRORS} more" if len(names) > NAMED_IN_ERRORS else ""
    return ", ".join(names[:NAMED_IN_ERRORS]) + more


def _kept(names: set[str]) -> frozenset[str] | None:
    """Which images of a folder with these entries count; None for all."""
    for markers, kept in _PICTURES_ABOUT_IMAGES:
        if names.issuperset(markers):
            return kept
    return None


def _raise(error: OSError) -> None:
    raise error
