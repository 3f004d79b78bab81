"""What the simulated annotator says it sees in a generated image: short captions, one in ten of them of another image of the same prompt.

The annotator is the judge: its detector names things, colours and places, and captions are drawn from these as they are from scenes. As
with votes, nothing is said that names a held-out pair or is a prompt of validation or test under any carrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from transformers import CLIPTokenizer

from diffalign.benchmarks.geneval_rules import keep
from diffalign.shapes.detector import LIMITS, classify_color, detect
from diffalign.shapes.scenes import Scene
from diffalign.shapes.train import rewards_captions as captions
from diffalign.shapes.train import rewards_scenes as worlds
from diffalign.shapes.train.judged import reserved_bodies

CAPTIONS = 2  # of each image
TRIES = 8  # drawn for each of these, until one may be said


@dataclass(frozen=True)
class Seen:
    """A thing as the detector sees it: what captions ask of a `scenes.Thing`."""

    shape: str
    color: str
    box: tuple[float, float, float, float]


@dataclass
class Descriptions:
    """Token ids of CAPTIONS captions of every image, the rows of `blocked_words` at each, and which there are."""

    ids: Int[Tensor, "n g c l"]
    blocked: UInt8[Tensor, "n g c k"]
    known: Bool[Tensor, "n g c"]


def seen_in(image: UInt8[np.ndarray, "h w 3"]) -> tuple[Seen, ...]:
    """The things that the judge counts in an image; none where it counts more of one shape than captions have numbers for."""
    found = {shape: keep(those, LIMITS.threshold, LIMITS) for shape, those in detect(image).items()}
    if any(len(those) > worlds.MOST_THINGS for those in found.values()):
        return ()
    return tuple(Seen(shape, classify_color(image, d.mask), d.box) for shape, those in found.items() for d in those)


def may_be_said(caption: str) -> bool:
    """Whether it is a caption that training may learn from a verdict."""
    return worlds.claim_allowed(worlds.read_claim(caption)) and worlds.split_carrier(caption)[1] not in reserved_bodies()


def described(images: UInt8[Tensor, "n g h w 3"], tokenizer: CLIPTokenizer, seed: int, flipped: float) -> Descriptions:
    """Captions of every image; a share `flipped` of them is of another image of the group. The same seed gives the same ones."""
    rng = np.random.default_rng([seed, 23])
    n, g = images.shape[:2]
    texts: list[str] = []
    for group in images.numpy():
        things = [seen_in(image) for image in group]
        for i in range(g):
            for _ in range(CAPTIONS):
                mistaken = g > 1 and rng.random() < flipped
                shown = (i + int(rng.integers(1, g))) % g if mistaken else i
                texts.append(_caption(rng, things[shown]))
    length = tokenizer.model_max_length
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    rows = torch.tensor([captions.blocked_rows(text, length - 1) for text in texts], dtype=torch.uint8)
    shape = (n, g, CAPTIONS)
    return Descriptions(ids.view(*shape, -1), rows.view(*shape, -1), torch.tensor([bool(text) for text in texts]).view(shape))


def _caption(rng: np.random.Generator, things: Sequence[Seen]) -> str:
    """A caption of what was seen, or nothing where none was found that may be said."""
    for _ in range(TRIES if things else 0):
        caption = captions.true_caption(rng, Scene(tuple(things)))
        if may_be_said(caption):
            return caption
    return ""
