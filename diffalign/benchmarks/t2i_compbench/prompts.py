"""T2I-CompBench's categories, its prompt lists as they lie in the user's clone, and the names that its evaluators read files by.

Nothing is copied into this package: `source` is a clone of Karine-Huang/T2I-CompBench (MIT), its examples/dataset folder, or a URL of one.
Each list is identified by the hash of its prompts, since they change: five of the 300 colour prompts were replaced on 2025-09-03, and every
colour score published before used the older list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.sources import read_source, version_of
from diffalign.benchmarks.t2i_compbench.options import SPLITS

UPSTREAM = "https://github.com/Karine-Huang/T2I-CompBench"
IMAGES_PER_PROMPT = 10  # the paper's protocol, on the 300 prompts of the val split


@dataclass(frozen=True)
class Category:
    """One category, and where upstream's evaluator of it leaves what."""

    name: str
    scorer: str  # what upstream judges it by
    result: str  # the folder, inside the category's, that its scores are written to
    average: str  # the file in it that holds their average
    average_text: str = "score avg:{average}"  # what that file says
    plus_plus: bool = False  # only in T2I-CompBench++


_BLIP = ("annotation_blip", "blip_vqa_score.txt", "BLIP-VQA score:{average}")
CATEGORIES: dict[str, Category] = {
    category.name: category
    for category in (
        Category("color", "BLIP-VQA", *_BLIP),
        Category("shape", "BLIP-VQA", *_BLIP),
        Category("texture", "BLIP-VQA", *_BLIP),
        Category("spatial", "2D spatial", "labels/annotation_obj_detection_2d", "avg_score.txt"),
        Category("3d_spatial", "3D spatial", "labels/annotation_obj_detection_3d", "avg_result.txt", "avg score is {average}", True),
        Category("non_spatial", "CLIPScore", "annotation_clip", "score_avg.txt"),
        Category("numeracy", "numeracy", "annotation_num", "score.txt", "total:{total} num:{number} avg:{average}", True),
        Category("complex", "3-in-1", "annotation_3_in_1", "vqa_score.txt"),
    )
}

# First 16 digits of the sha256 of the prompts, joined by newlines -> what the list is called in results.
KNOWN_LISTS = {
    "c735840f3de60531": "color val of 2025-09-03",
    "722d31a76d08f4c4": "color val before 2025-09-03",
    "bf557e22414dbc69": "shape val",
    "fa60c83f215a8753": "texture val",
    "ae35e77cafeffb07": "spatial val",
    "c9953597315f36a5": "3d_spatial val",
    "2b9c2b1a26350308": "non_spatial val",
    "dad8df141604b70b": "numeracy val",
    "e23a7dfb80d4a4ee": "complex val",
}


@dataclass(frozen=True)
class PromptList:
    """Prompts in file order, and which list they are: its known name, or "unknown list" with the hash."""

    prompts: tuple[str, ...]
    version: str

    @property
    def is_official(self) -> bool:
        return self.version in KNOWN_LISTS.values()


def read_prompts(source: str | Path, category: str, split: str = "val") -> PromptList:
    """The prompts of a category. Raises ValueError for an unknown category or split, or prompts that cannot be file names."""
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)}; got {category!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    prompts = read_lines(source, f"{category}_{split}.txt")
    for prompt in prompts:
        if "_" in prompt or "/" in prompt:
            raise ValueError(f"prompts become file names in which '_' and '/' have a meaning, so none may hold them; got {prompt!r}")
    digest = version_of(prompts)
    return PromptList(tuple(prompts), KNOWN_LISTS.get(digest, f"unknown list {digest}"))


def read_lines(source: str | Path, file: str) -> list[str]:
    """The lines of one of upstream's lists that are not blank. Raises FileNotFoundError saying where it was looked for."""
    if Path(source).is_file():
        raise NotADirectoryError(f"T2I-CompBench's prompts are several files; give the folder of a clone of {UPSTREAM}, not {source}")
    text = read_source(source, (file, f"examples/dataset/{file}"), UPSTREAM)
    return [line.strip() for line in text.splitlines() if line.strip()]


def file_name(prompt: str, number: int) -> str:
    """ "PROMPT_000012.png": `number` runs over all images of the category, prompt by prompt."""
    return f"{prompt}_{number:06d}.png"
