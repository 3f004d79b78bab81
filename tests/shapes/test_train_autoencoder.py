"""What the decoder learns to clean: latents that are noisy, and in places drawn towards other colours."""

import numpy as np
import torch

from diffalign.shapes import captions, scenes
from diffalign.shapes.train import autoencoder


def test_a_repainted_scene_has_the_same_outlines_and_no_colour_of_the_first():
    rng = np.random.default_rng(3)
    drawn = [captions.draw_scene(rng) for _ in range(20)]
    first = np.stack([scenes.render(scene) for scene in drawn])
    again = autoencoder.repaint(drawn, seed=1).numpy()
    ground = np.array(scenes.GROUND)
    assert ((first == ground).all(axis=3) == (again == ground).all(axis=3)).all()
    middles = [(i, round(t.y), round(t.x)) for i, scene in enumerate(drawn) for t in scene.things if t.shape != "ring"]
    assert middles
    assert all((first[at] != again[at]).any() for at in middles)


def test_latents_are_drawn_towards_the_others_by_less_than_half_and_some_not_at_all():
    zeros, ones = torch.zeros(400, 2, 8, 8), torch.ones(400, 2, 8, 8)
    mixed = autoencoder.disturbed(zeros, ones, 0.0, torch.Generator().manual_seed(0))
    largest = mixed.amax(dim=(1, 2, 3))
    assert 0.35 < largest.max() <= autoencoder.MIXING < 0.5
    assert mixed.min() >= 0
    kept = (largest == 0).float().mean().item()
    assert abs(kept - autoencoder.CLEAN) < 0.07  # three standard deviations of 400 draws
    assert mixed[largest.argmax()].std() > 0.02  # in patches, not everywhere alike


def test_noise_is_in_units_of_the_latents_deviation():
    zeros = torch.zeros(400, 2, 8, 8)
    one, three = (autoencoder.disturbed(zeros, zeros, d, torch.Generator().manual_seed(0)) for d in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one)
    spread = one.std(dim=(1, 2, 3))
    assert spread.min() < 0.05
    assert 0.2 < spread.max() < 1.2 * autoencoder.NOISE
