"""The pictures, by their pixels."""

import numpy as np
import pytest
from PIL import Image

from diffalign.reports.plots import GREEN, RED, Pair, distributions, enlarge, grid, panel_plot, rewards_plot, strip


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


def test_panel_plot_has_a_panel_for_each_method_and_rewards_plot_one_more():
    curves = {"optimised": [0, 1.0, 2.0], "watched": {"a_$x^2": [0, 0.5, 0.1]}, "gap": [0, 0.5, 1.9], "verdict": ""}
    one, two, four = (panel_plot({str(i): curves for i in range(n)}) for n in (1, 2, 4))
    assert two.width > 1.7 * one.width
    assert two.height == one.height
    assert four.height > 1.7 * one.height
    sample = {"rewards": {"total": [1.0, 2.0, 3.0]}, "best": 2}
    assert rewards_plot({**sample, "panel": curves}).height > rewards_plot(sample).height


def test_distributions_has_a_panel_for_each_reward_and_bears_any_scores():
    scores = {"many": [i / 7 for i in range(500)], "one": [0.25], "alike": [3.0] * 40, "zero": [0.0] * 3, "none": [], "$x_{": [-1e-9, 1e-9]}
    whole = distributions(scores, dict.fromkeys(scores, "a unit, " * 40))
    single = distributions({"many": scores["many"]}, {"many": "unit"})
    assert whole.width == single.width
    assert whole.height == pytest.approx(6 * single.height, rel=0.02)
    bar = (0xB3, 0xC8, 0xF8)  # 35 % of the first line's blue on white
    panels = [whole.crop((0, i * single.height, whole.width, (i + 1) * single.height)) for i in range(6)]
    areas = [near(panel, bar) for panel in panels]
    assert areas[4] == 0
    assert min(areas[0], areas[5]) > 4 * max(areas[1:4])  # what is all alike is one narrow bar
    assert min(areas[1:4]) > 100
