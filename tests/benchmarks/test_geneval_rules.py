"""GenEval's rules: every rule worked by hand, then the answers of the original code on recorded detections where those are at hand."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.rules import (
    COLORS,
    RELATIONS,
    Detection,
    Limits,
    evaluate,
    iou,
    judge,
    keep,
    relative_position,
)
from tests.benchmarks import recorded

UPSTREAM = Limits()


def detection(score: float = 0.95, color: str = "red", box=(0, 0, 100, 100)) -> Detection:
    """The colour a classifier is to answer travels in the mask, which the rules never read."""
    return Detection(tuple(float(v) for v in box), score, mask=color)


def given_colors(_name: str, detections) -> list[str]:
    return [d.mask for d in detections]


def verdict(metadata: dict, detections: dict, limits: Limits = UPSTREAM):
    return judge(metadata, detections, given_colors, limits)


# --- which detections count ---------------------------------------------------------------------------------------------------


def test_a_score_equal_to_the_threshold_is_dropped_even_where_float64_would_keep_it():
    equal = float(np.float32(0.3))  # 0.30000001192..., greater than 0.3 in float64, equal in float32
    assert equal > 0.3
    assert keep([detection(equal)], 0.3, UPSTREAM) == []
    above = float(np.nextafter(np.float32(0.3), np.float32(1)))
    assert len(keep([detection(above)], 0.3, UPSTREAM)) == 1


def test_detections_are_kept_most_confident_first_and_capped_at_sixteen():
    scores = [0.31 + 0.01 * i for i in range(20)]
    kept = keep([detection(s) for s in scores], 0.3, UPSTREAM)
    assert [d.score for d in kept] == sorted(scores, reverse=True)[:16]


def test_the_cap_comes_before_suppression():
    """Three boxes, cap two: the second overlaps the first and goes; the third was cut by the cap before and does not return."""
    boxes = [detection(0.9), detection(0.8, box=(1, 0, 101, 100)), detection(0.7, box=(300, 0, 400, 100))]
    assert [d.score for d in keep(boxes, 0.3, Limits(max_objects=2, max_overlap=0.5))] == [0.9]


def test_suppression_drops_an_iou_equal_to_the_limit_and_is_off_at_one():
    """Boxes covering pixels 0..9 and 0..4 of one row have IoU 5/10 with the +1 convention; what is kept is below the limit."""
    a, b = detection(0.9, box=(0, 0, 9, 0)), detection(0.8, box=(0, 0, 4, 0))
    assert iou(a.box, b.box) == pytest.approx(0.5)
    assert keep([a, b], 0.3, Limits(max_overlap=0.5)) == [a]
    assert keep([a, b], 0.3, Limits(max_overlap=0.51)) == [a, b]
    assert keep([a, a], 0.3, Limits(max_overlap=1.0)) == [a, a]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 9, 9), (0, 0, 9, 9), 1.0),
        ((0, 0, 9, 9), (10, 0, 19, 9), 0.0),  # next to each other: not one common pixel
        ((0, 0, 9, 9), (9, 0, 18, 9), 10 / 190),  # one common column of ten pixels
        ((0, 0, 9, 9), (2, 2, 6, 6), 25 / 100),  # one inside the other
        ((0, 0, 9, 9), (50, 50, 59, 59), 0.0),  # apart on both axes: two negative extents make no intersection
    ],
)
def test_iou_counts_the_last_pixel(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == pytest.approx(expected)


def test_only_counting_uses_the_high_threshold_and_uses_it_for_every_class():
    row = {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    two_sure_one_not = {"dog": [detection(0.95), detection(0.95), detection(0.5)]}
    assert verdict({"tag": "counting", **row}, two_sure_one_not).correct
    assert verdict({"tag": "two_object", **row}, two_sure_one_not).reason == "expected dog<3, found 3"
    other_class = {"tag": "counting", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "cat", "count": 1}]}
    assert verdict(other_class, {"dog": [detection()], "cat": [detection(0.8)]}).correct


# --- presence and counts ------------------------------------------------------------------------------------------------------


def test_presence_means_at_least_and_says_what_was_found():
    row = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
    assert verdict(row, {"dog": [detection()] * 3, "cat": [detection()]}).correct
    missing = verdict(row, {"dog": [detection()]})
    assert (missing.correct, missing.reason) == (False, "expected cat>=1, found 0")
    assert verdict(row, {}).reason == "expected dog>=1, found 0\nexpected cat>=1, found 0"


@pytest.mark.parametrize(("present", "reason"), [(1, "expected dog>=2, found 1"), (2, ""), (3, "expected dog<3, found 3")])
def test_counting_is_exact(present, reason):
    row = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    result = verdict(row, {"dog": [detection()] * present})
    assert (result.correct, result.reason) == (reason == "", reason)


def test_an_excluded_class_fails_however_well_the_rest_fits_and_its_number_is_capped():
    row = {"tag": "two_object", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "cat", "count": 1}]}
    assert verdict(row, {"dog": [detection()]}).correct
    assert verdict(row, {"dog": [detection()], "cat": [detection()] * 20}).reason == "expected cat<1, found 16"


# --- colours ------------------------------------------------------------------------------------------------------------------


def test_colour_looks_only_at_the_most_confident_objects():
    row = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    assert verdict(row, {"dog": [detection(0.8, "blue"), detection(0.9, "red")]}).correct
    wrong = verdict(row, {"dog": [detection(0.9, "blue"), detection(0.8, "red")]})
    assert wrong.reason == "expected red dog>=1, found 0 red; and 1 blue"


def test_every_one_of_several_objects_must_have_the_colour_and_seen_colours_are_told_in_palette_order():
    row = {"tag": "colors", "include": [{"class": "dog", "count": 4, "color": "red"}]}
    seen = [detection(0.9 - i / 100, c) for i, c in enumerate(("white", "red", "blue", "white"))]
    assert verdict(row, {"dog": seen}).reason == "expected red dog>=4, found 1 red; and 1 red, 1 blue, 2 white"
    assert verdict(row, {"dog": [detection(0.9, "red")] * 4}).correct


def test_too_few_objects_end_the_clause_before_any_colour_is_asked_for():
    def never(_name, _detections):
        raise AssertionError("the colour classifier must not be called")

    row = {"tag": "color_attr", "include": [{"class": "dog", "count": 2, "color": "red"}]}
    assert evaluate(row, {"dog": [detection()]}, never).reason == "expected dog>=2, found 1"


def test_swapped_attributes_fail_both_clauses():
    row = {
        "tag": "color_attr",
        "include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"}],
    }
    assert verdict(row, {"dog": [detection(color="red")], "cat": [detection(color="blue")]}).correct
    swapped = verdict(row, {"dog": [detection(color="blue")], "cat": [detection(color="red")]})
    assert swapped.reason == "expected red dog>=1, found 0 red; and 1 blue\nexpected blue cat>=1, found 0 blue; and 1 red"


# --- positions ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        # Two 100 x 100 boxes: the slack is 0.1 * (100 + 100) = 20 on each axis. dx = (|41| - 20) / 41 = 0.512, (|40| - 20) / 40 = 0.5.
        ((41, 0), ("right of",)),
        ((40, 0), ()),
        ((-41, 0), ("left of",)),
        ((-40, 0), ()),
        ((0, 41), ("below",)),  # y grows downward
        ((0, -41), ("above",)),
        ((20, 20), ()),  # within the slack on both axes
        ((0, 0), ()),
        # The diagonal: (200 - 20) / (200 sqrt 2) = 0.636 on both axes, so two relations hold at once.
        ((200, 200), ("right of", "below")),
        ((-200, -200), ("left of", "above")),
        # (100 - 20) / 141.4 = 0.566 still; (60 - 20) / 84.9 = 0.471 no longer, the norm being that of the unrevised offset.
        ((100, 100), ("right of", "below")),
        ((60, 60), ()),
        # Far on one axis only: dy = (90 - 20) / 219.3 = 0.319.
        ((200, 90), ("right of",)),
    ],
)
def test_relative_position_of_equal_boxes(offset, expected):
    box = (offset[0], offset[1], offset[0] + 100, offset[1] + 100)
    assert relative_position(box, (0, 0, 100, 100)) == expected


def test_the_slack_grows_with_both_sizes_and_the_threshold():
    """A 10 x 10 box 41 px right of a 190 x 100 one: centres (41, 0) apart, slack again 20. At threshold 0.2 it is 40, and nothing holds."""
    small, wide = (131.0, 45.0, 141.0, 55.0), (0.0, 0.0, 190.0, 100.0)
    assert relative_position(small, wide) == ("right of",)
    assert relative_position(small, wide, position_threshold=0.2) == ()


def test_relations_mirror_when_the_boxes_change_places():
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (tuple(np.concatenate([corner := rng.integers(0, 200, 2), corner + rng.integers(5, 80, 2)]).tolist()) for _ in range(2))
        assert {mirrored[r] for r in relative_position(a, b)} == set(relative_position(b, a))


POSITION = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
}


def test_position_clause():
    cat = {"cat": [detection(box=(200, 0, 300, 100))]}
    assert verdict(POSITION, {**cat, "dog": [detection(box=(0, 0, 100, 100))]}).correct
    wrong = verdict(POSITION, {**cat, "dog": [detection(box=(400, 0, 500, 100))]})
    assert wrong.reason == "expected dog left of target, found right of target"
    neither = verdict(POSITION, {**cat, "dog": [detection(box=(200, 10, 300, 110))]})
    assert neither.reason == "expected dog left of target, found  target"
    both = verdict(POSITION, {**cat, "dog": [detection(box=(400, 200, 500, 300))]})
    assert both.reason == "expected dog left of target, found right of and below target"


def test_a_missing_target_is_told_apart_from_a_missing_subject():
    dog = {"dog": [detection()]}
    assert verdict(POSITION, dog).reason == "expected cat>=1, found 0\nno target for dog to be left of"
    assert verdict(POSITION, {"cat": [detection()]}).reason == "expected dog>=1, found 0"


def test_a_target_whose_own_colour_is_wrong_is_no_target():
    row = {
        "tag": "position",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    }
    found = {"cat": [detection(color="blue", box=(200, 0, 300, 100))], "dog": [detection()]}
    assert verdict(row, found).reason == "expected red cat>=1, found 0 red; and 1 blue\nno target for dog to be left of"


def test_position_looks_only_at_the_most_confident_of_each_class():
    cats = [detection(0.9, box=(200, 0, 300, 100)), detection(0.8, box=(900, 0, 999, 100))]
    dogs = [detection(0.8, box=(0, 0, 100, 100)), detection(0.9, box=(500, 0, 600, 100))]
    assert verdict(POSITION, {"cat": cats, "dog": dogs}).reason == "expected dog left of target, found right of target"


def test_with_several_of_each_every_pair_must_stand_in_the_relation():
    row = {
        "tag": "position",
        "include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["left of", 0]}],
    }
    cats = [detection(0.9, box=(500, 0, 600, 100)), detection(0.8, box=(800, 0, 900, 100))]
    left = [detection(0.9, box=(0, 0, 100, 100)), detection(0.8, box=(200, 0, 300, 100))]
    between = [detection(0.9, box=(0, 0, 100, 100)), detection(0.8, box=(650, 0, 750, 100))]
    assert verdict(row, {"cat": cats, "dog": left}).correct
    assert verdict(row, {"cat": cats, "dog": between}).reason == "expected dog left of target, found right of target"


def test_a_colour_failure_ends_the_clause_before_its_position():
    row = {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]}],
    }
    found = {"cat": [detection(box=(0, 0, 100, 100))], "dog": [detection(color="blue", box=(300, 0, 400, 100))]}
    assert verdict(row, found).reason == "expected red dog>=1, found 0 red; and 1 blue"


# --- what the original code answered ------------------------------------------------------------------------------------------


def test_agreement_with_the_original_rule_code():
    data = recorded.load("geneval_golden.json")
    assert tuple(data["colors"]) == COLORS
    assert data["default_options"] == vars(UPSTREAM)
    for case in data["cases"]:
        limits, tag = Limits(**case["options"]), case["metadata"]["tag"]
        detections: dict[str, list[Detection]] = {}
        for d in case["detections"]:
            detections.setdefault(d["class"], []).append(detection(d["score"], d["color"], d["box"]))

        threshold = limits.counting_threshold if tag == "counting" else limits.threshold
        kept = {name: [[*d.box, d.score] for d in keep(found, threshold, limits)] for name, found in detections.items()}
        assert {name: boxes for name, boxes in kept.items() if boxes} == case["expected"]["kept"], case["id"]

        result = verdict(case["metadata"], detections, limits)
        assert result.correct == case["expected"]["correct"], case["id"]
        assert result.reason in case["expected"]["reason_accepted"], case["id"]


def test_agreement_with_the_original_relations_and_iou():
    for pair in recorded.load("geneval_relative_position_golden.json")["pairs"]:
        held = relative_position(pair["a"], pair["b"], pair["position_threshold"])
        assert sorted(held) == pair["relations"], pair
        assert list(held) == [r for r in RELATIONS if r in held]
        assert iou(pair["a"], pair["b"]) == pytest.approx(pair["iou"], rel=1e-6), pair  # recorded in float32
