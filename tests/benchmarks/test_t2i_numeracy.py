"""Numeracy: the prompt read, repeats dropped, scores by hand, then the recorded answers of the original code."""

import pytest

from diffalign.benchmarks.t2i_compbench.detections import Labelled
from diffalign.benchmarks.t2i_compbench.numeracy import Vocabulary, parse, score, without_repeats
from tests.benchmarks import recorded

WORDS = Vocabulary(
    ("dog", "fish", "sheep", "ice cream", "goldfish", "pen", "man"), ("dogs", "fish", "sheep", "ice creams", "goldfish", "pens", "men")
)


def several(label: str, count: int, at: float = 0.0) -> list[Labelled]:
    """Boxes side by side."""
    return [Labelled(label, 0.9, (200.0 * i, at, 200.0 * i + 100, at + 100)) for i in range(count)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("two dogs and a fish", [("dog", 2), ("fish", 1)]),
        ("three fish", [("fish", 3)]),  # singular and plural alike
        ("one sheep, four pens and an ice cream", [("sheep", 1), ("pen", 4), ("ice cream", 1)]),
        ("five ice creams melted", [("ice cream", 5)]),
        ("a tall dog", []),  # something stands between
        ("nine dogs", []),  # no number word beyond eight
        ("dogs and two", []),  # nothing follows
        ("three dog", [("dog", 3)]),
    ],
)
def test_parse(prompt, expected):
    assert parse(prompt, WORDS) == expected


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        ((0.0, 0.0, 100.0, 93.0), 1),  # IoU 94 / 101 = 0.93 with the last pixel counted
        ((0.0, 0.0, 100.0, 88.0), 1),  # IoU 0.88, but the second lies wholly in the first
        ((0.0, 0.0, 30.0, 30.0), 1),
        ((50.0, 0.0, 150.0, 100.0), 2),
        ((11.0, 0.0, 111.0, 100.0), 2),  # 90 of 101 columns: 0.891
        ((10.0, 0.0, 110.0, 100.0), 1),  # 91 of 101: 0.901 of each, though the IoU is 0.82
    ],
)
def test_what_counts_as_the_same_object(other, kept):
    first = Labelled("dog", 0.9, (0.0, 0.0, 100.0, 100.0))
    assert len(without_repeats([first, Labelled("dog", 0.8, other)])) == kept
    assert len(without_repeats([first, Labelled("cat", 0.8, other)])) == 2


@pytest.mark.parametrize(
    ("wanted", "objects", "expected"),
    [
        ([("dog", 2)], several("dog", 2), 1.0),
        ([("dog", 2)], several("dog", 3), 0.5),
        ([("dog", 2)], [], 0.0),
        ([("dog", 2), ("pen", 1)], several("dog", 2), 0.5),
        ([("dog", 2), ("pen", 1)], several("dog", 1) + several("pen", 1, 200), 0.75),
        ([("man", 1)], several("person", 1), 1.0),
        ([("painting", 1)], several("picture", 1), 1.0),
        ([("pen", 3)], several("pencil case", 3), 1.0),  # any label that contains the word
        ([("pen", 1)], several("pen", 1) + several("pencil case", 2, 200), 1.0),  # unless the word itself was found
        ([("pen", 1), ("pencil", 1)], several("pencil", 1), 0.5),  # the pen took the pencil
    ],
)
def test_score(wanted, objects, expected):
    assert score(wanted, objects) == pytest.approx(expected)


def test_a_prompt_that_counts_nothing_is_an_error():
    with pytest.raises(ValueError, match="no countable object"):
        score([], several("dog", 1))


def test_a_line_that_is_no_pair_is_named():
    assert Vocabulary.of(["Dog - dogs", "", "cat - cats"]) == Vocabulary(("dog", "cat"), ("dogs", "cats"))
    with pytest.raises(ValueError, match="line 2"):
        Vocabulary.of(["dog - dogs", "cat"])


def vocabulary() -> Vocabulary:
    return Vocabulary.of(recorded.path("t2i_compbench/new_objects.txt").read_text(encoding="utf-8").splitlines())


def test_agreement_on_parsing():
    words = vocabulary()
    for case in recorded.load("t2i_numeracy_parse_golden.json")["prompts"]:
        assert parse(case["prompt"], words) == list(zip(case["objects"], case["counts"], strict=True)), case["prompt"]


def test_every_prompt_of_the_benchmark_counts_something():
    words = vocabulary()
    prompts = recorded.path("t2i_compbench/numeracy_val.txt").read_text().splitlines()
    number = [len(parse(prompt, words)) for prompt in prompts if prompt.strip()]
    assert [number.count(n) for n in (1, 2, 3, 4, 5)] == [91, 89, 48, 37, 35]


def test_agreement_on_scores():
    words = vocabulary()
    for case in recorded.load("t2i_numeracy_golden.json")["cases"]:
        objects = [Labelled(d["label"], d["score"], tuple(d["box"])) for d in case["detections"]]
        assert score(parse(case["prompt"], words), objects) == pytest.approx(case["answer"], abs=1e-9), case["prompt"]
