"""GenEval's 553 prompts with their metadata, made again from the recipe of the release rather than copied: the same bytes, and checked.

Source: Ghosh et al., "GenEval" (arXiv 2310.11513), whose released rows come from one NumPy generator with seed 43. Each row is what the
rule engine (`geneval_rules`) judges by:

    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "tv", "count": 1, "position": ["left of", 0]}], "prompt": ...}

`include` clauses must all hold, `exclude` clauses (counting only) must not. The README of the release speaks of 553 prompts, several
papers of 552; there are 553.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.benchmarks.sources import read_source
from diffalign.rules import COLORS, RELATIONS

# The 80 detection classes of COCO in its order, the detector's class index; GenEval renamed three (mouse, remote, keyboard).
# fmt: off
OBJECTS: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush",
)
# fmt: on
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
DRAWS_PER_TASK = 100  # of every task but single_object; exact duplicates go afterwards
SEED = 43
SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of the released evaluation_metadata.jsonl

FILE = "evaluation_metadata.jsonl"
HOME = "https://github.com/djghosh13/geneval (prompts/)"

Row = dict[str, Any]


def metadata(source: str | Path | None = None) -> list[Row]:
    """The 553 rows in file order, the caller's own to change: drawn again, or read from the user's copy of the released file.

    source: a clone of the release, its evaluation_metadata.jsonl, or the raw URL of either. Raises ValueError where a NumPy of another
    random stream draws other rows, or the file is not the released one; FileNotFoundError where there is none.
    """
    return copy.deepcopy(_checked_rows() if source is None else _read_rows(str(source)))


def jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as the release's file holds them: one JSON object per line, keys in the order given."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def article(word: str) -> str:
    """ "a" or "an" by the first letter, which is what the release does: "an umbrella", and "an orange cup"."""
    return "an" if word[0] in "aeiou" else "a"


def plural(name: str) -> str:
    """The release's plural, ungrammatical where English is irregular: "knifes", "benchs", "skises"."""
    return name + ("es" if name.endswith("s") else "s")


def parse(prompt: str) -> Row:
    """The row of any prompt made like GenEval's, among its 553 or not: "a photo of" and one or two of the 80 objects.

    Counts go to four and plurals are the release's, as in the 553. Case, a full stop at the end and a / an do not matter. Raises ValueError
    for another prompt: GenEval's rules cannot judge it.
    """
    text = " ".join(prompt.lower().split()).removesuffix(".")
    for pattern, make in _GRAMMAR:
        if match := re.fullmatch(f"a photo of {pattern}", text):
            return {**make(*match.groups()), "prompt": prompt}
    raise ValueError(
        f"GenEval's rules cannot judge {prompt[:100]!r}: a prompt must be 'a photo of' and one of its 80 objects, two of them, two to four "
        "of one, one with a colour, two with a colour each, or two in one of the relations left of, right of, above, below"
    )


@lru_cache(maxsize=1)
def _checked_rows() -> list[Row]:
    rows = _draw(np.random.default_rng(SEED))
    found = _digest(jsonl(rows))
    if found != SHA256:
        raise ValueError(
            f"NumPy {np.__version__} has another random stream and draws other GenEval prompts than the released ones (sha256 {found[:8]} "
            f"instead of {SHA256[:8]}); give your copy of {FILE}, from {HOME}, with --prompts (in Python as source=), "
            "or use a NumPy that draws them, such as 2.4"
        )
    return rows


def _read_rows(source: str) -> list[Row]:
    text = read_source(source, (FILE, f"prompts/{FILE}"), HOME)
    found = _digest(text)
    if found != SHA256:
        raise ValueError(f"{source} is not the released {FILE} (sha256 {found[:8]} instead of {SHA256[:8]}); copy it again from {HOME}")
    return [json.loads(line) for line in text.splitlines()]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _draw(rng: np.random.Generator) -> list[Row]:
    """All tasks from one generator. The order of the calls is the recipe: a call more or less changes every later row."""
    rows = [_single(OBJECTS[i]) for i in rng.choice(len(OBJECTS), len(OBJECTS), replace=False)]
    for _ in range(DRAWS_PER_TASK):
        rows.append(_two(*(OBJECTS[i] for i in rng.choice(len(OBJECTS), 2, replace=False))))
    for _ in range(DRAWS_PER_TASK):
        name = OBJECTS[rng.choice(len(OBJECTS))]
        rows.append(_counting(name, int(rng.integers(2, 4, endpoint=True))))
    for _ in range(DRAWS_PER_TASK):
        name = OBJECTS[rng.choice(len(OBJECTS) - 1) + 1]  # no person, whose colour is not asked for
        rows.append(_colors(name, COLORS[rng.choice(len(COLORS))]))
    for _ in range(DRAWS_PER_TASK):
        subject, target = (OBJECTS[i] for i in rng.choice(len(OBJECTS), 2, replace=False))
        rows.append(_position(subject, target, RELATIONS[rng.choice(len(RELATIONS))]))
    for _ in range(DRAWS_PER_TASK):
        names = [OBJECTS[i + 1] for i in rng.choice(len(OBJECTS) - 1, 2, replace=False)]
        rows.append(_color_attr(names, [COLORS[i] for i in rng.choice(len(COLORS), 2, replace=False)]))
    first_of_each: dict[str, Row] = {}
    for row in rows:
        first_of_each.setdefault(json.dumps(row), row)
    return list(first_of_each.values())


def _single(name: str) -> Row:
    return {"tag": "single_object", "include": [_clause(name)], "prompt": f"a photo of {article(name)} {name}"}


def _two(a: str, b: str) -> Row:
    prompt = f"a photo of {article(a)} {a} and {article(b)} {b}"
    return {"tag": "two_object", "include": [_clause(a), _clause(b)], "prompt": prompt}


def _counting(name: str, count: int) -> Row:
    """Exactly `count`: at least that many, and not one more."""
    return {
        "tag": "counting",
        "include": [_clause(name, count)],
        "exclude": [_clause(name, count + 1)],
        "prompt": f"a photo of {NUMBER_WORDS[count]} {plural(name)}",
    }


def _colors(name: str, color: str) -> Row:
    return {"tag": "colors", "include": [{**_clause(name), "color": color}], "prompt": f"a photo of {article(color)} {color} {name}"}


def _position(subject: str, target: str, relation: str) -> Row:
    """The target comes first in `include`, since a position names an earlier clause by its index."""
    return {
        "tag": "position",
        "include": [_clause(target), {**_clause(subject), "position": [relation, 0]}],
        "prompt": f"a photo of {article(subject)} {subject} {relation} {article(target)} {target}",
    }


def _color_attr(names: Sequence[str], colors: Sequence[str]) -> Row:
    phrases = [f"{article(color)} {color} {name}" for name, color in zip(names, colors, strict=True)]
    clauses = [{**_clause(name), "color": color} for name, color in zip(names, colors, strict=True)]
    return {"tag": "color_attr", "include": clauses, "prompt": f"a photo of {phrases[0]} and {phrases[1]}"}


def _clause(name: str, count: int = 1) -> Row:
    return {"class": name, "count": count}


def _any_of(words: Iterable[str]) -> str:
    """A group that matches one of the words, the longer ones first."""
    return f"({'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})"


_SINGULAR = {plural(name): name for name in OBJECTS}
_COUNTS = {word: number for number, word in NUMBER_WORDS.items()}
_NAME, _COLOR = _any_of(OBJECTS), _any_of(COLORS)
_GRAMMAR: tuple[tuple[str, Callable[..., Row]], ...] = (
    (f"an? {_NAME}", _single),
    (f"an? {_NAME} and an? {_NAME}", _two),
    (f"{_any_of(_COUNTS)} {_any_of(_SINGULAR)}", lambda word, things: _counting(_SINGULAR[things], _COUNTS[word])),
    (f"an? {_COLOR} {_NAME}", lambda color, name: _colors(name, color)),
    (f"an? {_NAME} {_any_of(RELATIONS)} an? {_NAME}", lambda subject, relation, target: _position(subject, target, relation)),
    (f"an? {_COLOR} {_NAME} and an? {_COLOR} {_NAME}", lambda c1, a, c2, b: _color_attr((a, b), (c1, c2))),
)
