"""The statistics against arithmetic done by hand, and against what must not change them."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from diffalign.reports.statistics import (
    clopper_pearson,
    discordance,
    effective_images,
    holm,
    mean_interval,
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


def test_clopper_pearson_by_hand():
    """0 of 10: at the rate p all ten miss with (1 - p)^10 = 0.025. Of 2: one hit or two at the rate p has 1 - (1 - p)^2 = 0.025."""
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert clopper_pearson(1, 10) == (pytest.approx(0.025**0.1), 1.0)
    assert clopper_pearson(0.5, 2) == (pytest.approx(1 - 0.975**0.5), pytest.approx(0.975**0.5))


def test_clopper_pearson_takes_part_of_a_trial():
    """The effective number of images is seldom whole; the interval lies between its neighbours'."""
    lows, highs = zip(*(clopper_pearson(0.5, n) for n in (6, 6.5, 7)), strict=True)
    assert lows[0] < lows[1] < lows[2]
    assert highs[0] > highs[1] > highs[2]


@pytest.mark.parametrize(("mean", "n"), [(-0.1, 10), (1.1, 10), (0.5, 0.5), (math.nan, 10)])
def test_clopper_pearson_refuses_what_is_no_proportion(mean, n):
    with pytest.raises(ValueError, match="clopper_pearson needs"):
        clopper_pearson(mean, n)


@pytest.mark.parametrize("estimate", [lambda *task: task_estimates(*task)["t"], overall_estimate], ids=["task", "overall of one task"])
def test_a_single_tasks_interval_covers_at_every_rate(estimate):
    """Exactly: the chances of all outcomes whose interval holds the rate, summed. Wilson's sum to 0.83 of 5 prompts at 0.036."""
    rates = np.linspace(0.02, 0.98, 961)
    for n in range(5, 61):
        found = [estimate([1] * hits + [0] * (n - hits), range(n), ["t"] * n) for hits in range(n + 1)]
        chance = binom.pmf(np.arange(n + 1)[:, None], n, rates)
        held = [(one.low <= rates) & (rates <= one.high) for one in found]
        assert (chance * held).sum(0).min() >= 0.95 - 1e-9


@pytest.mark.parametrize(("mean", "alike", "prompts"), [(0.5, 0.9, 5), (0.9, 0.2, 10), (0.95, 0.5, 40)])
def test_a_single_tasks_interval_covers_where_images_of_a_prompt_are_alike(mean, alike, prompts):
    """Four images a prompt, of correlation `alike`: a prompt's own rate has the beta distribution of that spread. Not exact: the spread is
    an estimate, and 0.925 of the last kind of run covers."""
    rng, strength = np.random.default_rng(0), 1 / alike - 1

    def interval(images):
        found = task_estimates(images.ravel(), np.repeat(np.arange(prompts), 4), ["t"] * images.size)["t"]
        return found.low, found.high

    def draw():
        return rng.random((prompts, 4)) < rng.beta(mean * strength, (1 - mean) * strength, (prompts, 1))

    assert coverage(draw, mean, interval) >= 0.92


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


def test_overall_interval_has_the_width_that_theory_gives():
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


def test_a_few_prompts_that_agree_are_no_proof():
    """Resampling gave 2 of 2 the interval [1, 1], and 7 of 12 in six tasks [.50, .67]."""
    two = overall_estimate([1, 1], range(2), ["t"] * 2)
    assert (two.low, two.high) == (pytest.approx(0.025**0.5), 1.0)  # two of two hit with p^2
    values = [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    seven = overall_estimate(values, range(12), [task for task in "abcdef" for _ in range(2)])
    assert 0.32 < seven.low < 0.40  # Wilson of 12 prompts, which knows no tasks, has [.32, .81]
    assert 0.75 < seven.high < 0.81
    scores = task_means([1.0, 1.0], range(2), ["t"] * 2)["t"]
    assert scores.low < 0.5


def test_one_task_of_verdicts_has_its_exact_interval_overall_too():
    assert overall_estimate([1, 1, 1, 0], range(4), ["t"] * 4) == task_estimates([1, 1, 1, 0], range(4), ["t"] * 4)["t"]


def coverage(draw, truth, interval, runs=1500):
    found = [interval(draw()) for _ in range(runs)]
    return np.mean([low - 1e-9 <= truth <= high + 1e-9 for low, high in found])


@pytest.mark.parametrize("prompts", [2, 10])
@pytest.mark.parametrize(("rate", "spread"), [(0.5, 0.3), (0.8, 0.2), (0.95, 0.05), (0.98, 0.02)])
def test_overall_intervals_cover_at_few_prompts_and_near_saturation(prompts, rate, spread):
    """Six tasks of different rates. Three standard deviations of 1,500 runs at 0.95 are 0.017."""
    rng, rates = np.random.default_rng(0), rate + np.linspace(-spread, spread, 6)
    assert coverage(lambda: list((rng.random((6, prompts)) < rates[:, None]).astype(float)), rates.mean(), mean_interval) >= 0.93


@pytest.mark.parametrize("ones", [0.8, 0.9])
@pytest.mark.parametrize("tasks", [1, 6])
def test_scores_that_are_mostly_perfect_cover(ones, tasks):
    """Student's t covers 0.58 for one task of ten prompts at 0.9: the low scores that carry the variance are seldom among them."""
    rng = np.random.default_rng(0)

    def draw():
        return list(np.where(rng.random((tasks, 10)) < ones, 1.0, rng.random((tasks, 10))))

    assert coverage(draw, ones + (1 - ones) / 2, mean_interval) >= 0.93


@pytest.mark.parametrize("tasks", [1, 6])
def test_scores_without_ends_cover(tasks):
    rng = np.random.default_rng(0)
    assert coverage(lambda: list(rng.normal(21.0, 1.5, (tasks, 10))), 21.0, mean_interval) >= 0.93


@pytest.mark.parametrize(("gained", "lost"), [(0.3, 0.1), (0.1, 0.02), (0.02, 0.0), (0.9, 0.0), (0.05, 0.05)])
@pytest.mark.parametrize("tasks", [1, 6])
def test_differences_cover_where_few_prompts_change(gained, lost, tasks):
    """Ten prompts a task. Resampling covers 0.17 for one task in which 2 % are gained: mostly it sees no change, and no spread."""
    rng, names = np.random.default_rng(0), [str(task) for task in range(tasks) for _ in range(10)]

    def interval(change):
        before = np.where(change == 1, 0, np.where(change == -1, 1, rng.integers(0, 2, len(change))))
        before[0] = 1 if change[0] != 1 else 0
        found = paired_difference(before + change, before, range(len(names)), names, draws=1)
        return found.low, found.high

    def draw():
        chance = rng.random(len(names))
        return (chance < gained).astype(int) - (chance > 1 - lost)

    assert coverage(draw, gained - lost, interval, runs=800) >= 0.92


def test_sign_flips_by_hand():
    """Three prompts, each better by 1: of the 8 sign patterns two reach |sum| = 3, so p = 1/4."""
    difference = paired_difference([1, 1, 1], [0, 0, 0], range(3), ["t"] * 3)
    assert difference.mean == 1
    assert (difference.low, difference.high) == (pytest.approx(1 - 1.96 * math.sqrt(1 / 4 / 3), abs=1e-3), 1)  # a lost half was not seen
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


def test_scores_have_students_interval_and_may_leave_the_unit_interval():
    """Two prompts, 1 and 2: 1.5 -+ 12.706 x 0.5, with one degree of freedom."""
    found = task_means([-3.0, 5.0, 2.0, 2.0], ["p", "p", "q", "r"], ["a", "a", "a", "b"])
    assert (found["a"].mean, found["b"].mean) == (1.5, 2.0)  # prompts p (1) and q (2); r alone
    assert (found["a"].low, found["a"].high) == (pytest.approx(1.5 - 6.353, abs=1e-3), pytest.approx(1.5 + 6.353, abs=1e-3))
    assert (found["a"].images, found["a"].prompts, found["b"].low) == (3, 2, 2.0)


def test_discordance_by_hand():
    """Gained 4, lost 1: two-sided binomial 2 x (5 + 1) / 2^5."""
    found = discordance([1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1])
    assert (found.gained, found.lost) == (4, 1)
    assert found.p_value == pytest.approx(12 / 32)
    assert discordance([1, 0], [1, 0]).p_value == 1.0
