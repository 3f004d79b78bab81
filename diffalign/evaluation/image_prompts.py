"""Where the prompt of an image that exists already is found. The first of these that has one counts, image by image:

--prompt TEXT                       one prompt for all
--prompts FILE                      CSV, TSV, JSON or JSONL from file names to prompts
trace.json, traces/NAME.json        what `diffalign generate` and `diffalign bench` leave beside images
metadata.jsonl, metadata.csv        file_name and prompt (or text), as Hugging Face's imagefolder; or GenEval's, beside samples/
NAME.txt                            beside NAME.png
PROMPT_000012.png                   T2I-CompBench's naming: in a folder called samples, or where PROMPT has several words
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffalign.benchmarks.base import Record
from diffalign.evaluation.image_files import ImageFile, first_names
from diffalign.files import read_json

FILE_KEYS = ("file_name", "filename", "file", "image", "image_path", "path", "name")
PROMPT_KEYS = ("prompt", "text", "caption")
LONGEST_FIELD = 10_000_000  # characters of one CSV field
_NUMBERED = re.compile(r"(?P<prompt>.+)_\d+", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """origin: where it was found, in the words of the list above."""

    text: str
    origin: str


@dataclass(frozen=True)
class _Row:
    """A file name and its prompt, and the line that says so, for errors."""

    file: str | None
    prompt: str
    where: str


def find_prompts(folder: Path, images: Sequence[ImageFile], for_all: str | None = None, table: Path | None = None) -> dict[str, Prompt]:
    """Image name -> prompt, for every image that has one; a blank one is none.

    Raises ValueError, naming the file and its line, for a file that cannot be understood or that contradicts itself.
    """
    if for_all is not None:
        return {image.name: Prompt(for_all, "--prompt") for image in images}
    given = _from_table(folder, images, table) if table else {}
    beside = _Beside(folder)
    found = {image.name: given.get(image.name) or beside.prompt(image) for image in images}
    return {name: prompt for name, prompt in found.items() if prompt is not None}


def _from_table(folder: Path, images: Sequence[ImageFile], table: Path) -> dict[str, Prompt]:
    index = _Index(folder, images)
    found: dict[str, _Row] = {}
    unknown = []
    for row in read_rows(table):
        if row.file is None:
            raise ValueError(f"{row.where} names no file; each row needs a file ({', '.join(FILE_KEYS)}) and a prompt")
        name = index.find(row.file, row.where)
        if name is None:
            unknown.append(row.file)
        elif name in found and found[name].prompt != row.prompt:
            raise ValueError(f"{row.where} gives {name} another prompt than {found[name].where} does")
        elif row.prompt.strip():
            found[name] = row
    if not found:
        what = f"names no image of {folder}: it has {first_names(unknown)}" if unknown else "holds no prompt"
        raise ValueError(f"--prompts {table} {what}; the images are {first_names([image.name for image in images])}")
    return {name: Prompt(row.prompt, f"--prompts {table}") for name, row in found.items()}


class _Index:
    """Finds an image by what a table calls it: its path in the folder, a path on this machine, or its name alone where that is enough."""

    def __init__(self, folder: Path, images: Sequence[ImageFile]) -> None:
        self.folder = folder.resolve()
        self.names = {_plain(image.name): image.name for image in images}
        self.ends: dict[str, list[str]] = {}
        for image in images:
            end = PurePosixPath(_plain(image.name))
            for key in {end.name, end.stem}:
                self.ends.setdefault(key, []).append(image.name)

    def find(self, text: str, where: str) -> str | None:
        path = PurePosixPath(_plain(text.replace("\\", "/")))
        inside = Path(path).resolve()  # against the current folder, as a path on the command line
        candidates = [str(path)]
        if inside.is_relative_to(self.folder):
            candidates.append(_plain(inside.relative_to(self.folder).as_posix()))
        for candidate in candidates:
            if candidate in self.names:
                return self.names[candidate]
        found = self.ends.get(path.name, [])
        if len(found) > 1:
            raise ValueError(f"{where}: {text!r} fits {first_names(found)}; write the path inside the folder")
        return found[0] if found else None


class _Beside:
    """What lies beside images; every folder's files are read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[Path, dict[str, Prompt]] = {}

    def prompt(self, image: ImageFile) -> Prompt | None:
        found = self._trace(image.path) or self._metadata(image.path) or _text_file(image.path) or _in_name(image)
        return found if found and found.text.strip() else None

    def _trace(self, path: Path) -> Prompt | None:
        for trace in (path.parent / "trace.json", path.parent.parent / "traces" / f"{path.stem}.json"):
            if trace.is_file():
                data = read_json(trace)
                if isinstance(data, dict) and isinstance(data.get("prompt"), str):
                    return Prompt(data["prompt"], "traces of diffalign")
        return None

    def _metadata(self, path: Path) -> Prompt | None:
        for place in path.parents:
            table = self._table(place)
            inside = _plain(path.relative_to(place).as_posix())
            if inside in table:
                return table[inside]
            if place == self.folder:
                break
        if path.parent.name == "samples":
            return self._table(path.parent.parent).get("")
        return None

    def _table(self, place: Path) -> dict[str, Prompt]:
        """Path inside `place` -> prompt; "" for GenEval's single row, which is of everything in samples/."""
        if place not in self._tables:
            self._tables[place] = {}
            for file in (place / "metadata.jsonl", place / "metadata.csv"):
                if file.is_file():
                    rows = list(read_rows(file, strict=False))
                    if len(rows) > 1 or (rows and rows[0].file is not None):
                        rows = [row for row in rows if row.file is not None]
                    self._tables[place] = {_plain(row.file or ""): Prompt(row.prompt, file.name) for row in rows}
                    break
        return self._tables[place]


def read_rows(file: Path, strict: bool = True) -> Iterator[_Row]:
    """The rows of a table of prompts. Rows without a prompt are an error, or passed over where not `strict`.

    Raises ValueError naming the file, and the line where there is one.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        hint = "; a list of prompts alone does not say whose they are" if file.suffix.lower() == ".txt" else ""
        raise ValueError(f"{file} must be .csv, .tsv, .json or .jsonl, with a file name and a prompt in each row{hint}")
    try:
        text = file.read_bytes().decode("utf-8-sig")  # read_text would change the line ends inside prompts
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    for where, data in reader(file, text, strict):
        lower = {str(key).strip().lower(): value for key, value in data.items()}
        prompt = next((lower[key] for key in PROMPT_KEYS if lower.get(key) is not None), None)
        if prompt is None and not strict:
            continue
        if not isinstance(prompt, str):
            raise ValueError(f"{where} has no prompt ({', '.join(PROMPT_KEYS)}); it has {', '.join(map(str, data)) or 'nothing'}")
        require_text(prompt, where)
        name = next((lower[key] for key in FILE_KEYS if isinstance(lower.get(key), str) and lower[key]), None)
        yield _Row(name, prompt, where)


def require_text(prompt: str, where: str) -> None:
    """Raises ValueError for half a surrogate pair, which no tokenizer takes and no file can hold."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a prompt that is not Unicode text, at character {error.start}") from error


def _read_csv(file: Path, text: str, strict: bool) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(LONGEST_FIELD)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = {str(name).strip().lower() for name in reader.fieldnames or ()}
        if not columns & set(FILE_KEYS) or not columns & set(PROMPT_KEYS):
            if not strict:
                return
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise ValueError(f"the first line of {file} must name its columns, file_name and prompt; it has {found[:200]}")
        for row in reader:
            where = f"{file} line {reader.line_num}"
            if None in row:
                raise ValueError(f'{where} has more fields than the first line names; put a prompt with "{delimiter}" in double quotes')
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{file} line {reader.line_num} is not valid CSV ({error})") from error


def _read_jsonl(file: Path, text: str, strict: bool) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a prompt may hold U+2028
        if line.strip():
            yield f"{file} line {number}", _object(line, f"{file} line {number}")


def _read_json(file: Path, text: str, strict: bool) -> Iterator[tuple[str, Record]]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    if isinstance(data, dict):
        for name, prompt in data.items():
            entry = prompt if isinstance(prompt, dict) else {"prompt": prompt}
            yield f"{file}, {name!r}", {**entry, "file_name": name}
    elif isinstance(data, list):
        for number, entry in enumerate(data, 1):
            where = f"{file}, entry {number}"
            yield where, entry if isinstance(entry, dict) else _object(json.dumps(entry), where)
    else:
        raise ValueError(f"{file} must hold an object from file names to prompts, or a list of objects; got {type(data).__name__}")


def _object(line: str, where: str) -> Record:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a JSON object with a file name and a prompt; got {line[:80]!r}")
    return data


def _text_file(image: Path) -> Prompt | None:
    file = image.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        return Prompt(file.read_text(encoding="utf-8-sig").strip(), "NAME.txt")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _in_name(image: ImageFile) -> Prompt | None:
    path = PurePosixPath(image.name)
    match = _NUMBERED.fullmatch(path.stem)
    if match and (image.path.parent.name == "samples" or " " in match["prompt"].strip()):
        return Prompt(match["prompt"], "file names, PROMPT_000012")
    return None


def _plain(name: str) -> str:
    """Without "./", and in one form of Unicode: macOS writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name)) if name else "")
