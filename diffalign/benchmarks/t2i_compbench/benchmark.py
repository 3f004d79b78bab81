"""T2I-CompBench(++) from items to rows: prompts from the user's clone, upstream's layout and file names, a scorer per category.

Papers: Huang et al., T2I-CompBench and T2I-CompBench++ (arXiv 2307.06350). The paper's protocol is 10 images for each of the 300 val
prompts of a category. A run folder holds CATEGORY/samples/PROMPT_000012.png, so upstream's evaluators take a category's folder as theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffalign.benchmarks.base import Benchmark, Item, Judgements, Models, Prompt, Record, Scorer, Task, require_counts
from diffalign.benchmarks.context import Context
from diffalign.benchmarks.t2i_compbench.judges import NEED_PHRASES, find_annotations, load_scorers
from diffalign.benchmarks.t2i_compbench.language import Annotations
from diffalign.benchmarks.t2i_compbench.options import T2IOptions
from diffalign.benchmarks.t2i_compbench.prompts import CATEGORIES, IMAGES_PER_PROMPT, PromptList, file_name, read_prompts
from diffalign.benchmarks.t2i_compbench.three_in_one import Kinds, three_in_one
from diffalign.files import write_json, write_text

COMPLEX = "complex"
PARTS_OF_COMPLEX = ("blip-vqa", "2d-spatial", "clip-score")


@dataclass(frozen=True)
class T2ICompBench(Benchmark):
    """`limit` prompts over all categories (None: all), as many of each as goes, with `samples` images each.

    source: a clone of T2I-CompBench or its examples/dataset. scorers: category -> its scorers, one each, and for "complex" the three parts
    of 3-in-1; `kinds` says which of them a complex prompt takes. Without scorers it can only say what to generate. options, out: what
    `with_judges` loads, and where phrases are kept.
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
    options: T2IOptions = T2IOptions()
    context: Context | None = None
    name: str = "t2i-compbench"

    def __post_init__(self) -> None:
        require_counts(self)
        if not self.categories or len(set(self.categories)) != len(self.categories):
            raise ValueError(f"categories must be at least one, each once; got {list(self.categories)}")

    @classmethod
    def build(cls, options: T2IOptions, context: Context) -> T2ICompBench:
        counts = {"samples": context.samples, "limit": context.limit, "seed": context.seed, "batch_size": context.judge_batch}
        return cls(str(options.prompts), options.category, **counts, split=options.split, options=options, context=context)

    def lists(self) -> dict[str, PromptList]:
        return {category: read_prompts(self.source, category, self.split) for category in self.categories}

    def prompts(self) -> list[Prompt]:
        """The index tells categories apart, so that a prompt's seed does not depend on which categories are run."""
        order = list(CATEGORIES)
        return [
            Prompt(
                order.index(category) * 100_000 + number,
                category,
                prompt,
                {"prompt": prompt},
                lambda sample, at=(category, prompt, number): f"{at[0]}/samples/{file_name(at[1], at[2] * self.samples + sample)}",
            )
            for category, found in self.lists().items()
            for number, prompt in enumerate(found.prompts)
        ]

    def settings(self) -> Record:
        """The lists, and the number of images, which names the files."""
        return {"samples": self.samples, "prompt lists": {category: found.version for category, found in self.lists().items()}}

    def ready(self) -> None:
        if self.context and self.context.judges:
            self.annotations()

    def annotations(self) -> Annotations | None:
        """Phrases and tags of the prompts that need them: from --phrases, else from OUT/phrases.json, which spaCy makes the first time.

        None where no category needs them. Raises ValueError where a prompt is not in the file, ImportError without file and spaCy.
        """
        out = self.context.out if self.context else Path()
        prompts = dict.fromkeys(item.prompt for item in self.items() if CATEGORIES[item.task].scorer in NEED_PHRASES)
        return find_annotations(list(prompts), self.options.phrases, out / "phrases.json")

    def with_judges(self, models: Models) -> T2ICompBench:
        scorers, kinds = load_scorers(self.options, self.categories, self.source, self.annotations(), models.device)
        return replace(self, scorers=scorers, kinds=kinds)

    def tasks(self) -> list[Task]:
        """Raises ValueError for a category without its scorers."""
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

    def row(self, item: Item, judged: Judgements) -> Record:
        row = {"filename": item.name, "index": item.index, "tag": item.task, "prompt": item.prompt}
        if item.task != COMPLEX:
            ((scorer, score),) = judged.values()
            detail = {name: value for name, value in score.items() if name != "value"}
            return {**row, "value": score["value"], "scorer": scorer.version, "detail": detail}
        values = {name: score["value"] for name, (_, score) in judged.items()}
        kind = self.kinds.kind(item.prompt)
        value = three_in_one(kind, values["blip-vqa"], values["2d-spatial"], values["clip-score"])
        version = "3-in-1 of " + "; ".join(scorer.version for scorer, _ in judged.values())
        return {**row, "value": value, "scorer": version, "detail": {"kind": kind, **values}}

    def protocol(self) -> Record:
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

    def official(self, folder: Path, rows: Sequence[Record]) -> None:
        write_upstream_results(folder, rows)


def write_upstream_results(folder: Path, rows: Sequence[Record]) -> list[Path]:
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
