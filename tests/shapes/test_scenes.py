"""The renderer draws what a scene says, the same bytes every time; placed things never touch."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from diffalign.rules import COLORS as GENEVAL_COLORS
from diffalign.shapes.captions import draw_scene
from diffalign.shapes.scenes import (
    COLORS,
    GAP,
    GROUND,
    MARGIN,
    RADIUS_RANGES,
    REACH,
    RING_HOLE,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    coverage,
    outline,
    place,
    render,
)

SOLID = [shape for shape in SHAPES if shape != "ring"]


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, "test") for _ in range(count)]


def test_the_colours_are_genevals_in_its_order():
    assert tuple(COLORS) == GENEVAL_COLORS


def test_the_same_seed_gives_the_same_scenes_and_the_same_bytes():
    first, second = scenes(50), scenes(50)
    assert first == second
    assert all(np.array_equal(render(a), render(b)) for a, b in zip(first, second, strict=True))
    assert scenes(50, seed=1) != first


def test_drawing_does_not_depend_on_what_was_drawn_before():
    ordered = scenes(20)
    forwards = [render(s) for s in ordered]
    backwards = [render(s) for s in reversed(ordered)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SOLID)
def test_a_solid_shape_has_its_exact_colour_at_its_centre_on_the_exact_ground(shape, color):
    image = render(Scene((Thing(shape, color, 32.0, 32.0, 10.0),)))
    assert image.shape == (SIZE, SIZE, 3)
    assert image.dtype == np.uint8
    assert tuple(image[32, 32]) == COLORS[color]
    assert {tuple(image[y, x]) for y in (0, -1) for x in (0, -1)} == {GROUND}


def test_a_ring_is_open_in_the_middle():
    image = render(Scene((Thing("ring", "red", 32.0, 32.0, 11.0),)))
    assert tuple(image[32, 32]) == GROUND
    assert tuple(image[32, 32 + round(11 * (1 + RING_HOLE) / 2)]) == COLORS["red"]


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_sums_to_the_area_of_the_outline(shape):
    """Area of a polygon by the shoelace formula, in pixels; a ring loses its hole."""
    radius = 20.0
    x, y = (outline(shape) * radius).T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    if shape == "ring":
        area *= 1 - RING_HOLE**2
    assert coverage(Thing(shape, "red", 32.0, 32.0, radius)).sum() == pytest.approx(area, rel=0.04)


def test_edges_are_antialiased():
    values = np.unique(coverage(Thing("circle", "red", 32.0, 32.0, 10.0)))
    assert values.min() == 0.0
    assert values.max() == 1.0
    assert len(values) > 5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_box_holds_what_is_drawn_and_no_more(shape):
    thing = Thing(shape, "black", 30.3, 33.6, 10.7)
    drawn = coverage(thing) > 0.5
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == pytest.approx(thing.box, abs=1.6)


def test_a_larger_drawing_is_the_same_scene():
    for scene in scenes(10):
        large = Image.fromarray(render(scene, 2 * SIZE)).reduce(2)
        assert np.abs(np.asarray(large, dtype=int) - render(scene)).mean() < 1.5


def test_drawn_things_keep_their_distance_and_stay_inside():
    for scene in scenes(300):
        for i, a in enumerate(scene.things):
            low, high = RADIUS_RANGES[len(scene.things)]
            assert low <= a.radius <= high
            assert min(a.box) >= MARGIN
            assert max(a.box) <= SIZE - MARGIN
            for b in scene.things[:i]:
                assert math.dist((a.x, a.y), (b.x, b.y)) >= REACH * (a.radius + b.radius) + GAP


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_form_of_scene_is_drawn_often_enough_to_be_learnt(split):
    """Crowded scenes fit less often, and training drops held-out relations, so the shares are not those that were aimed at."""
    rng, shares = np.random.default_rng(3), Counter()
    for _ in range(1500):
        scene = draw_scene(rng, split)
        shares[len(scene.things), len({t.shape for t in scene.things})] += 1 / 1500
    assert set(shares) == {(1, 1), (2, 1), (2, 2), (3, 1), (4, 1)}
    assert min(shares.values()) > 0.015
    assert 0.2 < shares[1, 1] < 0.4
    assert 0.35 < shares[2, 2] < 0.6


@pytest.mark.parametrize("shape", SHAPES)
def test_no_outline_bridges_the_gap(shape):
    """Things are placed by their reach alone; two of the largest must still leave a pixel of ground between them."""
    beyond = np.linalg.norm(outline(shape), axis=1).max() - REACH
    largest = max(high for _, high in RADIUS_RANGES.values())
    assert GAP - 2 * max(beyond, 0) * largest > 1


def test_a_full_image_is_said_to_be_full():
    """Four things do not always fit: failing is None, never an overlap or one thing fewer."""
    rng = np.random.default_rng(0)
    placed = [place(rng, [("square", "red")] * 4) for _ in range(100)]
    assert None in placed
    assert {len(scene.things) for scene in placed if scene} == {4}


def test_an_unknown_shape_is_an_error_that_lists_the_shapes():
    with pytest.raises(ValueError, match=r"unknown shape 'hexagon'; the shapes are circle, square"):
        outline("hexagon")
