"""GenEval from items to official rows: prompts from the recipe, any detector and colour classifier, upstream's layout and results.

Paper: Ghosh et al. (arXiv 2310.11513). Official protocol: 553 prompts, 4 images each, detector Mask2Former Swin-S of mmdet 2.x. Upstream
re-seeds with the same number before every prompt, so that all prompts share four noises; here every image has a seed of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffalign.benchmarks.base import Benchmark, Item, Judgements, Models, Prompt, Record, Task, require_counts
from diffalign.benchmarks.context import Context
from diffalign.benchmarks.geneval.options import GenEvalOptions
from diffalign.benchmarks.geneval.prompts import metadata
from diffalign.benchmarks.geneval.results import result_row, summary
from diffalign.benchmarks.geneval.scorer import GenEvalScorer
from diffalign.benchmarks.geneval.weights import HUB_CLIP, load_scorer
from diffalign.files import write_text
from diffalign.rules import Detection, Verdict

SAMPLES = 4  # images per prompt of the official protocol


@dataclass(frozen=True)
class GenEvalBenchmark(Benchmark):
    """`limit` prompts (None: all 553), as many of each task as goes, with `samples` images each.

    source: the user's copy of the prompts, as `geneval.prompts.metadata` takes it; needed where NumPy's random stream has changed.
    detector, clip: what `with_judges` loads. Without a scorer it can only say what to generate.
    """

    scorer: GenEvalScorer | None = None
    samples: int = SAMPLES
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    source: str | Path | None = None
    detector: str | None = None
    clip: str = HUB_CLIP
    name: str = "geneval"

    __post_init__ = require_counts

    @classmethod
    def build(cls, options: GenEvalOptions, context: Context) -> GenEvalBenchmark:
        counts = {"samples": context.samples, "limit": context.limit, "seed": context.seed, "batch_size": context.judge_batch}
        return cls(**counts, source=options.prompts, detector=options.detector, clip=options.clip or HUB_CLIP)

    def prompts(self) -> list[Prompt]:
        return [Prompt(i, row["tag"], row["prompt"], row) for i, row in enumerate(metadata(self.source))]

    def with_judges(self, models: Models) -> GenEvalBenchmark:
        return replace(self, scorer=load_scorer(str(self.detector), self.clip, models.device))

    def tasks(self) -> list[Task]:
        if self.scorer is None:
            raise ValueError("judging GenEval needs a detector and a colour classifier; none were given")
        return [Task(self.scorer, self.items())]

    def row(self, item: Item, judged: Judgements) -> Record:
        """Upstream's."""
        ((_, score),) = judged.values()
        kept = {name: [Detection(tuple(box[:4]), box[4]) for box in boxes] for name, boxes in score["details"].items()}
        return result_row(item.name, item.metadata, Verdict(score["correct"], score["reason"]), kept)

    def protocol(self) -> Record:
        version = self.scorer.version if self.scorer else None
        limits = asdict(self.scorer.limits) if self.scorer else None
        limited = self.limited()
        head = {"limited": limited} if limited else {"prompts": "553"}
        return {**head, "images per prompt": self.samples, "scorer": version, "limits": limits}

    def official(self, folder: Path, rows: Sequence[Record]) -> None:
        write_text(folder / "summary.txt", summary(rows))
