"""GenEval's results file and summary, as the official evaluator writes and prints them.

results.jsonl holds one row per image: filename, tag, prompt, correct, reason, and as JSON *strings* metadata (the prompt's row) and
details (class -> boxes [x1, y1, x2, y2, score] of the objects that counted). The headline is the unweighted mean of the task means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign.rules import Detection, Verdict

KEYS = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")


@dataclass(frozen=True)
class Score:
    """What the summary prints. `prompts` counts distinct metadata, `solved_prompts` those with at least one correct image.

    `tasks`: task -> (correct images, images), in order of first appearance.
    """

    images: int
    correct_images: int
    prompts: int
    solved_prompts: int
    tasks: Mapping[str, tuple[int, int]]

    @property
    def overall(self) -> float:
        """The unweighted mean of the task means, which differs from correct_images / images."""
        return float(np.mean([correct / images for correct, images in self.tasks.values()]))


def result_row(filename: str, metadata: Mapping[str, Any], verdict: Verdict, kept: Mapping[str, Sequence[Detection]]) -> dict[str, Any]:
    """One line of results.jsonl. `kept`: the detections that counted; classes without any are left out."""
    details = {name: [[*d.box, d.score] for d in found] for name, found in kept.items() if found}
    values = (filename, metadata["tag"], metadata["prompt"], verdict.correct, verdict.reason, json.dumps(metadata), json.dumps(details))
    return dict(zip(KEYS, values, strict=True))


def score(rows: Sequence[Mapping[str, Any]]) -> Score:
    """Counts over rows. Raises ValueError where there are none."""
    if not rows:
        raise ValueError("there are no results to summarise")
    tasks: dict[str, tuple[int, int]] = {}
    solved: dict[str, bool] = {}
    for row in rows:
        correct, images = tasks.get(row["tag"], (0, 0))
        tasks[row["tag"]] = (correct + bool(row["correct"]), images + 1)
        solved[row["metadata"]] = solved.get(row["metadata"], False) or bool(row["correct"])
    return Score(len(rows), sum(correct for correct, _ in tasks.values()), len(solved), sum(solved.values()), tasks)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The official summary, character for character."""
    total = score(rows)
    lines = [
        "Summary",
        "=======",
        f"Total images: {total.images}",
        f"Total prompts: {total.prompts}",
        f"% correct images: {total.correct_images / total.images:.2%}",
        f"% correct prompts: {total.solved_prompts / total.prompts:.2%}",
        "",
        "Task breakdown",
        "==============",
        *(f"{task:<16} = {correct / images:.2%} ({correct} / {images})" for task, (correct, images) in total.tasks.items()),
        "",
        f"Overall score (avg. over tasks): {total.overall:.5f}",
    ]
    return "\n".join(lines) + "\n"
