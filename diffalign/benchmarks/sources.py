"""Prompt lists where the user has them: a clone, a file, or a URL of either. Nothing is copied into this package or onto the disk; a
process reads each list once, and again only where its file has changed since.

A list is known by the hash of its prompts, which stands in every result, since lists change under one name.
"""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

TIMEOUT = 60  # seconds


def read_source(source: str | Path, paths: Sequence[str], home: str) -> str:
    """The text of the first of `paths` in the folder or under the URL `source`, or of `source` itself where that is the file.

    home: the address to tell the user to get it from. Raises FileNotFoundError saying where it was looked for, ValueError for other bytes
    than UTF-8 text.
    """
    text = str(source)
    suffixes = {Path(path).suffix for path in paths}
    places: Sequence[str | Path]
    if "://" in text:
        places = [text] if Path(text).suffix in suffixes else [f"{text.rstrip('/')}/{path}" for path in paths]
    else:
        folder = Path(text).expanduser()
        places = [folder] if folder.is_file() else [folder / path for path in paths]
    return _read(tuple(places), tuple(_stamp(place) for place in places), home)


def _stamp(place: str | Path) -> tuple[int, int] | None:
    """What changes when a file is written again; of an address nothing is known without asking for it."""
    try:
        found = Path(place).stat() if isinstance(place, Path) else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size) if found else None


@lru_cache(maxsize=64)
def _read(places: tuple[str | Path, ...], stamps: tuple[tuple[int, int] | None, ...], home: str) -> str:
    """`stamps` only tells versions of a file apart."""
    problems = []
    for place in places:
        try:
            data = _bytes(place)
        except (OSError, ValueError) as error:  # ValueError: an address that is none
            problems.append(str(place) if isinstance(error, FileNotFoundError) else f"{place} ({error})")
            continue
        try:
            return data.decode("utf-8-sig")  # spreadsheets put a mark before the text
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is not UTF-8 text ({error})") from error
    where = " nor at ".join(problems)
    raise FileNotFoundError(
        f"the prompts are neither at {where}; give the folder or raw URL of your copy of {home}"
        if len(problems) > 1
        else f"the prompts are not at {where}; give the folder, file or raw URL of your copy of {home}"
    )


def _bytes(place: str | Path) -> bytes:
    if isinstance(place, Path):
        return place.read_bytes()
    with urllib.request.urlopen(place, timeout=TIMEOUT) as response:
        return response.read()


def version_of(prompts: Sequence[str]) -> str:
    """The first 16 digits of the sha256 of the prompts, joined by newlines."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
