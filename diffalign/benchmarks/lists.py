"""The prompts of PartiPrompts, HPSv2, DrawBench, DPG-Bench and GenEval 2, read from where the user has them. None is part of the package.

    parti       Yu et al. 2022 (arXiv 2206.10789), 1,632 prompts in 12 categories; Apache-2.0
    hpsv2       Wu et al. 2023 (arXiv 2306.09341), 4 styles of 800 prompts
    drawbench   Saharia et al. 2022 (Imagen, arXiv 2205.11487), 200 prompts in 11 categories; licence unknown
    dpg         Hu et al. 2024 (ELLA, arXiv 2403.05135), 1,065 dense prompts; Apache-2.0
    geneval2    2025 (arXiv 2512.16853), 800 prompts of 3 to 10 atoms; CC BY-NC 4.0

Images lie as each one's evaluator reads them where it has one (HPSv2: STYLE/00012.jpg), else as GenEval's.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diffalign.benchmarks.base import Record
from diffalign.benchmarks.prompt_list import PromptSet, Row
from diffalign.benchmarks.sources import read_source, version_of

HOMES = {
    "parti": "https://github.com/google-research/parti (PartiPrompts.tsv)",
    "hpsv2": "https://huggingface.co/datasets/zhwang/HPDv2 (benchmark/anime.json and three more)",
    "drawbench": "DrawBench as a .csv with the columns Prompts and Category",
    "dpg": "https://github.com/TencentQQGYLab/ELLA (dpg_bench)",
    "geneval2": "https://github.com/facebookresearch/GenEval2 (geneval2_data.jsonl)",
}
KNOWN = {"f105efa0c9360bc9": "PartiPrompts, 1,632 prompts", "a06a6c0ea412d1ab": "DPG-Bench, 1,065 prompts"}
STYLES = ("anime", "concept-art", "paintings", "photo")


def read_prompt_set(name: str, source: str | Path) -> PromptSet:
    """Raises FileNotFoundError where the list is not at `source`, ValueError naming the line that is no prompt."""
    rows = tuple(READERS[name](source))
    if not rows:
        raise ValueError(f"{source} holds no prompts of {name}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.prompt, str) or not row.prompt.strip():
            raise ValueError(f"{source}: prompt {number} of {name} is empty or no text: {row.prompt!r}")
    digest = version_of([row.prompt for row in rows])
    return PromptSet(name, rows, KNOWN.get(digest, f"{len(rows)} prompts, list {digest}"))


def _parti(source: str | Path) -> list[Row]:
    text = read_source(source, ("PartiPrompts.tsv",), HOMES["parti"])
    # Quotes are part of the prompts, not marks of the table.
    return [
        Row(row["prompt"], row["category"], {"challenge": row.get("challenge", "")})
        for row in _table(text, source, "parti", delimiter="\t", quoting=csv.QUOTE_NONE)
    ]


def _drawbench(source: str | Path) -> list[Row]:
    names = ("drawbench.csv", "DrawBench.csv", "drawbench.tsv", "drawbench.json", "drawbench.txt")
    text = read_source(source, names, HOMES["drawbench"])
    if text.lstrip().startswith("["):
        return [Row(prompt, "all") for prompt in _json_list(text, source)]
    head = text.lstrip().split("\n", 1)[0].lower()
    if "prompt" not in head or not set(",\t") & set(head):
        return [Row(line.strip(), "all") for line in text.splitlines() if line.strip()]
    return [Row(row["prompt"], row["category"]) for row in _table(text, source, "drawbench", delimiter="\t" if "\t" in head else ",")]


def _hpsv2(source: str | Path) -> list[Row]:
    if Path(source).is_file():
        raise NotADirectoryError(f"HPSv2's prompts are four files, anime.json and so on; give their folder, not {source}")
    rows = []
    for style in STYLES:
        text = read_source(source, (f"{style}.json", f"benchmark/{style}.json"), HOMES["hpsv2"])
        rows += [Row(prompt, style, {}, f"{style}/{i:05d}.jpg") for i, prompt in enumerate(_json_list(text, source))]
    return rows


def _dpg(source: str | Path) -> list[Row]:
    """From ELLA's .txt files, its question file, or lines of {"item_id", "prompt"}; in the order of the ids, numbers by value."""
    prompts = {path.stem: path.read_text(encoding="utf-8").strip() for path in _text_files(source)}
    if not prompts:
        text = read_source(source, ("prompts.jsonl", "dpg_bench.csv", "dpg_bench/dpg_bench.csv"), HOMES["dpg"])
        if text.lstrip().startswith("{"):
            prompts = {str(row["item_id"]): row["prompt"].strip() for row in _json_lines(text, source, ("item_id", "prompt"))}
        else:
            prompts = {row["item_id"]: row["text"].strip() for row in _table(text, source, "dpg")}
    for item in prompts:
        if not re.fullmatch(r"[\w.-]+", item):
            raise ValueError(f"{source}: item ids of DPG-Bench become folders, so {item!r} cannot be one")
    return [Row(prompts[item], "dpg", {"item_id": item}, item + "/samples/{sample:05d}.png") for item in sorted(prompts, key=_by_value)]


def _by_value(name: str) -> list[tuple[bool, int, str]]:
    """Sorts "9" before "10"."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"\d+|\D+", name)]


def _text_files(source: str | Path) -> list[Path]:
    if "://" in str(source):
        return []
    folder = Path(source).expanduser()
    return next((found for place in ("dpg_bench/prompts", "prompts", ".") if (found := sorted((folder / place).glob("*.txt")))), [])


def _geneval2(source: str | Path) -> list[Row]:
    text = read_source(source, ("geneval2_data.jsonl",), HOMES["geneval2"])
    rows = []
    for number, row in enumerate(_json_lines(text, source, ("prompt", "atom_count", "vqa_list", "skills")), 1):
        if len(row["vqa_list"]) != len(row["skills"]) or not row["vqa_list"] or not all(len(pair) == 2 for pair in row["vqa_list"]):
            raise ValueError(f"{source} row {number}: vqa_list must hold [question, answer] pairs, one for each of skills")
        rows.append(Row(row["prompt"], f"{row['atom_count']} atoms", {"questions": row["vqa_list"], "skills": row["skills"]}))
    return rows


READERS: Mapping[str, Callable[[str | Path], Sequence[Row]]] = {
    "parti": _parti,
    "hpsv2": _hpsv2,
    "drawbench": _drawbench,
    "dpg": _dpg,
    "geneval2": _geneval2,
}


def _table(text: str, source: str | Path, name: str, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> list[dict[str, str]]:
    """Rows by column, their names in lower case and "prompts" in the singular. Raises ValueError where columns are missing."""
    needed = {"parti": ("prompt", "category"), "drawbench": ("prompt", "category"), "dpg": ("item_id", "text")}[name]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    reader.fieldnames = ["prompt" if (key := column.strip().lower()) == "prompts" else key for column in reader.fieldnames or ()]
    missing = [column for column in needed if column not in reader.fieldnames]
    if missing:
        raise ValueError(f"{source} lacks the columns {', '.join(missing)} of {name}; it has {', '.join(reader.fieldnames)[:200]}")
    rows = list(reader)
    for number, row in enumerate(rows, 2):
        if any(row[column] is None for column in needed):
            raise ValueError(f"{source} line {number} has too few columns for {name}")
    return rows


def _json_list(text: str, source: str | Path) -> list[str]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON ({error})") from error
    if not isinstance(data, list):
        raise ValueError(f"{source} must hold a list of prompts; got {type(data).__name__}")
    return data


def _json_lines(text: str, source: str | Path, needed: Sequence[str]) -> list[Record]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
            missing = [key for key in needed if key not in row]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source} line {number} is not a JSON object: {line[:80]!r}") from error
        if missing:
            raise ValueError(f"{source} line {number} lacks {', '.join(missing)}")
        rows.append(row)
    return rows
