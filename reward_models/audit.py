"""An audit of a reward: how its score answers to changes of a picture that say little about how well it fits its prompt.

    effect of a change T = mean_i (r(T x_i, p_i) - r(x_i, p_i)) / s        s = standard deviation of r(x_i, p_i) over the images

So 1 means that the change moves scores as far as pictures usually lie apart, and a search that can make the change will. The
interval is Student's t over the differences of single images, with s taken as it is: 95 %, for images drawn independently.
s holds the differences between prompts, too, where scores of several prompts differ: give pictures of one prompt, or of prompts
like those that you will optimise.

    rows = audit(reward, images, prompts, paraphrase=lambda prompt: "a picture of " + prompt)

It costs one scoring of the images for each change and one more.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.special import stdtrit
from torch import Tensor
from torchvision.transforms import functional as transforms

from diffalign.reward_models.pictures import Pictures, by_size, check_pictures
from diffalign.reward_models.pixels import Resized, resize
from diffalign.types import Images, Scores

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Change:
    """What is done to every picture."""

    kind: str
    """What it is a change of: brightness, saturation, sharpness, jpeg, flip, crop, resolution, or a word of your own."""
    amount: str
    """How much, for a table."""
    apply: Callable[[Images], Images | Resized]
    """Images "b 3 h w" in [0, 1] to images, of another size perhaps."""


@dataclass(frozen=True)
class AuditRow:
    """How a reward answers to one change."""

    kind: str
    """What was changed; "prompt" where it is the prompt."""
    amount: str
    """How much."""
    effect: float
    """Mean change of the score, in standard deviations of the unchanged images' scores."""
    low: float
    """Where the 95 % interval of `effect` begins."""
    high: float
    """Where it ends."""
    rises: float
    """Share of the images whose score rises."""
    images: int
    """How many there were."""


def brightness(images: Images, factor: float) -> Images:
    """Every value times `factor`."""
    return (images * factor).clamp(0, 1)


def saturation(images: Images, factor: float) -> Images:
    """0 is grey, 1 the picture, 2 twice as far from grey."""
    return transforms.adjust_saturation(images, factor)


def blur(images: Images, share: float) -> Images:
    """A Gaussian whose deviation is this share of the shorter side, and half a pixel at least: less would change nothing."""
    sigma = max(share * min(images.shape[-2:]), 0.5)
    radius = min(max(math.ceil(3 * sigma), 1), min(images.shape[-2:]) - 1)  # padding by reflection goes no further
    return transforms.gaussian_blur(images, [2 * radius + 1] * 2, [sigma] * 2)


def sharpen(images: Images, share: float) -> Images:
    """Once more what such a blur takes away."""
    return (2 * images - blur(images, share)).clamp(0, 1)


def jpeg(images: Images, quality: int) -> Images:
    """Written as a JPEG by Pillow, and read again."""
    levels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([_through_jpeg(picture, quality) for picture in levels]).to(images)


def _through_jpeg(levels: np.ndarray, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


def flip(images: Images) -> Images:
    """Left becomes right."""
    return images.flip(-1)


def crop(images: Images, share: float) -> Resized:
    """The middle, this share of both sides."""
    height, width = (max(round(side * share), 1) for side in images.shape[-2:])
    return transforms.center_crop(images, [height, width])


def resolution(images: Images, factor: float) -> Resized:
    """Both sides times `factor`, as Pillow resizes; the picture stays that small or large."""
    return resize(images, *(max(round(side * factor), 1) for side in images.shape[-2:]))


CHANGES: tuple[Change, ...] = (
    *(Change("brightness", f"x {factor}", functools.partial(brightness, factor=factor)) for factor in (0.8, 1.25)),
    *(Change("saturation", f"x {factor}", functools.partial(saturation, factor=factor)) for factor in (0.0, 0.5, 1.5)),
    *(Change("sharpness", f"blurred by {share:.1%}", functools.partial(blur, share=share)) for share in (0.004, 0.012)),
    Change("sharpness", "sharpened by 0.4%", functools.partial(sharpen, share=0.004)),
    *(Change("jpeg", f"quality {quality}", functools.partial(jpeg, quality=quality)) for quality in (90, 50, 20)),
    Change("flip", "left and right", flip),
    *(Change("crop", f"middle {share:.0%}", functools.partial(crop, share=share)) for share in (0.9, 0.75)),
    *(Change("resolution", f"x {factor}", functools.partial(resolution, factor=factor)) for factor in (0.25, 0.5, 2.0)),
)


@torch.no_grad()
def audit(
    reward: Callable[[Images, Sequence[str]], Scores],
    images: Tensor | Pictures,
    prompts: Sequence[str],
    *,
    paraphrase: Callable[[str], str] | Sequence[str] | None = None,
    changes: Iterable[Change] = CHANGES,
    batch: int = 16,
    device: torch.device | str = "cpu",
) -> list[AuditRow]:
    """A row for each change, in their order, and one more for the prompt where there is a paraphrase.

    images: "b 3 h w" in [0, 1], or a list of pictures of Pillow and tensors "3 h w". prompts: one for each.
    paraphrase: what to call the same thing: a function of a prompt, or a list beside `prompts`.
    batch: images scored at once. device: where the reward is.
    Raises ValueError for fewer than two images, for prompts or paraphrases of another number, where the reward gives all images the
    same score, and for a score that is not finite; TypeError for what is no picture.
    """
    pictures = list(images)
    check_pictures("audit", pictures)
    prompts = list(prompts)
    if len(pictures) < 2 or len(prompts) != len(pictures):
        raise ValueError(f"audit needs at least two images and a prompt for each, got {len(pictures)} images and {len(prompts)} prompts")
    others = _paraphrases(paraphrase, prompts)
    groups = list(by_size("audit", pictures, torch.device(device)))
    score = functools.partial(_scores, reward, groups, batch=batch)
    before = score(prompts, lambda batch: batch, "no change")
    spread = before.std(ddof=1)
    if not spread > 0:
        raise ValueError(
            f"the reward gives all {len(pictures)} images the score {before[0]:g}, so there is no spread to measure changes in"
        )
    rows = [_row(change.kind, change.amount, score(prompts, change.apply, f"{change.kind} {change.amount}"), before) for change in changes]
    if others is not None:
        rows.append(_row("prompt", "paraphrased", score(others, lambda batch: batch, "paraphrased prompts"), before))
    return rows


def _paraphrases(paraphrase: Callable[[str], str] | Sequence[str] | None, prompts: list[str]) -> list[str] | None:
    if paraphrase is None:
        return None
    others = [paraphrase(prompt) for prompt in prompts] if callable(paraphrase) else list(paraphrase)
    if isinstance(paraphrase, str) or len(others) != len(prompts):
        raise ValueError(f"paraphrase must be a function of a prompt, or a list of {len(prompts)} prompts, got {str(paraphrase)[:60]!r}")
    return others


def _scores(
    reward: Callable[[Images, Sequence[str]], Scores],
    groups: list[tuple[list[int], Images]],
    prompts: list[str],
    apply: Callable[[Images], Images | Resized],
    what: str,
    batch: int,
) -> np.ndarray:
    """Scores of all images after a change, in their order, in float64."""
    scores = np.full(len(prompts), math.nan)
    for places, images in groups:
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            values = reward(apply(images[start : start + batch]), [prompts[place] for place in some])
            scores[some] = values.double().cpu().numpy()
    if not np.isfinite(scores).all():
        place = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"the reward gives images[{place}] the score {scores[place]} after {what}; an audit needs finite scores")
    return scores


def _row(kind: str, amount: str, after: np.ndarray, before: np.ndarray) -> AuditRow:
    differences = (after - before) / before.std(ddof=1)
    n = len(differences)
    effect = float(differences.mean())
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(differences.std(ddof=1)) / math.sqrt(n)
    return AuditRow(kind, amount, effect, effect - half, effect + half, float((differences > 0).mean()), n)
