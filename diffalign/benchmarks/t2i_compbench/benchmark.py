"""T2I-CompBench(++) from items to rows: prompts from the user's clone, upstream's layout and file names, a scorer per category.

Papers: Huang et al., T2I-CompBench and T2I-CompBench++ (arXiv 2307.06350). The paper's protocol is 10 images for each of the 300 val
prompts of a category. A run folder holds CATEGORY/samples/PROMPT_000012.png, so upstream's evaluators take a category's folder as theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.benchmarks.base import Item, item_seed, limited_to, spread_over_tasks
from diffalign.benchmarks.scoring import Fault, Scorer, Task, collect_all, score_all
from diffalign.benchmarks.t2i_compbench.prompts import CATEGORIES, IMAGES_PER_PROMPT, PromptList, file_name, read_prompts
from diffalign.benchmarks.t2i_compbench.three_in_one import Kinds, three_in_one
from diffalign.files import write_json, write_text

COMPLEX = "complex"
PARTS_OF_COMPLEX = ("blip-vqa", "2d-spatial", "clip-score")


@dataclass(frozen=True)
class T2ICompBench:
    """`limit` prompts over all categories (None: all), as many of each as goes, with `samples` images each.

    source: a clone of T2I-CompBench or its examples/dataset. scorers: category -> its scorers, one each, and for "complex" the three parts
    of 3-in-1; `kinds` says which of them a complex prompt takes. Without scorers it can only say what to generate.
    """

    source: str | Path
    categories: Sequence[str] = tuple(CATEGORIES)
    samples: int = IMAGES_PER_PROMPT
    limit: int | None = None
    seed: int = 0
    split: str = "val"
    scorers: Mapping[str, Sequence[Scorer]] = field(default_factory=dict)
    kinds: Kinds | None = None
    batch_size: int = 8
    allow_missing: bool = False
    name: str = "t2i-compbench"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1; got {self.samples}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 prompt; got {self.limit}")
        if not self.categories or len(set(self.categories)) != len(self.categories):
            raise ValueError(f"categories must be at least one, each once; got {list(self.categories)}")

    def lists(self) -> dict[str, PromptList]:
        return {category: read_prompts(self.source, category, self.split) for category in self.categories}

    def items(self) -> list[Item]:
        rows = [(category, number, prompt) for category, found in self.lists().items() for number, prompt in enumerate(found.prompts)]
        order = list(CATEGORIES)
        out = []
        for row in spread_over_tasks([category for category, _, _ in rows], self.limit):
            category, number, prompt = rows[row]
            # The index tells categories apart, so that a prompt's seed does not depend on which categories are run.
            index = order.index(category) * 100_000 + number
            for sample in range(self.samples):
                path = f"{category}/samples/{file_name(prompt, number * self.samples + sample)}"
                out.append(Item(index, sample, item_seed(self.seed, index, sample), category, prompt, {"prompt": prompt}, path))
        return out

    def limited(self) -> str | None:
        """What a figure of fewer than all prompts must be quoted with."""
        return limited_to([category for category, found in self.lists().items() for _ in found.prompts], self.limit)

    def tasks(self) -> list[Task]:
        """What there is to judge. Raises ValueError for a category without its scorers."""
        items = self.items()
        tasks = []
        for category in self.categories:
            scorers = self.scorers.get(category, ())
            names = [scorer.name for scorer in scorers]
            if not scorers or (category == COMPLEX and (sorted(names) != sorted(PARTS_OF_COMPLEX) or self.kinds is None)):
                needed = f"{', '.join(PARTS_OF_COMPLEX)} and the lists of kinds" if category == COMPLEX else CATEGORIES[category].scorer
                raise ValueError(f"judging {category} needs {needed}; got {', '.join(names) or 'none'}")
            positions = [position for position, item in enumerate(items) if item.task == category]
            tasks += [Task(scorer, [items[position] for position in positions], positions) for scorer in scorers]
        return tasks

    def score(self, folder: Path) -> list[dict[str, Any]]:
        """Judges what has not been judged; one row per item in their order: filename, index, tag, prompt, value, scorer, detail.

        Raises FileNotFoundError naming images that are missing or cut short, unless they are allowed.
        """
        return score_all(self, folder)

    def judged(self, folder: Path) -> tuple[list[dict[str, Any]], list[Fault]]:
        """Rows of what has been judged by all its scorers, by whichever shard, and what has not."""
        found, faults = collect_all(self.tasks(), folder)
        items = self.items()
        rows = [self._row(item, found[item.name]) for item in items if item.name not in faults]
        return rows, [faults[item.name] for item in items if item.name in faults]

    def _row(self, item: Item, scores: Mapping[str, tuple[Scorer, Any]]) -> dict[str, Any]:
        row = {"filename": item.name, "index": item.index, "tag": item.task, "prompt": item.prompt}
        if item.task != COMPLEX:
            ((scorer, score),) = scores.values()
            detail = {name: value for name, value in score.items() if name != "value"}
            return {**row, "value": score["value"], "scorer": scorer.version, "detail": detail}
        values = {name: score["value"] for name, (_, score) in scores.items()}
        kind = self.kinds.kind(item.prompt)
        value = three_in_one(kind, values["blip-vqa"], values["2d-spatial"], values["clip-score"])
        version = "3-in-1 of " + "; ".join(scorer.version for scorer, _ in scores.values())
        return {**row, "value": value, "scorer": version, "detail": {"kind": kind, **values}}

    def protocol(self) -> dict[str, Any]:
        """What a figure of this run must be quoted with, and whether it follows the paper's protocol."""
        lists = self.lists()
        limited = self.limited()
        official = not limited and self.samples == IMAGES_PER_PROMPT and self.split == "val"
        return {
            **({"limited": limited} if limited else {}),
            "protocol": "the paper's (300 val prompts x 10 images)" if official and all(x.is_official for x in lists.values()) else "other",
            "split": self.split,
            "prompt lists": {category: found.version for category, found in lists.items()},
            **({} if limited else {"prompts": "all"}),
            "images per prompt": self.samples,
            "scorers": {category: [scorer.version for scorer in self.scorers.get(category, ())] for category in self.categories},
        }


def write_upstream_results(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Writes each category's scores where upstream's evaluators write theirs, and its average beside. BLIP-VQA's answers are text there."""
    written = []
    for category in dict.fromkeys(row["tag"] for row in rows):
        facts = CATEGORIES[category]
        place = folder / category / facts.result
        place.mkdir(parents=True, exist_ok=True)
        as_text = facts.scorer == "BLIP-VQA"
        answers = [
            {"question_id": number, "answer": f"{row['value']:.4f}" if as_text else row["value"]}
            for number, row in sorted((int(Path(row["filename"]).stem.rpartition("_")[2]), row) for row in rows if row["tag"] == category)
        ]
        write_json(place / "vqa_result.json", answers)
        total, number = sum(float(answer["answer"]) for answer in answers), len(answers)
        write_text(place / facts.average, facts.average_text.format(total=total, number=number, average=total / number))
        written.append(place / "vqa_result.json")
    return written
