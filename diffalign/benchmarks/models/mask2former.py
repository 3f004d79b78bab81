"""Mask2Former as mmdet 2.x runs it, around the model of transformers: the same pixels in, the same instances out. No mmdet, no compiled op.

Architecture: Cheng et al., "Masked-attention Mask Transformer" (arXiv 2112.01527). Both ends differ from what transformers' own image
processor does, in ways that move GenEval's scores near its thresholds:

- in: keep-ratio resize into 1333 x 800 by OpenCV's bilinear filter (no antialiasing, fixed-point weights), then padding on the right
  and at the bottom to a multiple of 32, with 128 before the pixels are normalised: grey, not zero. A square image of any size becomes
  800 x 800, without padding.
- out: mask logits go to the padded size, lose the padding, go to the original size, all bilinear; the 100 best (query, class) pairs by
  class probability; mask = logit > 0; score = probability x mean sigmoid over the mask. A query may give several classes. No suppression.

Sizes are (height, width) throughout; images "h w 3" uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from diffalign.rules import Detection

LONG_SIDE, SHORT_SIDE = 1333, 800
STRIDE = 32
MEAN = (123.675, 116.28, 103.53)  # RGB, of 255
STD = (58.395, 57.12, 57.375)
PADDING = 128  # of 255; mmdet 2.x's configurations of instances pad before they normalise
MAX_INSTANCES = 100
WEIGHT_ONE = 2048  # OpenCV's interpolation weights are 11-bit integers

Size = tuple[int, int]
Image = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Instances:
    """The instances of one image, best first. `boxes` are [x1, y1, x2, y2] with the last pixel counted (x2 = largest x + 1)."""

    labels: Int[Tensor, " n"]
    queries: Int[Tensor, " n"]
    class_scores: Float[Tensor, " n"]
    mask_scores: Float[Tensor, " n"]
    scores: Float[Tensor, " n"]
    boxes: Float[Tensor, "n 4"]
    masks: Bool[Tensor, "n h w"]


# --- in -----------------------------------------------------------------------------------------------------------------------


def resized(size: Size) -> Size:
    """What an image of `size` is resized to: as large as fits into 1333 x 800 whichever way round, ratio kept."""
    scale = min(LONG_SIDE / max(size), SHORT_SIDE / min(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def padded(size: Size) -> Size:
    """The next multiple of 32 on each side."""
    return -(-size[0] // STRIDE) * STRIDE, -(-size[1] // STRIDE) * STRIDE


def to_pixels(image: Image) -> Float[Tensor, "3 h w"]:
    """Resized, padded and normalised, in this order."""
    size = resized(image.shape[:2])
    height, width = padded(size)
    pixels = torch.from_numpy(resize_bilinear(image, size)).float()
    pixels = F.pad(pixels, (0, 0, 0, width - size[1], 0, height - size[0]), value=PADDING)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def resize_bilinear(image: Image, size: Size) -> Image:
    """OpenCV's INTER_LINEAR for 8-bit images, to the bit: rows first, then columns, in 11-bit fixed point; halving is a 2 x 2 mean."""
    if image.shape[:2] == size:
        return image
    if image.shape[0] == 2 * size[0] and image.shape[1] == 2 * size[1]:
        return ((image[::2, ::2].astype(np.int32) + image[::2, 1::2] + image[1::2, ::2] + image[1::2, 1::2] + 2) >> 2).astype(np.uint8)
    left, fraction = _source(image.shape[1], size[1])
    # Beyond the first and last column the nearest one is taken whole, which for rows OpenCV leaves to the clipped indices.
    fraction[(left < 0) | (left >= image.shape[1] - 1)] = 0
    left = left.clip(0, image.shape[1] - 1)
    right = (left + 1).clip(0, image.shape[1] - 1)
    near, far = _weights(fraction)
    source = image.astype(np.int32)
    rows = source[:, left] * near[:, None] + source[:, right] * far[:, None]
    top, fraction = _source(image.shape[0], size[0])
    near, far = (w[:, None, None] for w in _weights(fraction))
    upper = rows[top.clip(0, image.shape[0] - 1)] >> 4
    lower = rows[(top + 1).clip(0, image.shape[0] - 1)] >> 4
    return ((((near * upper) >> 16) + ((far * lower) >> 16) + 2) >> 2).clip(0, 255).astype(np.uint8)


def _source(length: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """For each new pixel the index of the source pixel before its centre, possibly -1, and how far past that one's centre it lies."""
    at = ((np.arange(new) + 0.5) * (length / new) - 0.5).astype(np.float32)
    before = np.floor(at).astype(np.int64)
    return before, at - before.astype(np.float32)


def _weights(fraction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    near = np.rint((np.float32(1) - fraction) * np.float32(WEIGHT_ONE)).astype(np.int32)
    return near, np.rint(fraction * np.float32(WEIGHT_ONE)).astype(np.int32)


# --- out ----------------------------------------------------------------------------------------------------------------------


def instances(
    class_logits: Float[Tensor, "q c"],
    mask_logits: Float[Tensor, "q hm wm"],
    padded_size: Size,
    resized_size: Size,
    original_size: Size,
    max_instances: int = MAX_INSTANCES,
    least_class_score: float = -1.0,
) -> Instances:
    """One image's instances. The last class is "no object".

    Pairs with a class probability of at most `least_class_score` are dropped before their masks are enlarged; since the score is never
    above that probability, a later cut at the same value gives the same instances.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    class_scores, pairs = probabilities.flatten().topk(min(max_instances, probabilities.numel()))
    wanted = class_scores > least_class_score
    class_scores, pairs = class_scores[wanted], pairs[wanted]
    queries, labels = pairs // classes, pairs % classes

    distinct, position = queries.unique(return_inverse=True)
    masks, query_scores = _masks(mask_logits[distinct].float(), padded_size, resized_size, original_size)
    boxes = _boxes(masks)
    mask_scores = query_scores[position]
    scores = class_scores * mask_scores
    order = scores.argsort(descending=True, stable=True)
    position = position[order]
    return Instances(
        labels[order], queries[order], class_scores[order], mask_scores[order], scores[order], boxes[position], masks[position]
    )


def _masks(
    logits: Float[Tensor, "n hm wm"], padded_size: Size, resized_size: Size, original_size: Size
) -> tuple[Bool[Tensor, "n h w"], Float[Tensor, " n"]]:
    """Binary masks at the original size, and the mean sigmoid over each (0 for an empty one)."""
    if not len(logits):
        return logits.new_zeros((0, *original_size), dtype=torch.bool), logits.new_zeros(0)
    logits = F.interpolate(logits[None], padded_size, mode="bilinear", align_corners=False)
    logits = logits[..., : resized_size[0], : resized_size[1]]
    logits = F.interpolate(logits, original_size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    inside = (logits.sigmoid() * masks).flatten(1).sum(1)
    return masks, inside / (masks.flatten(1).sum(1) + 1e-6)


def _boxes(masks: Bool[Tensor, "n h w"]) -> Float[Tensor, "n 4"]:
    """The box around each mask; zeros for an empty one."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for i, mask in enumerate(masks):
        columns, rows = mask.any(0).nonzero(), mask.any(1).nonzero()
        if len(columns):
            ends = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            boxes[i] = torch.cat(ends).to(boxes)
    return boxes


# --- the detector -------------------------------------------------------------------------------------------------------------


@dataclass
class Mask2FormerDetector:
    """Finds objects in images.

    model: transformers' Mask2FormerForUniversalSegmentation. names: its classes, by index. version: names the weights in results.
    least_score: nothing at or below it is returned; GenEval looks at nothing below 0.3.
    """

    model: nn.Module
    names: Sequence[str]
    version: str
    least_score: float = 0.3

    def __post_init__(self) -> None:
        self.model.eval()
        classes = self.model.config.num_labels
        if classes != len(self.names):
            raise ValueError(f"the detector has {classes} classes and there are {len(self.names)} names; they must be as many")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image]) -> list[dict[str, list[Detection]]]:
        """Class -> detections, best first, for each image. Images that come out at one padded size run as one batch."""
        groups: dict[Size, list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(padded(resized(image.shape[:2])), []).append(i)
        found: list[dict[str, list[Detection]]] = [{} for _ in images]
        parameter = next(self.model.parameters())
        for size, members in groups.items():
            pixels = torch.stack([to_pixels(images[i]) for i in members]).to(parameter)
            output = self.model(pixel_values=pixels)
            for row, i in enumerate(members):
                original = images[i].shape[:2]
                logits = (output.class_queries_logits[row], output.masks_queries_logits[row])
                if not all(bool(torch.isfinite(each).all()) for each in logits):
                    raise FloatingPointError(f"the detector's logits are not finite in {parameter.dtype}; run it in float32")
                seen = instances(*logits, size, resized(original), original, least_class_score=self.least_score)
                found[i] = self._by_class(seen)
        return found

    def _by_class(self, seen: Instances) -> dict[str, list[Detection]]:
        """In the order of the classes, as upstream writes them."""
        out: dict[str, list[Detection]] = {}
        rows = zip(seen.labels.tolist(), seen.scores.tolist(), seen.boxes.tolist(), seen.masks.cpu().numpy(), strict=True)
        for label, score, box, mask in sorted(rows, key=lambda row: row[0]):
            if np.float32(score) > np.float32(self.least_score):
                out.setdefault(self.names[label], []).append(Detection(tuple(box), score, mask))
        return out
