"""How alike two images of the same prompt and noise are: SSIM, and a perceptual distance in the features of a convolutional encoder."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

SIGMA, TRUNCATE, K1, K2 = 1.5, 3.5, 0.01, 0.03  # of the paper: an 11 x 11 Gaussian window


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004) of "b h w 3" uint8 images, one value per image, 1 where they are equal; colours averaged.

    The window is mirrored at the edges rather than cut off there. Raises ValueError where the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"ssim compares images of one shape, got {a.shape} and {b.shape}")
    x, y = a.astype(np.float64) / 255, b.astype(np.float64) / 255

    def blur(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, sigma=(0, SIGMA, SIGMA, 0), truncate=TRUNCATE)

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    index = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return index.mean(axis=(1, 2, 3))


@torch.no_grad()
def perceptual_distance(encoder: nn.Module, a: np.ndarray, b: np.ndarray, batch: int = 64) -> np.ndarray:
    """The form of LPIPS (Zhang et al. 2018) without its learned weights, one value per image, 0 where they are equal.

    encoder: an autoencoder's encoder, a module with `down_blocks`, given images in [-1, 1]. The features of every block are normalised over
    channels at each place; their squared differences are averaged over places and summed over blocks. Images are "b h w 3" uint8.
    """
    if a.shape != b.shape:
        raise ValueError(f"perceptual_distance compares images of one shape, got {a.shape} and {b.shape}")
    parameter = next(encoder.parameters())
    found: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, output: found.append(output)) for block in encoder.down_blocks]
    distances = []
    try:
        for start in range(0, len(a), batch):
            pair = np.concatenate([a[start : start + batch], b[start : start + batch]])
            found.clear()
            encoder(torch.from_numpy(pair).to(parameter.device).permute(0, 3, 1, 2).to(parameter.dtype) / 127.5 - 1)
            units = [features.float() / (features.float().norm(dim=1, keepdim=True) + 1e-10) for features in found]
            halves = [unit.chunk(2) for unit in units]
            distances.append(sum((first - second).square().sum(1).mean((1, 2)) for first, second in halves).cpu().numpy())
    finally:
        for handle in handles:
            handle.remove()
    return np.concatenate(distances)
