"""Measures of a generator, against numbers worked by hand and pictures whose faults are known."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.shapes import measures
from diffalign.shapes.scenes import Scene, Thing, render

SQUARE = Scene((Thing("square", "red", 32.0, 32.0, 13.0),))


def picture(scene: Scene) -> torch.Tensor:
    return torch.from_numpy(render(scene)).unsqueeze(0)


def moved(scene: Scene, x: float) -> Scene:
    return Scene(tuple(replace(thing, x=thing.x + x) for thing in scene.things))


def test_distance_within_a_prompt_is_the_mean_over_its_pairs():
    features = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    assert measures.pairwise_distance(features).tolist() == pytest.approx([10 / 3, 0.0])
    with pytest.raises(ValueError, match="at least two images"):
        measures.pairwise_distance(features[:, :1])


def test_vendi_score_counts_different_images():
    assert measures.vendi_score(torch.eye(3)) == pytest.approx(3.0)
    assert measures.vendi_score(torch.tensor([[1.0, 2.0], [2.0, 4.0]])) == pytest.approx(1.0)  # one direction
    two_alike = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0]])  # eigenvalues of K / 3: 2/3, 1/3
    assert measures.vendi_score(two_alike) == pytest.approx(3 / 2 ** (2 / 3))


def test_frechet_distance_of_gaussians_worked_by_hand():
    """Means 1 and 3, variances 2 and 8: 2^2 + (sqrt 2 - sqrt 8)^2 = 6. Beside it a direction in which both are alike."""
    reference = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, -1.0], [2.0, -1.0]])
    features = torch.tensor([[1.0, 1.0], [5.0, 1.0], [1.0, -1.0], [5.0, -1.0]])
    two, eight = 4 / 3, 16 / 3  # of four members the variance divides by three
    assert measures.frechet_distance(features, reference) == pytest.approx(4 + (two**0.5 - eight**0.5) ** 2)
    assert measures.frechet_distance(reference, reference) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="two images of each kind; got 1 and 4"):
        measures.frechet_distance(features[:1], reference)


def test_a_missing_torchmetrics_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"diffalign\[measures\]"):
        measures.frechet_distance(torch.eye(2), torch.eye(2))


def test_a_copy_is_found_among_the_scenes_behind_blotches_but_not_from_afar():
    other = Scene((Thing("star", "blue", 20.0, 40.0, 12.0),))
    scenes = torch.cat([picture(SQUARE), picture(other)])
    grain = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 40 - 20  # a chequerboard, which cells average away
    blotched = (picture(SQUARE).int() + grain[..., None] + 3).clamp(0, 255).byte()  # and all a little brighter
    images = torch.cat([picture(SQUARE), blotched, picture(moved(SQUARE, 6.0))])
    copy, grained, far = measures.nearest_distance(images, scenes, batch=1).tolist()
    assert copy == pytest.approx(0.0, abs=1e-3)
    assert grained < measures.NEAR < far
    assert measures.near_duplicates(images, scenes) == pytest.approx(2 / 3)
    plain = torch.full((1, 64, 64, 3), 100, dtype=torch.uint8)
    assert measures.nearest_distance(plain, plain + 4).item() == pytest.approx(4.0)


def test_near_is_about_a_pixel():
    assert measures.nearest_distance(picture(moved(SQUARE, 0.5)), picture(SQUARE)).item() < measures.NEAR
    assert measures.nearest_distance(picture(moved(SQUARE, 2.0)), picture(SQUARE)).item() > measures.NEAR


def test_color_deviation_of_two_colors_in_parts_p_and_q_is_their_distance_times_the_root_of_pq():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:] = (30, 0, 0)
    image[4:, 4:] = (0, 40, 0)  # of the inner 6 x 6 pixels, 3 x 3
    image[[0, -1]] = image[:, [0, -1]] = 255  # a rim of another colour is no inner pixel
    whole = np.ones((8, 8), dtype=bool)
    assert measures.color_deviation(image, whole) == pytest.approx(50.0 * (0.25 * 0.75) ** 0.5)
    thin = np.zeros((8, 8), dtype=bool)
    thin[3:5, 4] = True  # nothing is left after erosion, so all of it counts
    assert measures.color_deviation(image, thin) == pytest.approx(25.0)


def test_finish_tells_clean_things_from_blotched_and_bent_ones():
    clean = measures.finish(torch.cat([picture(SQUARE), picture(SQUARE)]))
    assert clean.things == 2
    assert clean.deviation == pytest.approx(0.0, abs=0.5)
    assert clean.overlap > 0.9
    blotched = picture(SQUARE)
    blotched[0, 22:42:2, 22:42] = torch.tensor([160, 30, 30], dtype=torch.uint8)
    assert measures.finish(blotched).deviation == pytest.approx(30.0, abs=3.0)
    bent = picture(SQUARE)
    bent[0, 15:32, 15:32] = 144  # a quarter of the square is gone
    assert measures.finish(bent).overlap < clean.overlap - 0.1


def test_where_there_is_no_thing_there_is_no_figure():
    assert measures.finish(picture(Scene(()))) == measures.Finish(0, None, None)
