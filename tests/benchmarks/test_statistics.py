"""The statistics against arithmetic done by hand, and against what must not change them."""

import math

import numpy as np
import pytest

from diffalign.benchmarks.statistics import (
    discordance,
    effective_images,
    holm,
    overall_estimate,
    paired_difference,
    paired_task_differences,
    task_estimates,
    task_means,
    wilson,
)


def test_wilson_by_hand():
    """5 of 10, z^2 = 3.8415: centre (0.5 + 0.19207) / 1.38415 = 0.5; half = 1.95996 / 1.38415 * sqrt(0.025 + 0.0096036) = 0.26341."""
    low, high = wilson(0.5, 10)
    assert (low, high) == (pytest.approx(0.23659, abs=1e-5), pytest.approx(0.76341, abs=1e-5))


def test_wilson_at_the_ends():
    """0 of 10: the upper bound is z^2 / (n + z^2) = 3.8415 / 13.8415 = 0.27753, and the interval does not collapse to a point."""
    assert wilson(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert wilson(1, 10) == (pytest.approx(1 - 0.27753, abs=1e-5), 1.0)


@pytest.mark.parametrize(("mean", "n"), [(-0.1, 10), (1.1, 10), (0.5, 0), (math.nan, 10)])
def test_wilson_refuses_what_is_no_proportion(mean, n):
    with pytest.raises(ValueError, match="wilson needs"):
        wilson(mean, n)


def test_effective_images_by_hand():
    """Prompt means 1, 0.5, 0.5, 0 of two images each: variance (0.25 + 0.25) / 3, of the mean 1/24; 0.25 / (1/24) = 6 images of the 8."""
    assert effective_images(np.array([1, 0.5, 0.5, 0]), 8) == pytest.approx(6)


def test_effective_images_where_images_of_a_prompt_agree():
    """Means 1, 1, 0, 0: variance (4 * 0.25) / 3 = 1/3, of the mean 1/12, so 3 images; never fewer than the 4 prompts."""
    assert effective_images(np.array([1.0, 1, 0, 0]), 16) == 4
    assert effective_images(np.array([1.0, 1, 1, 1]), 16) == 4  # no spread to learn from: the cautious end


def test_overall_is_the_mean_of_task_means_not_of_images():
    values, tasks = [1, 1, 1, 0, 0], ["a", "a", "a", "a", "b"]
    estimate = overall_estimate(values, range(5), tasks)
    assert estimate.mean == pytest.approx((0.75 + 0) / 2)
    assert (estimate.images, estimate.prompts) == (5, 5)


def test_a_prompt_counts_once_whatever_its_number_of_images():
    estimate = task_estimates([1, 1, 1, 0], ["p", "p", "p", "q"], ["a"] * 4)["a"]
    assert estimate.mean == 0.5
    assert (estimate.images, estimate.prompts) == (4, 2)


def test_bootstrap_interval_has_the_width_that_theory_gives():
    """100 prompts, half correct: standard deviation of the mean 0.05, so 0.5 +- 0.098; two such tasks: 0.098 / sqrt(2)."""
    values = [0, 1] * 50
    one = overall_estimate(values, range(100), ["a"] * 100)
    assert one.high - one.low == pytest.approx(2 * 0.098, abs=0.012)
    two = overall_estimate(values * 2, range(200), ["a"] * 100 + ["b"] * 100)
    assert two.high - two.low == pytest.approx(2 * 0.098 / math.sqrt(2), abs=0.01)


def test_copies_of_an_image_add_no_certainty():
    """Images of a prompt that always agree are worth one image: resampling prompts gives the same interval, to the bit."""
    values, prompts = [0, 1, 1, 0, 1, 1, 0, 1], list("abcdefgh")
    single = overall_estimate(values, prompts, ["t"] * 8)
    copied = overall_estimate(np.repeat(values, 5), np.repeat(prompts, 5), ["t"] * 40)
    assert (copied.low, copied.high) == (single.low, single.high)


def test_bootstrap_is_repeatable_and_its_seed_matters():
    values = np.random.default_rng(3).random(40)
    same = [overall_estimate(values, range(40), ["t"] * 40, seed=s).low for s in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_sign_flips_by_hand():
    """Three prompts, each better by 1: of the 8 sign patterns two reach |sum| = 3, so p = 1/4."""
    difference = paired_difference([1, 1, 1], [0, 0, 0], range(3), ["t"] * 3)
    assert difference.mean == 1
    assert (difference.low, difference.high) == (1, 1)
    assert difference.p_value == pytest.approx(0.25, abs=0.02)


def test_sign_flips_across_tasks_by_hand():
    """Two tasks of one prompt, each better by 1: of 4 patterns two reach |1 + 1|, so p = 1/2."""
    assert paired_difference([1, 1], [0, 0], [0, 1], ["a", "b"]).p_value == pytest.approx(0.5, abs=0.02)


def test_no_difference_has_p_one_and_swapping_flips_the_sign():
    assert paired_difference([1, 0], [1, 0], [0, 1], ["a", "a"]).p_value == 1
    there = paired_difference([1, 1, 0, 1], [0, 1, 0, 0], range(4), ["a", "a", "b", "b"])
    back = paired_difference([0, 1, 0, 0], [1, 1, 0, 1], range(4), ["a", "a", "b", "b"])
    assert (there.mean, there.p_value) == (-back.mean, back.p_value)


def test_pairing_is_sharper_than_comparing_two_intervals():
    """Hard and easy prompts: accuracies 0.5 and 0.6 overlap, but every change is an improvement."""
    before = np.array([1] * 50 + [0] * 50)
    after = np.array([1] * 60 + [0] * 40)
    tasks = ["t"] * 100
    a, b = overall_estimate(before, range(100), tasks), overall_estimate(after, range(100), tasks)
    assert a.high > b.low
    difference = paired_difference(after, before, range(100), tasks)
    assert difference.low > 0
    assert difference.p_value < 0.01


def test_false_alarms_are_as_rare_as_promised():
    """Under the null, p < 0.05 in about one of twenty: 200 draws, at most 8 % here (three standard deviations are 4.6 %)."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        a, b = rng.integers(0, 2, (2, 30))
        alarms += paired_difference(a, b, range(30), ["a"] * 15 + ["b"] * 15, draws=500).p_value < 0.05
    assert alarms <= 16


def test_holm_by_hand():
    """0.01 * 3, 0.03 * 2, then max(0.04 * 1, 0.06); the given order is kept."""
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert list(corrected) == ["a", "b", "c"]
    assert list(corrected.values()) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06)]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_task_differences_carry_the_corrected_p():
    values, baseline = [1] * 20, [0] * 10 + [1] * 10
    found = paired_task_differences(values, baseline, range(20), ["a"] * 10 + ["b"] * 10)
    assert found["a"].mean == 1
    assert found["a"].p_holm == pytest.approx(2 * found["a"].p_value)
    assert found["b"].p_holm == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1], ["a", "a"]), "equally long; got 2, 1 and 2"),
        (([], [], []), "nothing to estimate"),
        (([math.nan], [1], ["a"]), "must be finite"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        overall_estimate(*arguments)


def test_unpaired_input_is_named():
    with pytest.raises(ValueError, match="one baseline value per value; got 2 and 1"):
        paired_difference([1, 2], [1], [0, 1], ["a", "a"])


def test_scores_have_the_bootstraps_interval_and_may_leave_the_unit_interval():
    found = task_means([-3.0, 5.0, 2.0, 2.0], ["p", "p", "q", "r"], ["a", "a", "a", "b"])
    assert (found["a"].mean, found["b"].mean) == (1.5, 2.0)  # prompts p (1) and q (2); r alone
    assert (found["a"].low, found["a"].high) == (1.0, 2.0)
    assert (found["a"].images, found["a"].prompts, found["b"].low) == (3, 2, 2.0)


def test_discordance_by_hand():
    """Gained 4, lost 1: two-sided binomial 2 x (5 + 1) / 2^5."""
    found = discordance([1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1])
    assert (found.gained, found.lost) == (4, 1)
    assert found.p_value == pytest.approx(12 / 32)
    assert discordance([1, 0], [1, 0]).p_value == 1.0
