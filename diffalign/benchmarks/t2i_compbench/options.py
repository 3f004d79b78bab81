"""What `diffalign bench t2i-compbench` takes besides the options of every run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.context import Context
from diffalign.options import option

SPLITS = ("val", "val_seen", "val_unseen", "train")
CATEGORY_NAMES = ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex")
HOME = "the folder of your clone of https://github.com/Karine-Huang/T2I-CompBench"


@dataclass(frozen=True)
class T2IOptions:
    """Prompts, and the models that judge the categories."""

    prompts: str | None = option(None, "your clone of the benchmark, or its raw URL", metavar="DIR")
    category: tuple[str, ...] = option(
        CATEGORY_NAMES, "which categories (default: all eight)", choices=CATEGORY_NAMES, many=True, metavar="NAME"
    )
    split: str = option("val", "which prompts", choices=SPLITS)
    detector: str = option("owlv2", "owlv2, grounding-dino, or a folder of either", metavar="PLACE", advanced=True)
    clip: str | None = option(None, "another hub id or folder of CLIP ViT-B/32", metavar="PLACE", advanced=True)
    blip: str | None = option(None, "another hub id or folder of BLIP-VQA", metavar="PLACE", advanced=True)
    depth: str | None = option(None, "another hub id or folder of DPT-hybrid", metavar="PLACE", advanced=True)
    phrases: Path | None = option(
        None, "phrases of the prompts (default: OUT/phrases.json, by spaCy)", parse=Path, metavar="FILE.json", advanced=True
    )
    detections: Path | None = option(None, "your detector's boxes instead of --detector", parse=Path, metavar="FILE.json", advanced=True)

    def check(self, context: Context) -> None:
        if not self.prompts:
            raise ValueError(f"--prompts is needed: {HOME}")
