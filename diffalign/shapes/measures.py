"""Measures of a generator beside the judge: how varied its images are, how like drawn scenes, how new, and how cleanly drawn.

Pure functions of images ("n h w 3" uint8) and of their features, which the caller computes and names: features of a network that was
optimised in the run at hand measure nothing there.

    Vendi score      exp(H(l)), l: eigenvalues of K / g, K: cosines of g images' features; 1 where all are alike, g where none are
                     (Friedman and Dieng, arXiv 2210.02410)
    Frechet          |m - m'|^2 + tr(S + S' - 2 (S S')^1/2), of features with means m and covariances S
                     (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500, on features of one's own)
    near-duplicates  share of images with a training scene within NEAR of them
    finish           colour deviation inside a thing, and the overlap of its outline with the template of its shape
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from scipy import ndimage
from torch import Tensor, nn

from diffalign.shapes.detector import detect

CELL = 4  # pixels a side; images are compared with training scenes by the means of such cells, so that blotches do not hide a copy
NEAR = 5.0  # 8-bit units; a drawn scene is about as far from itself moved by one pixel (median 5.3 of 1,000 scenes of seed 5)


def pairwise_distance(features: Float[Tensor, "n g d"]) -> Float[Tensor, " n"]:
    """Mean Euclidean distance between the features of each prompt's g images, over pairs. Raises ValueError where g < 2."""
    g = features.shape[1]
    if g < 2:
        raise ValueError(f"diversity needs at least two images of each prompt; got {g}")
    return torch.cdist(features.double(), features.double()).sum(dim=(1, 2)) / (g * (g - 1))


def vendi_score(features: Float[Tensor, "g d"]) -> float:
    """The effective number of different images among g, from 1 to g, by the cosines of their features."""
    unit = F.normalize(features.double(), dim=1)
    shares = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp(min=0)
    return math.exp(torch.special.entr(shares).sum().item())


def frechet_distance(features: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]) -> float:
    """Frechet distance between two sets of features, by torchmetrics. It falls with n: compare sets of one size alone.

    Raises ImportError where torchmetrics is missing, ValueError where a set has fewer than two members.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError("the Frechet distance needs torchmetrics; install it with: pip install 'diffalign[measures]'") from error
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"the Frechet distance needs two images of each kind; got {len(features)} and {len(reference)}")
    given = nn.Identity()
    given.num_features = features.shape[1]
    metric = FrechetInceptionDistance(feature=given)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return metric.compute().item()


def nearest_distance(images: UInt8[Tensor, "n h w 3"], scenes: UInt8[Tensor, "m h w 3"], batch: int = 4096) -> Float[Tensor, " n"]:
    """Root mean square difference to the nearest of the scenes, in 8-bit units, both averaged over cells of CELL x CELL pixels."""
    mine = _cells(images)
    nearest = torch.full((len(mine),), torch.inf)
    for some in scenes.split(batch):
        nearest = torch.minimum(nearest, torch.cdist(mine, _cells(some)).amin(dim=1))
    return nearest / mine.shape[1] ** 0.5


def near_duplicates(images: UInt8[Tensor, "n h w 3"], scenes: UInt8[Tensor, "m h w 3"], near: float = NEAR) -> float:
    """The share of images with a scene within `near` (8-bit units, see `nearest_distance`)."""
    return (nearest_distance(images, scenes) <= near).double().mean().item()


def _cells(images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n k"]:
    return F.avg_pool2d(images.permute(0, 3, 1, 2).float(), CELL).flatten(1)


@dataclass(frozen=True)
class Finish:
    """How cleanly the things in some images are drawn; None where there is no thing."""

    things: int  # regions that the detector sees, whether it would count them or not
    deviation: float | None  # RMS distance in RGB of inner pixels from their mean colour, 8-bit units, the mean over things; 0: one colour
    overlap: float | None  # the detector's score in [0, 1], the mean over things; 1: the outline is a template


def finish(images: UInt8[Tensor, "n h w 3"]) -> Finish:
    """Colour deviation and template overlap of all things in the images."""
    deviations, overlaps = [], []
    for image in images.numpy():
        for found in detect(image).values():
            deviations += [color_deviation(image, one.mask) for one in found]
            overlaps += [one.score for one in found]
    if not deviations:
        return Finish(0, None, None)
    return Finish(len(deviations), float(np.mean(deviations)), float(np.mean(overlaps)))


def color_deviation(image: UInt8[np.ndarray, "h w 3"], mask: np.ndarray) -> float:
    """RMS distance in RGB of a thing's inner pixels from their mean (of all its pixels where nothing is left after erosion)."""
    inner = ndimage.binary_erosion(mask)
    colors = image[inner if inner.any() else mask].astype(np.float64)
    return float(np.sqrt(np.square(colors - colors.mean(axis=0)).sum(axis=1).mean()))
