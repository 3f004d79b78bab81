"""Objects by name, found by detectors that take any word: OWLv2 and Grounding DINO of transformers. They stand in for UniDet.

T2I-CompBench's own detector, UniDet, needs detectron2 and has code under a non-commercial licence. These differ from it:

- they look for the words of the prompt, so every word can be found; UniDet's 722 labels lack 9 of the 50 words of the spatial prompts,
  which caps that category at 0.667. Scores are therefore **not comparable** with published ones, and carry the detector's name;
- their confidences are on other scales, so the threshold is theirs, not UniDet's 0.5;
- they propose overlapping boxes of one thing, so boxes of one word are thinned (IoU below 0.5) before anything is counted.

Papers: Minderer et al., "Scaling Open-Vocabulary Object Detection" (arXiv 2306.09683); Liu et al., "Grounding DINO" (arXiv 2303.05499).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffalign.benchmarks.base import Pixels
from diffalign.benchmarks.models.pretrained import load_model, load_part
from diffalign.benchmarks.t2i_compbench.detections import Labelled, best_first, overlap, to_frame

HUB_OWLV2 = "google/owlv2-base-patch16-ensemble"
HUB_GROUNDING_DINO = "IDEA-Research/grounding-dino-tiny"
LARGEST_OVERLAP = 0.5


@dataclass
class OpenVocabulary:
    """What both detectors are made of, and how they are called."""

    model: Any
    processor: Any
    version: str

    def __post_init__(self) -> None:
        self.model.eval()

    @torch.no_grad()
    def __call__(self, images: Sequence[Pixels], words: Sequence[Sequence[str]]) -> list[list[Labelled]]:
        """The objects of each image that its words name, best first, in the frame of the rules."""
        return [self._find(image, list(wanted)) for image, wanted in zip(images, words, strict=True)]

    def _find(self, image: Pixels, words: list[str]) -> list[Labelled]:
        raise NotImplementedError


@dataclass
class Owlv2(OpenVocabulary):
    """model: Owlv2ForObjectDetection; processor: its Owlv2Processor. Objects scoring above `threshold` are returned."""

    threshold: float = 0.2

    def _find(self, image: Pixels, words: list[str]) -> list[Labelled]:
        if not words:
            return []
        inputs = self.processor(text=[[f"a photo of a {word}" for word in words]], images=Image.fromarray(image), return_tensors="pt")
        output = self.model(**inputs.to(self.model.device))
        # The image is padded to a square on the right and at the bottom, so boxes are fractions of its long side.
        side = max(image.shape[:2])
        return labelled(output.logits[0].sigmoid(), corners(output.pred_boxes[0]) * side, words, self.threshold, image)


@dataclass
class GroundingDino(OpenVocabulary):
    """model: GroundingDinoForObjectDetection; processor: its GroundingDinoProcessor. Objects scoring above `threshold` are returned."""

    threshold: float = 0.3

    def _find(self, image: Pixels, words: list[str]) -> list[Labelled]:
        if not words:
            return []
        text = " ".join(f"{word.lower()}." for word in words)
        inputs = self.processor(text=text, images=Image.fromarray(image), return_tensors="pt").to(self.model.device)
        output = self.model(**inputs)
        scores = output.logits[0].sigmoid()
        # A word's score is that of its best token.
        columns = [scores[:, tokens].amax(1) for tokens in self._tokens(text, words)]
        height, width = image.shape[:2]
        boxes = corners(output.pred_boxes[0]) * torch.tensor([width, height, width, height], device=scores.device)
        return labelled(torch.stack(columns, dim=1), boxes, words, self.threshold, image)

    def _tokens(self, text: str, words: Sequence[str]) -> list[list[int]]:
        """The positions of each word's tokens in the text."""
        spans = self.processor.tokenizer(text, return_offsets_mapping=True).offset_mapping
        out, start = [], 0
        for word in words:
            end = start + len(word)
            out.append([i for i, (a, b) in enumerate(spans) if a < end and b > start])
            start = end + 2  # the full stop and the blank
        return out


def corners(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """[centre x, centre y, width, height] to [x1, y1, x2, y2]."""
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)


def labelled(
    scores: Float[Tensor, "n w"], boxes: Float[Tensor, "n 4"], words: Sequence[str], threshold: float, image: Pixels
) -> list[Labelled]:
    """Each box under its best word, if above the threshold; cut to the image, thinned, best first, in the frame of the rules.

    Raises FloatingPointError where scores are not finite: silence would read as an empty image.
    """
    if not (torch.isfinite(scores).all() and torch.isfinite(boxes).all()):
        raise FloatingPointError("the detector's scores are not finite; run it in float32")
    height, width = image.shape[:2]
    best, word = scores.max(1)
    found = []
    for i in (best > threshold).nonzero().flatten().tolist():
        x1, y1, x2, y2 = boxes[i].tolist()
        box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        if box[0] < box[2] and box[1] < box[3]:
            found.append(Labelled(words[int(word[i])], best[i].item(), to_frame(box, width, height)))
    return thinned(best_first(found))


def thinned(objects: Sequence[Labelled]) -> list[Labelled]:
    """Without those that overlap a better one of the same label."""
    kept: list[Labelled] = []
    for found in objects:
        if all(other.label != found.label or overlap(other.box, found.box) < LARGEST_OVERLAP for other in kept):
            kept.append(found)
    return kept


def load_detector(source: str, device: str = "cpu") -> Owlv2 | GroundingDino:
    """ "owlv2", "grounding-dino", or a hub id or folder of either. Raises ValueError for another architecture or missing tensors."""
    from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

    name = {"owlv2": HUB_OWLV2, "grounding-dino": HUB_GROUNDING_DINO}.get(source, source)
    kinds = {"owlv2": Owlv2, "grounding-dino": GroundingDino}
    kind = load_part(AutoConfig, name).model_type
    if kind not in kinds:
        raise ValueError(f"the open-vocabulary detector must be an OWLv2 or a Grounding DINO; {name} is a {kind}")
    model = load_model(AutoModelForZeroShotObjectDetection, name, device)
    return kinds[kind](model, load_part(AutoProcessor, name), f"open-vocabulary detector {name}")
