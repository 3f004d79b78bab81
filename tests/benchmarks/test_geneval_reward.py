"""Flow-GRPO's partial credit: each term worked by hand, then the recorded answers of its reward server."""

import pytest

from diffalign.benchmarks.geneval.partial_credit import partial_credit
from diffalign.rules import Detection, Limits
from tests.benchmarks import recorded

LEFT, RIGHT = (0.0, 0.0, 100.0, 100.0), (300.0, 0.0, 400.0, 100.0)


def found(number: int, color: str = "red", box=LEFT) -> list[Detection]:
    return [Detection(box, 0.99 - i / 1000, mask=color) for i in range(number)]


def credit(row: dict, detections: dict, limits: Limits = Limits()):  # noqa: B008  (frozen)
    return partial_credit({"tag": "any", **row}, detections, lambda _name, objects: [d.mask for d in objects], limits)


@pytest.mark.parametrize(("count", "present", "expected"), [(2, 2, 1.0), (2, 1, 0.5), (2, 3, 0.5), (4, 0, 0.0), (1, 5, -3.0)])
def test_counts(count, present, expected):
    result = credit({"include": [{"class": "dog", "count": count}]}, {"dog": found(present)})
    assert result.score == pytest.approx(expected)
    assert result.strict == (count == present)


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([*found(1, "red"), *found(1, "red")], 1.0),
        ([*found(1, "red"), *found(1, "blue")], (1 + 0.5) / 2),
        (found(1, "red"), (0.5 + 0) / 2),  # a wrong count is a nought for the colour, whatever the colours
        (found(3, "red"), (0.5 + 0) / 2),
    ],
)
def test_colours(detections, expected):
    row = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    assert credit(row, {"dog": detections}).score == pytest.approx(expected)


POSITION = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ({"cat": found(1, box=RIGHT), "dog": found(1, box=LEFT)}, 1.0),
        ({"cat": found(1, box=LEFT), "dog": found(1, box=RIGHT)}, (1 + 1 + 0 + 1) / 4),  # fails, yet a 1 follows the 0
        ({"dog": found(1)}, (0 + 1 + 0) / 3),  # no target
        ({"cat": found(1)}, (1 + 0 + 0) / 3),
        ({"cat": found(1, box=RIGHT), "dog": found(2, box=LEFT)}, (1 + 0 + 0) / 3),  # one dog too many, so no relation is looked at
    ],
)
def test_positions(detections, expected):
    result = credit(POSITION, detections)
    assert result.score == pytest.approx(expected)
    assert result.strict == (expected == 1)


def test_several_pairs_that_fail_cost_one_nought():
    row = {"include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["left of", 0]}]}
    assert credit(row, {"cat": found(2, box=LEFT), "dog": found(2, box=RIGHT)}).score == pytest.approx(3 / 4)


def test_exclude_is_ignored():
    row = {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "cat", "count": 1}]}
    assert credit(row, {"dog": found(1), "cat": found(1)}).strict


def test_a_colour_failure_ends_the_clause_before_its_position():
    row = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]}]}
    assert credit(row, {"cat": found(1, box=RIGHT), "dog": found(1, "blue")}).score == pytest.approx((1 + 1 + 0) / 3)


def test_agreement_with_the_reward_server():
    compared = 0
    for case in recorded.load("geneval_golden.json")["cases"]:
        if "flow_grpo_reward" not in case:
            continue
        detections: dict[str, list[Detection]] = {}
        for d in case["detections"]:
            detections.setdefault(d["class"], []).append(Detection(tuple(d["box"]), d["score"], mask=d["color"]))
        result = credit(case["metadata"], detections)
        assert result.score == pytest.approx(case["flow_grpo_reward"]["score"]), case["id"]
        assert result.strict == case["flow_grpo_reward"]["strict_correct"], case["id"]
        compared += 1
    assert compared > 100
