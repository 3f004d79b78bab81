"""DPG-Bench from images to scores: its questions put to a judge, its 2 x 2 grids, its categories. The rules are in dpg.py.

The published judge is mPLUG-large of ModelScope, which needs fairseq. Any other answers otherwise, so its scores are on another scale and
carry its name; the original's answers, or anyone's, can be given as a file. Of a judge that gives probabilities, "yes" is above one half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffalign.benchmarks.base import Item, Pixels, Record
from diffalign.benchmarks.dpg.questions import Questions, category_scores, from_grid, image_score, to_grid
from diffalign.benchmarks.models.vqa import GivenAnswers, Panel
from diffalign.files import whole_file, write_text
from diffalign.images import read_pixels

SUFFIX = " Please answer yes or no."  # for a model that talks


@dataclass(frozen=True)
class DpgScorer:
    """questions: item id -> its questions. Score: the share of questions answered yes whose parents are, and the raw answers."""

    answers: Panel | GivenAnswers
    questions: Mapping[str, Questions]
    name: str = "dpg"

    @property
    def version(self) -> str:
        return f"DPG-Bench's questions to {self.answers.version} (the published judge is mPLUG-large: another scale)"

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        asked = [self.questions[item.metadata["item_id"]] for item in items]
        suffix = SUFFIX if isinstance(self.answers, Panel) else ""
        found = self.answers.ask(images, items, [[text + suffix for text in each.text.values()] for each in asked])
        out = []
        for questions, probabilities in zip(asked, found, strict=True):
            answers = {number: "yes" if p > 0.5 else "no" for number, p in zip(questions.text, probabilities, strict=True)}
            score = image_score(questions.parents, answers)
            out.append({"values": {"dpg": score}, "answers": [[number, answer] for number, answer in answers.items()]})
        return out


def require_questions(questions: Mapping[str, Questions], items: Sequence[Item]) -> None:
    """Raises ValueError naming an item that has no questions."""
    missing = sorted({item.metadata["item_id"] for item in items} - set(questions))
    if missing:
        raise ValueError(
            f"there are no questions about {len(missing)} prompts, such as {missing[0]}; use the dpg_bench.csv of the same release"
        )


def categories(rows: Sequence[Record], questions: Mapping[str, Questions]) -> dict[str, float]:
    """Category -> 100 x the share of yes over all images; broad ones first. Upstream takes the last image of each prompt alone."""
    answers: dict[str, list[dict[int, str]]] = {}
    for row in rows:
        item = row["filename"].split("/")[0]
        answers.setdefault(item, []).append(dict(row["detail"]["answers"]))
    return category_scores(questions, answers)


def write_grids(items: Sequence[Item], folder: Path) -> int:
    """grids/ITEM_ID.png of every prompt whose images are there, one or four, as upstream's evaluator reads them. Returns how many."""
    written = 0
    for paths in _by_prompt(items, folder).values():
        if len(paths) not in (1, 4) or not all(path.is_file() for path in paths):
            continue
        target = folder / "grids" / f"{paths[0].parent.parent.name}.png"
        target.parent.mkdir(exist_ok=True)
        if target.is_file() and target.stat().st_mtime >= max(path.stat().st_mtime for path in paths):
            continue
        grid = to_grid([Image.fromarray(read_pixels(path)) for path in paths])
        with whole_file(target) as temporary:
            grid.save(temporary, format="PNG")
        written += 1
    return written


def cut_grids(items: Sequence[Item], grids: Path, folder: Path) -> None:
    """The reverse, for grids of another program: `grids`/ITEM_ID.png to single images in `folder`, where they are judged.

    A missing grid is left to the judge to name. Raises ValueError where a grid cannot be cut.
    """
    for paths in _by_prompt(items, folder).values():
        source = grids / f"{paths[0].parent.parent.name}.png"
        if not source.is_file() or all(path.is_file() for path in paths):
            continue
        try:
            tiles = from_grid(Image.fromarray(read_pixels(source)), len(paths))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, tile in zip(paths, tiles, strict=True):
            with whole_file(path) as temporary:
                tile.save(temporary, format="PNG")


def write_official(folder: Path, rows: Sequence[Record], found: Mapping[str, float]) -> None:
    """dpg_scores.txt: the score and its categories as percentages, the way papers quote them."""
    per_item: dict[str, list[float]] = {}
    for row in rows:
        per_item.setdefault(row["filename"].split("/")[0], []).append(row["values"]["dpg"])
    mean = 100 * sum(sum(values) / len(values) for values in per_item.values()) / len(per_item)
    lines = [f"DPG-Bench score: {mean:.4f}", *(f"{name}: {value:.4f}" for name, value in found.items())]
    write_text(folder / "dpg_scores.txt", "\n".join(lines) + "\n")


def _by_prompt(items: Sequence[Item], folder: Path) -> dict[int, list[Path]]:
    paths: dict[int, list[Path]] = {}
    for item in items:
        paths.setdefault(item.index, []).append(item.image_path(folder))
    return paths
