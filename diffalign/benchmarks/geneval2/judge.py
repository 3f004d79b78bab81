"""GenEval 2: soft scores of questions about each atom of a prompt (objects, counts, attributes, positions, verbs), one image per prompt.

Source: arXiv 2512.16853 and its code. With p_q the probability that the judge gives the right answer to question q:

    Soft-TIFA AM = mean of p_q over a prompt's questions        Soft-TIFA GM = their geometric mean (0 where any is 0); the headline

both averaged over prompts; papers quote 100 x. Per skill: the mean of p_q over all questions of that skill; per number of atoms: mean GM.

The published judge is Qwen3-VL-8B-Instruct, asked openly ("How many dogs are in the image? Answer in one word."). Of each accepted
answer the first token counts: "three", "Three", "3", and those after a blank. Another judge is another scale; the scorer's version names
it. The official evaluator's own output can be given instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.benchmarks.base import Item, Pixels, Record
from diffalign.benchmarks.models.vqa import Panel
from diffalign.files import read_json, write_json, write_text

SUFFIX = " Answer in one word."
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}


@dataclass(frozen=True)
class GenEval2Scorer:
    """Soft-TIFA of each image. Items carry "questions" ([question, answer] pairs) and "skills" in their metadata."""

    panel: Panel
    name: str = "geneval2"

    @property
    def version(self) -> str:
        return f"Soft-TIFA by {self.panel.version}"

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        questions = [[question + SUFFIX for question, _ in item.metadata["questions"]] for item in items]
        answers = [[accepted(answer) for _, answer in item.metadata["questions"]] for item in items]
        found = self.panel.answer(images, questions, answers)
        return [soft_tifa(row, item.metadata["skills"]) for row, item in zip(found, items, strict=True)]


@dataclass(frozen=True)
class GivenScores:
    """The official evaluator's own output, a list of lists of probabilities in the order of the prompts, summed up our way."""

    scores: Sequence[Sequence[float]]
    version: str
    name: str = "geneval2"

    @classmethod
    def read(cls, path: Path) -> GivenScores:
        """Raises ValueError where the file is no list of lists of numbers in [0, 1]."""
        data = read_json(path)
        rows = data if isinstance(data, list) else []
        if not rows or not all(isinstance(row, list) and row and all(_is_probability(p) for p in row) for row in rows):
            raise ValueError(f"{path} must hold a list with one list of probabilities per prompt, as GenEval 2's evaluator writes it")
        return cls(rows, f"scores given by the user ({path.name})")

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        out = []
        for item in items:
            asked = item.metadata["questions"]
            row = self.scores[item.index] if item.index < len(self.scores) else []
            if len(row) != len(asked):
                raise ValueError(f"the scores given have {len(row)} numbers for prompt {item.index}, which has {len(asked)} questions")
            out.append(soft_tifa(row, item.metadata["skills"]))
        return out


def accepted(answer: str) -> list[str]:
    """The spellings that count as the answer. Raises ValueError for an answer that is neither yes nor a number word."""
    word = answer.strip().lower()
    if word == "yes":
        return ["Yes", "yes", " yes", " Yes"]
    if word not in NUMBERS:
        raise ValueError(f"the answers of GenEval 2 are yes and number words; got {answer!r}")
    spellings = [word, word.capitalize(), str(NUMBERS[word])]
    return [*spellings, *(f" {spelling}" for spelling in spellings)]


def soft_tifa(probabilities: Sequence[float], skills: Sequence[str]) -> Record:
    """A prompt's two means, and its probabilities by skill."""
    am = sum(probabilities) / len(probabilities)
    gm = math.exp(sum(map(math.log, probabilities)) / len(probabilities)) if min(probabilities) > 0 else 0.0
    return {
        "values": {"soft-tifa-gm": gm, "soft-tifa-am": am},
        "probabilities": [[s, p] for s, p in zip(skills, probabilities, strict=True)],
    }


def skills(rows: Sequence[Record]) -> dict[str, float]:
    """Skill -> 100 x the mean probability over all its questions, in alphabetical order."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for skill, p in row["detail"]["probabilities"]:
            found.setdefault(skill, []).append(p)
    return {skill: 100 * sum(values) / len(values) for skill, values in sorted(found.items())}


def write_official(folder: Path, rows: Sequence[Record], items: Sequence[Item]) -> None:
    """scores.json as the official evaluator writes it, image_paths.json as it reads it (prompt -> path), and a summary in percent.

    scores.json has one list for each prompt, in their order. Of several images of a prompt it holds each question's mean probability, and
    image_paths.json the first image, since both files have room for one.
    """
    write_json(folder / "image_paths.json", {item.prompt: str((folder / item.name).resolve()) for item in items if item.sample == 0})
    prompts: dict[int, list[list[float]]] = {}
    for row in rows:
        prompts.setdefault(row["index"], []).append([p for _, p in row["detail"]["probabilities"]])
    scores = [[sum(of_question) / len(images) for of_question in zip(*images, strict=True)] for images in prompts.values()]
    write_text(folder / "scores.json", json.dumps(scores) + "\n")
    lines = [f"{name}: {100 * sum(row['values'][name] for row in rows) / len(rows):.4f}" for name in rows[0]["values"]]
    atoms: dict[str, list[float]] = {}
    for row in rows:
        atoms.setdefault(row["tag"], []).append(row["values"]["soft-tifa-gm"])
    lines += [f"{tag} (GM): {100 * sum(values) / len(values):.4f}" for tag, values in atoms.items()]
    lines += [f"{skill} (AM): {value:.4f}" for skill, value in skills(rows).items()]
    write_text(folder / "geneval2_scores.txt", "\n".join(lines) + "\n")


def _is_probability(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= 1
