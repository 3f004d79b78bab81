"""Files and folders that are either whole or absent: written under a temporary name beside the final one, then renamed.

A run killed at any moment leaves at worst a hidden temporary, `.partial-...`, which nothing reads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it takes the final name when the block ends well and vanishes when it does not."""
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name}")  # shards of one run write the same small files
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder; it takes the final name, replacing what was there, when the block ends well."""
    temporary = path.with_name(f".partial-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Indented JSON. Raises ValueError for a number that JSON cannot hold (nan, inf), rather than write what others cannot read."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file where it does not hold JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not hold valid JSON ({error}); delete it and run again") from error


def require_writable(folder: Path) -> None:
    """Makes the folder and proves that a file can be written in it. Raises OSError otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".partial-probe"
    try:
        probe.write_bytes(b"x")
    finally:
        probe.unlink(missing_ok=True)


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs differ, as "name: old -> new", compared as the JSON they are stored as."""
    new = json.loads(json.dumps(new))
    names = [*new, *(name for name in old if name not in new)]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]
