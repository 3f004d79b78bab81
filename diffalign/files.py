"""Files and folders: where the package's own lie, and reading and writing that leaves them whole or absent.

Written under a temporary name beside the final one, then renamed: a run killed at any moment leaves at
worst a hidden temporary, `.partial-...`, which nothing reads.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PACKAGE = "package:"  # begins the name of a place inside the installed diffalign package
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A repository of the Hugging Face Hub: "org/name"."""


def packaged_path(where: str) -> Path | None:
    """The path of "package:shapes/weights/shapes-clip" inside the diffalign package; None for any other place."""
    if not where.startswith(PACKAGE):
        return None
    return Path(str(importlib.resources.files("diffalign").joinpath(*where.removeprefix(PACKAGE).split("/"))))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError that names no file this one: a write to a full disk knows only its descriptor."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it takes the final name when the block ends well and vanishes when it does not."""
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name}")  # shards of one run write the same small files
    try:
        with naming(path):
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
        with naming(path):
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


def read_json(path: Path, keys: Sequence[str] = ()) -> Any:
    """What a JSON file holds; with `keys`, an object that has them. Raises ValueError naming the file otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); make or copy it again") from error
    if keys and not (isinstance(content, dict) and all(key in content for key in keys)):
        raise ValueError(f"{path} must be a JSON object with the keys {', '.join(keys)}")
    return content


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Sequence[Any]], None]]:
    """Yields a function that adds JSON lines and waits until they are on the disk: all lines of a call, or none where it raises.

    What a killed process left unfinished at the end is removed first. Raises OSError naming the file, as on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)

        def append(lines: Sequence[Any]) -> None:
            nonlocal whole
            data = memoryview("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
            try:
                left = data
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException as error:
                file.truncate(whole)
                if isinstance(error, OSError):
                    raise OSError(error.errno, error.strerror, str(path)) from error
                raise
            whole += len(data)

        yield append


def read_lines(path: Path) -> list[Any]:
    """The whole JSON lines of a file, none where there is no file. Raises ValueError naming the file where one is damaged."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]  # what follows the last line end is unfinished
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not valid JSON ({error}); delete it and run again") from error


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object per line, as GenEval's results.jsonl."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote, or another program. Raises ValueError naming a line that is no JSON object.

    Lines end at newlines alone: text in them may hold other marks that Python's splitlines takes for ends, such as U+2028.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} line {number} is not a JSON object: {line[:80]!r}") from error
    return rows


_MADE: list[Path] = []


def require_writable(folder: Path) -> None:
    """Makes the folder and proves that a file can be written in it. Raises OSError otherwise."""
    _MADE.extend(path for path in (folder, *folder.parents) if not path.exists())
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".partial-probe"
    try:
        probe.write_bytes(b"x")
    finally:
        probe.unlink(missing_ok=True)


def remove_empty() -> None:
    """Removes the folders that this process has made in `require_writable` and left empty, as a call does that was refused afterwards."""
    for path in sorted(set(_MADE), key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # not empty, or not there
            path.rmdir()
    _MADE.clear()


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any], within: Sequence[str] = ()) -> list[str]:
    """The settings in which two runs differ, as "name: old -> new", compared as the JSON they are stored as.

    within: names of mappings that are compared entry by entry, as in "preset steps: 1 -> 2".
    """
    new = json.loads(json.dumps(new))
    for name in within:
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            old = {**old, **{f"{name} {key}": value for key, value in old[name].items()}, name: None}
            new = {**new, **{f"{name} {key}": value for key, value in new[name].items()}, name: None}
    names = [*new, *(name for name in old if name not in new)]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]
