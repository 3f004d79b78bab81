"""SSIM and the perceptual distance on images whose likeness is known."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.evaluation.similarity import perceptual_distance, ssim
from tests.tiny import tiny_vae


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def noisy(images, amount):
    return np.clip(images + np.random.default_rng(1).normal(0, amount, images.shape), 0, 255).astype(np.uint8)


def test_ssim_of_constants_by_hand():
    """Two even greys: no variance, so SSIM is (2xy + c1) / (x^2 + y^2 + c1)."""
    a, b = np.full((1, 16, 16, 3), 51, np.uint8), np.full((1, 16, 16, 3), 102, np.uint8)
    x, y, c1 = 0.2, 0.4, 1e-4
    assert ssim(a, b)[0] == pytest.approx((2 * x * y + c1) / (x * x + y * y + c1))


def test_ssim_is_one_for_equals_and_falls_with_noise(images):
    assert ssim(images, images) == pytest.approx(1.0)
    values = [ssim(images, noisy(images, amount)).mean() for amount in (5, 20, 80)]
    assert values == sorted(values, reverse=True)
    assert np.allclose(ssim(images, noisy(images, 20)), ssim(noisy(images, 20), images))


def test_ssim_agrees_with_scikit_image(images):
    metrics = pytest.importorskip("skimage.metrics")
    other = noisy(images, 30)
    theirs = metrics.structural_similarity(
        images[0], other[0], channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
    )[1]
    assert ssim(images[:1], other[:1])[0] == pytest.approx(theirs.mean(), abs=1e-6)


def test_perceptual_distance_grows_with_noise_and_leaves_no_hook(images):
    encoder = tiny_vae().encoder.eval()
    assert np.allclose(perceptual_distance(encoder, images, images), 0, atol=1e-6)
    values = [perceptual_distance(encoder, images, noisy(images, amount)).mean() for amount in (5, 20, 80)]
    assert values == sorted(values)
    one = perceptual_distance(encoder, images, noisy(images, 20), batch=1)
    assert np.allclose(one, perceptual_distance(encoder, images, noisy(images, 20)), rtol=1e-3)
    assert not any(block._forward_hooks for block in encoder.down_blocks)


@pytest.mark.parametrize("measure", [ssim, lambda a, b: perceptual_distance(tiny_vae().encoder, a, b)])
def test_shapes_must_agree(measure, images):
    with pytest.raises(ValueError, match="of one shape"):
        measure(images, images[:, :16])
