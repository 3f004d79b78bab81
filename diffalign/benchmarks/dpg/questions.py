"""DPG-Bench's scores: yes / no questions about dense prompts, where a question counts only if those it depends on were answered yes.

Source: Hu et al., "ELLA" (arXiv 2403.05135). Per image, in the order of the questions: an answer is 1 if it is exactly "yes", and becomes
0 where any parent's (already so reduced) is 0; the image scores the mean. An item scores the mean over its images, the benchmark 100 x
the mean over items.

Published category scores take the answers before that reduction, of the **last** image only, and drop the first row of the questions
file; the last two are slips of the original code, which are not repeated here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

ROOT = 0  # the parent of a question that depends on nothing


@dataclass(frozen=True)
class Questions:
    """One prompt's questions: id -> text, id -> parents, id -> category such as "attribute - color". Ids are in the order of asking."""

    text: Mapping[int, str]
    parents: Mapping[int, Sequence[int]]
    category: Mapping[int, str]


def parse_questions(text: str, path: str) -> dict[str, Questions]:
    """Item id -> questions, from the text of dpg_bench.csv; `path` is named in errors.

    Raises ValueError for a missing column, an unknown parent, no number where one belongs.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    needed = {"item_id", "proposition_id", "dependency", "tuple", "question_natural_language"}
    missing = needed - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}; is it dpg_bench.csv?")
    rows = list(reader)
    items: dict[str, Questions] = {}
    for row in rows:
        questions = items.setdefault(row["item_id"], Questions({}, {}, {}))
        try:
            number = int(row["proposition_id"])
            questions.parents[number] = [int(parent) for parent in row["dependency"].split(",")]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: proposition_id and dependency of {row['item_id']} must be numbers ({error})") from error
        questions.text[number] = row["question_natural_language"]
        questions.category[number] = row["tuple"].split("(")[0].strip()
    for item, questions in items.items():
        _check_parents(path, item, questions)
    return items


def image_score(parents: Mapping[int, Sequence[int]], answers: Mapping[int, str]) -> float:
    """One image's score in [0, 1] from its answers, one per question. Raises ValueError where an answer or a parent is missing."""
    if set(answers) != set(parents) or not parents:
        raise ValueError(f"there must be one answer per question; got {len(answers)} answers to {len(parents)} questions")
    scores = raw_scores(answers)
    for question, needed in parents.items():
        unknown = [parent for parent in needed if parent not in scores and parent != ROOT]
        if unknown:
            raise ValueError(f"question {question} depends on {unknown}, which are not among the questions")
        if any(parent != ROOT and scores[parent] == 0 for parent in needed):
            scores[question] = 0.0
    return sum(scores.values()) / len(scores)


def raw_scores(answers: Mapping[int, str]) -> dict[int, float]:
    """Question -> 1 for exactly "yes", else 0; parents are not looked at."""
    return {question: float(answer == "yes") for question, answer in answers.items()}


def category_scores(questions: Mapping[str, Questions], answers: Mapping[str, Sequence[Mapping[int, str]]]) -> dict[str, float]:
    """Category -> 100 x the mean of the raw scores; the broad categories ("attribute") come before the detailed ("attribute - color")."""
    values: dict[str, list[float]] = {}
    for item, images in answers.items():
        for image in images:
            for question, value in raw_scores(image).items():
                category = questions[item].category[question]
                values.setdefault(category, []).append(value)
    broad: dict[str, list[float]] = {}
    for category, of_category in values.items():
        broad.setdefault(category.split("-")[0].strip(), []).extend(of_category)
    # A category without detail ("global") is its own broad one.
    return {name: 100 * float(np.mean(v)) for name, v in {**dict(sorted(broad.items())), **dict(sorted(values.items()))}.items()}


def to_grid(images: Sequence[Image.Image]) -> Image.Image:
    """One image as it is, four as the 2 x 2 grid (row by row) that the original reads. Raises ValueError for other numbers or sizes."""
    if len(images) not in (1, 4) or len({image.size for image in images}) != 1:
        raise ValueError(f"DPG-Bench takes 1 or 4 images of one size per prompt; got {[image.size for image in images]}")
    width, height = images[0].size
    columns = 1 if len(images) == 1 else 2
    grid = Image.new("RGB", (width * columns, height * columns))
    for i, image in enumerate(images):
        grid.paste(image.convert("RGB"), (width * (i % columns), height * (i // columns)))
    return grid


def from_grid(grid: Image.Image, images: int = 4) -> list[Image.Image]:
    """The tiles of a grid made by `to_grid` or by any generator for DPG-Bench."""
    if images == 1:
        return [grid]
    width, height = grid.width // 2, grid.height // 2
    if images != 4 or grid.width % 2 or grid.height % 2:
        raise ValueError(f"a grid of DPG-Bench has 4 tiles and even sides; got {images} tiles and {grid.size}")
    return [grid.crop((x, y, x + width, y + height)) for y in (0, height) for x in (0, width)]


def _check_parents(path: str, item: str, questions: Questions) -> None:
    for question, needed in questions.parents.items():
        unknown = [parent for parent in needed if parent != ROOT and parent not in questions.text]
        if unknown:
            raise ValueError(f"{path}: question {question} of {item} depends on {unknown}, which {item} does not have")
