"""The hard tier: its rows say what their prompts say, and what is held out in them is held out of training and of validation."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

from diffalign.shapes import hard
from diffalign.shapes.prompts import HELD_OUT_COLORS, HELD_OUT_RELATIONS, color_pairs, relation_pairs
from diffalign.shapes.scenes import COLORS, SHAPES
from diffalign.shapes.words import unknown_words
from tests.shapes.grammar import parse

ROWS = hard.metadata()
CARRIER = r"(?:a (?:photo|picture|drawing) of )?"
SHAPE = rf"({'|'.join(SHAPES)})"


def of(task: str) -> list[dict]:
    return [row for row in ROWS if row["tag"] == task]


def test_the_number_of_prompts_of_each_task():
    """The numbers that docs/shapes.md gives."""
    assert len({row["prompt"] for row in ROWS}) == len(ROWS) == 176
    assert Counter(row["tag"] for row in ROWS) == {"three_kinds": 56, "negation": 60, "relation_colors": 60}
    assert [row["tag"] for row in ROWS] == sorted((row["tag"] for row in ROWS), key=hard.TASKS.index)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    assert hard.metadata() == ROWS
    assert hard.metadata(44) != ROWS


def test_each_three_shapes_are_asked_for_once_in_the_order_of_the_clauses():
    asked = []
    for row in of("three_kinds"):
        shapes = re.fullmatch(rf"{CARRIER}a {SHAPE}, a {SHAPE} and a {SHAPE}", row["prompt"]).groups()
        assert row["include"] == [{"class": shape, "count": 1} for shape in shapes]
        asked.append(frozenset(shapes))
    assert Counter(asked) == Counter(map(frozenset, combinations(SHAPES, 3)))


def test_a_negation_names_the_thing_and_the_colour_that_it_must_not_have():
    asked = []
    for row in of("negation"):
        shape, color = re.fullmatch(rf"{CARRIER}a {SHAPE} that is not ({'|'.join(COLORS)})", row["prompt"]).groups()
        assert row["include"] == [{"class": shape, "count": 1, "not_color": color}]
        asked.append((shape, color))
    assert len(set(asked)) == len(asked)
    assert {shape for shape, _ in asked} == set(SHAPES)
    assert {color for _, color in asked} == set(COLORS)


def test_a_relation_with_colours_holds_out_one_or_the_other_and_nothing_of_validation():
    kinds = Counter()
    for row in of("relation_colors"):
        said = parse(row["prompt"])
        assert said.metadata() == {"include": row["include"]}
        colors, related = said.color_pairs(), said.relation_pairs()  # of the relation, both readings
        assert len(colors) == 2
        assert len({color for _, color in colors}) == 2
        assert not colors & HELD_OUT_COLORS["validation"]
        assert not related & HELD_OUT_RELATIONS["validation"]
        kinds[len(colors - set(color_pairs("train"))), bool(related - set(relation_pairs("train")))] += 1
    assert kinds == {(0, True): 30, (1, False): 30}


def test_every_held_out_pair_of_the_test_split_is_asked_for():
    said = [parse(row["prompt"]) for row in of("relation_colors")]
    assert set().union(*(s.color_pairs() for s in said)) >= HELD_OUT_COLORS["test"]
    assert set().union(*(s.relation_pairs() for s in said)) >= HELD_OUT_RELATIONS["test"]


def test_the_words_that_no_model_has_read_are_those_of_the_negation():
    """Of a list of three it is the form that is new."""
    strange = unknown_words([row["prompt"] for row in ROWS])
    assert set(strange) == {row["prompt"] for row in of("negation")}
    assert {word for words in strange.values() for word in words} == {"that", "is", "not"}
