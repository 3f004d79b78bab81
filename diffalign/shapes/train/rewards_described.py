"""What the simulated annotator says of a generated image beside its votes: short captions, and regions it marks.

The annotator is the judge. Captions are drawn from what its detector counts as they are from scenes; a share of them is of another image
of the same prompt. As with votes, nothing is said that names a held-out pair or is a prompt of validation or test under any carrier.
Regions are the detector's: each is of a shape or of none that counts, and of a colour; a share of them is named at random. That
annotators mark what is wrong in generated images, and that a reward learns from it, is from Liang et al., "Rich Human Feedback for
Text-to-Image Generation" (arXiv 2312.10240).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from transformers import CLIPTokenizer

from diffalign.rules import keep
from diffalign.shapes.detector import LIMITS, classify_color, detect
from diffalign.shapes.scenes import COLORS, SHAPES, Scene
from diffalign.shapes.train import rewards_captions as captions
from diffalign.shapes.train import rewards_scenes as worlds
from diffalign.shapes.train.judged import reserved_bodies

COLOR_NAMES = tuple(COLORS)
NO_SHAPE = len(SHAPES) + 1  # of a region that the judge does not count; 0 is the ground
KINDS, HUES = len(SHAPES) + 2, len(COLORS) + 1  # classes of regions: ground, shapes, no shape; ground, colours
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
    """Token ids of CAPTIONS captions of every image, the rows of `blocked_words` at each, which there are; and the regions.

    A pixel of `regions` is HUES x kind + hue of the region it belongs to.
    """

    ids: Int[Tensor, "n g c l"]
    blocked: UInt8[Tensor, "n g c k"]
    known: Bool[Tensor, "n g c"]
    regions: UInt8[Tensor, "n g h w"]


def look(image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, flipped: float) -> tuple[tuple[Seen, ...], UInt8[np.ndarray, "h w"]]:
    """The things that the judge counts in an image, and its map of regions, a share `flipped` of which is named at random.

    No things where it counts more of one shape than captions have numbers for.
    """
    things: list[Seen] = []
    regions = np.zeros(image.shape[:2], dtype=np.uint8)
    for shape, those in detect(image).items():
        counted = keep(those, LIMITS.threshold, LIMITS)
        for one in those:
            color = classify_color(image, one.mask)
            accepted = any(one is other for other in counted)
            kind = SHAPES.index(shape) + 1 if accepted else NO_SHAPE
            if accepted:
                things.append(Seen(shape, color, one.box))
            if rng.random() < flipped:
                kind = int(rng.integers(1, KINDS))
            regions[one.mask] = HUES * kind + COLOR_NAMES.index(color) + 1
    most = max((sum(t.shape == shape for t in things) for shape in SHAPES), default=0)
    return (tuple(things) if most <= worlds.MOST_THINGS else ()), regions


def may_be_said(caption: str) -> bool:
    """Whether it is a caption that training may learn from a verdict."""
    return worlds.claim_allowed(worlds.read_claim(caption)) and worlds.split_carrier(caption)[1] not in reserved_bodies()


def described(images: UInt8[Tensor, "n g h w 3"], tokenizer: CLIPTokenizer, seed: int, flipped: float) -> Descriptions:
    """Captions of every image; a share `flipped` of them is of another image of the group. The same seed gives the same ones."""
    rng = np.random.default_rng([seed, 23])
    n, g = images.shape[:2]
    texts: list[str] = []
    maps: list[np.ndarray] = []
    for group in images.numpy():
        looks = [look(image, rng, flipped) for image in group]
        things = [seen for seen, _ in looks]
        maps += [regions for _, regions in looks]
        for i in range(g):
            for _ in range(CAPTIONS):
                mistaken = g > 1 and rng.random() < flipped
                shown = (i + int(rng.integers(1, g))) % g if mistaken else i
                texts.append(_caption(rng, things[shown]))
    length = tokenizer.model_max_length
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    rows = torch.tensor([captions.blocked_rows(text, length - 1) for text in texts], dtype=torch.uint8)
    shape = (n, g, CAPTIONS)
    known = torch.tensor([bool(text) for text in texts]).view(shape)
    return Descriptions(ids.view(*shape, -1), rows.view(*shape, -1), known, torch.from_numpy(np.stack(maps)).unflatten(0, (n, g)))


def _caption(rng: np.random.Generator, things: Sequence[Seen]) -> str:
    """A caption of what was seen, or nothing where none was found that may be said."""
    for _ in range(TRIES if things else 0):
        caption = captions.true_caption(rng, Scene(tuple(things)))
        if may_be_said(caption):
            return caption
    return ""


def cell_labels(regions: UInt8[Tensor, "b h w"], cells: int, ground: float = 0.4) -> tuple[Int[Tensor, "b p"], Int[Tensor, "b p"]]:
    """(kind, hue) of the region that covers most of each of cells x cells cells; the ground counts `ground` of its pixels only."""
    side = regions.shape[1] // cells

    def most(classes: Int[Tensor, "b h w"], count: int) -> Int[Tensor, "b p"]:
        shares = F.avg_pool2d(F.one_hot(classes, count).permute(0, 3, 1, 2).float(), side)
        shares[:, 0] *= ground
        return shares.argmax(dim=1).flatten(1)

    whole = regions.long()
    return most(whole // HUES, KINDS), most(whole % HUES, HUES)


def region_loss(logits: Float[Tensor, "b p classes"], kinds: Int[Tensor, "b p"], hues: Int[Tensor, "b p"]) -> Float[Tensor, ""]:
    """Cross-entropy of both questions, the mean over cells of regions plus the mean over cells of ground."""
    kind, hue = logits.float().split([KINDS, HUES], dim=2)
    each = F.cross_entropy(kind.transpose(1, 2), kinds, reduction="none") + F.cross_entropy(hue.transpose(1, 2), hues, reduction="none")
    inside = kinds > 0
    return each[inside].sum() / inside.sum().clamp(min=1) + each[~inside].sum() / (~inside).sum().clamp(min=1)
