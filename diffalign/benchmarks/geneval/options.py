"""What `diffalign bench geneval` takes besides the options of every run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.context import Context
from diffalign.options import option

OFFICIAL_URL = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
)


@dataclass(frozen=True)
class GenEvalOptions:
    """The judge's weights, and the prompts where NumPy draws other ones."""

    detector: str | None = option(None, "the official .pth file, or hf, or a folder", metavar="PLACE")
    clip: str | None = option(None, "another CLIP ViT-L/14: hub id or folder", metavar="PLACE")
    prompts: str | None = option(None, "the released file, where NumPy draws others", metavar="PLACE")

    def check(self, context: Context) -> None:
        if not context.judges or (self.detector and (self.detector == "hf" or Path(self.detector).exists())):
            return
        got = f"{self.detector} does not exist" if self.detector else "none was given"
        raise ValueError(f"--detector is needed to judge, and {got}: the official file ({OFFICIAL_URL}), or hf for another training of it")
