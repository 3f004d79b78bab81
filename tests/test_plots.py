"""The pictures, by their pixels."""

import numpy as np
import pytest
from PIL import Image

from diffalign.plots import GREEN, RED, Pair, enlarge, grid, rewards_plot, strip


def plain(color, size=(64, 64)):
    return Image.new("RGB", size, color)


def near(picture, color):
    """How many pixels have that colour, within rounding."""
    return int((np.abs(np.asarray(picture.convert("RGB")).astype(int) - color).max(axis=2) <= 2).sum())


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), (256, 256)), ((100, 50), (600, 300)), ((512, 300), (512, 300)), ((1, 1), (256, 256))]
)
def test_enlarging_keeps_whole_pixels(size, expected):
    assert enlarge(plain("red", size)).size == expected


def test_strip_holds_both_images():
    picture = strip(plain((200, 0, 0)), plain((0, 0, 200), (32, 64)))
    assert near(picture, (200, 0, 0)) == 256 * 256
    assert near(picture, (0, 0, 200)) == 256 * 512


def test_grid_marks_each_image_with_its_verdict():
    pair = Pair("a very long prompt " * 10, plain("white"), plain("white"), before_correct=False, after_correct=True)
    both = grid([pair])
    assert near(both, GREEN) > 60
    assert near(both, RED) > 60
    wrong = grid([Pair("p", plain("white"), plain("white"), False, False)])
    assert near(wrong, GREEN) == 0


def test_grid_wraps_into_rows():
    pair = Pair("p", plain("red"), plain("blue"), True, True)
    one, two = grid([pair] * 3, columns=3), grid([pair] * 4, columns=3)
    assert one.width == two.width
    assert two.height > 1.8 * one.height
    with pytest.raises(ValueError, match="at least one pair"):
        grid([])


def test_rewards_plot_has_a_panel_for_each_reward_and_bears_gaps():
    one = rewards_plot({"rewards": {"total": [1.0, 2.0]}, "best": 1})
    three = rewards_plot({"rewards": {"clip": [1.0, None, 2.0], "total": [1.0, None, 2.0], "$x$": [None, None, None]}, "best": 2})
    assert one.width == three.width
    assert three.height > 2 * one.height
    assert near(one, (0x25, 0x63, 0xEB)) > 100
