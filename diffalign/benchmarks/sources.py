"""Prompt lists where the user has them: a clone, a file, or a URL of either. Nothing is copied into this package.

A process reads each file once, and again only where it has changed since. What http gives is kept in `cache_folder()` and read from there
by later processes; a list is known by the hash of its prompts, which stands in every result, since lists change under one name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import urllib.request
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from diffalign.files import whole_file

logger = logging.getLogger(__name__)

TIMEOUT = 60  # seconds
REMOTE = ("http://", "https://")


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
    for place in sorted(places, key=lambda place: _kept(place) is None):  # what is here before asking for what may be elsewhere
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
    if (kept := _kept(place)) is not None:
        return kept
    with urllib.request.urlopen(place, timeout=TIMEOUT) as response:
        data = response.read()
    if place.startswith(REMOTE):
        _keep(place, data)
    return data


def cache_folder() -> Path:
    """Where prompt lists read from addresses are kept: below $XDG_CACHE_HOME, or ~/.cache where that is not set. Deleting it is safe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffalign" / "prompts"


def _kept(place: str | Path) -> bytes | None:
    """What is kept of an address; None where nothing is, or where the bytes are not those that the file's name says."""
    if isinstance(place, Path) or not place.startswith(REMOTE):
        return None
    for path in sorted(cache_folder().glob(f"{_digest(place.encode())}-*")):
        data = path.read_bytes()
        if path.name.split("-")[1] == _digest(data):
            return data
    return None


def _keep(place: str, data: bytes) -> None:
    """Named by the digests of the address and of the content, then as at the address: what is damaged is not read."""
    path = cache_folder() / f"{_digest(place.encode())}-{_digest(data)}-{Path(urlsplit(place).path).name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        logger.warning("the prompts are not kept for the next time: %s", error)
    else:
        logger.info("the prompts are kept in %s and read from there from now on; delete it to fetch them again", path)


def _digest(data: bytes) -> str:
    """The first 16 digits of the sha256."""
    return hashlib.sha256(data).hexdigest()[:16]


def version_of(prompts: Sequence[str]) -> str:
    """The first 16 digits of the sha256 of the prompts, joined by newlines."""
    return _digest("\n".join(prompts).encode())
