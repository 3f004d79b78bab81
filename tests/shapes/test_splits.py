"""What is held out stays out: training never shows a held-out combination, every held-out prompt of composition asks for one."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest

from diffalign.rules import RELATIONS, TASKS
from diffalign.shapes import hard
from diffalign.shapes.captions import draw_scene, long_caption, relations, short_caption
from diffalign.shapes.prompts import (
    HELD_OUT_COLORS,
    HELD_OUT_RELATIONS,
    SPLITS,
    color_pairs,
    metadata,
    prompts,
    relation_pairs,
)
from diffalign.shapes.scenes import COLORS, SHAPES, Scene
from tests.shapes.grammar import OPPOSITE, parse

ALL_COLORS = frozenset().union(*HELD_OUT_COLORS.values())
ALL_RELATIONS = frozenset().union(*HELD_OUT_RELATIONS.values())
EVERYTHING = 1_000_000  # more rows than any task has


def shown(scene: Scene) -> tuple[set, set]:
    """The (shape, colour) and (shape, relation) pairs that a scene shows."""
    colors = {(t.shape, t.color) for t in scene.things}
    related = {(a.shape, r) for a in scene.things for b in scene.things if a.shape != b.shape for r in relations(a, b)}
    return colors, related


def asked(row: dict) -> tuple[set, set]:
    """The pairs that a prompt asks for; of a relation, the subject's."""
    colors = {(c["class"], c["color"]) for c in row["include"] if "color" in c}
    related = {(c["class"], c["position"][0]) for c in row["include"] if "position" in c}
    return colors, related


# --- scenes and captions ------------------------------------------------------------------------------------------------------


def test_training_scenes_and_their_captions_never_show_a_held_out_pair():
    rng = np.random.default_rng(11)
    seen_colors, seen_relations = set(), set()
    for _ in range(2000):
        scene = draw_scene(rng, "train")
        colors, related = shown(scene)
        assert not colors & ALL_COLORS
        assert not related & ALL_RELATIONS
        seen_colors |= colors
        seen_relations |= related
        caption = parse(short_caption(rng, scene))
        assert not caption.color_pairs() & ALL_COLORS
        assert not caption.relation_pairs() & ALL_RELATIONS
        assert not any(f" {color} {shape} " in f" {long_caption(rng, scene)} " for shape, color in ALL_COLORS)
    assert seen_colors == set(color_pairs("train"))  # nothing is held out beyond what is declared
    assert seen_relations == set(relation_pairs("train"))


def test_the_training_data_of_the_models_is_drawn_from_training_scenes():
    data = pytest.importorskip("diffalign.shapes.train.data")
    drawn = data.draw(200, seed=3)
    for scene, captions in zip(drawn.scenes, drawn.captions, strict=True):
        colors, related = shown(scene)
        assert not colors & ALL_COLORS
        assert not related & ALL_RELATIONS
        assert not any(f" {color} {shape} " in f" {text} " for text in captions for shape, color in ALL_COLORS)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_other_scenes_show_every_held_out_pair(split):
    """So that the test above could fail: without the filter the pairs do turn up."""
    rng = np.random.default_rng(12)
    pairs = [shown(draw_scene(rng, split)) for _ in range(2000)]
    assert set().union(*(colors for colors, _ in pairs)) >= ALL_COLORS
    assert set().union(*(related for _, related in pairs)) >= ALL_RELATIONS


# --- which pair belongs where -------------------------------------------------------------------------------------------------


def test_every_pair_belongs_to_exactly_one_split():
    assert Counter(p for split in SPLITS for p in color_pairs(split)) == Counter(product(SHAPES, COLORS))
    assert Counter(p for split in SPLITS for p in relation_pairs(split)) == Counter(product(SHAPES, RELATIONS))
    for split in ("validation", "test"):
        assert set(color_pairs(split)) == HELD_OUT_COLORS[split]
        assert set(relation_pairs(split)) == HELD_OUT_RELATIONS[split]


def test_every_part_of_a_held_out_pair_is_seen_in_training():
    """Only the combination is new: each shape, colour and relation occurs in training with others."""
    for pairs in (color_pairs("train"), relation_pairs("train")):
        shapes, seconds = {a for a, _ in pairs}, {b for _, b in pairs}
        assert shapes == set(SHAPES)
        assert seconds == set(COLORS) or seconds == set(RELATIONS)


# --- prompts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_held_out_prompt_but_those_of_one_plain_thing_asks_for_a_pair_of_its_own_split(split):
    (other,) = {"validation", "test"} - {split}
    for row in metadata(split, per_task=EVERYTHING):
        colors, related = asked(row)
        if row["tag"] == "position":
            assert related
            assert related <= HELD_OUT_RELATIONS[split], row
        elif row["tag"] != "single_object":
            assert colors & HELD_OUT_COLORS[split], row
        assert not colors & HELD_OUT_COLORS[other], row
        assert not related & HELD_OUT_RELATIONS[other], row


def test_no_training_prompt_asks_for_a_held_out_pair():
    for row in metadata("train", per_task=EVERYTHING):
        said = parse(row["prompt"])
        assert not said.color_pairs() & ALL_COLORS, row
        assert not said.relation_pairs() & ALL_RELATIONS, row


def meaning(row: dict) -> tuple:
    """What an image of it shows, whatever the wording: carriers, the order of two things and the two readings of a relation are alike."""
    things = frozenset((c["class"], c.get("color"), c.get("not_color"), c["count"]) for c in row["include"])
    related = frozenset()
    for clause in row["include"]:
        if "position" in clause:
            relation, target = clause["position"][0], row["include"][clause["position"][1]]["class"]
            related = frozenset({(clause["class"], relation), (target, OPPOSITE[relation])})
    return things, related


def test_no_two_splits_nor_the_hard_tier_describe_the_same_image():
    """But for plain single objects, of which there are as many as shapes: they are in every split."""
    rows = {split: metadata(split, per_task=EVERYTHING) for split in SPLITS} | {"hard": hard.metadata()}
    meanings = {name: {meaning(row) for row in found if row["tag"] != "single_object"} for name, found in rows.items()}
    for a, b in combinations(meanings, 2):
        assert meanings[a]
        assert not meanings[a] & meanings[b], (a, b)


def test_two_readings_of_one_image_mean_the_same():
    """So that the test above could fail: these two were once in validation and test."""
    ring, circle = ({"class": shape, "count": 1} for shape in ("ring", "circle"))
    one = {"include": [circle, ring | {"position": ["left of", 0]}]}
    other = {"include": [ring, circle | {"position": ["right of", 0]}]}
    assert meaning(one) == meaning(other)
    assert meaning(one) != meaning({"include": [circle, ring | {"position": ["right of", 0]}]})
    assert "a ring left of a heart" in prompts("validation", per_task=EVERYTHING)
    assert "a ring left of a circle" not in prompts("validation", per_task=EVERYTHING)
    assert "a circle right of a ring" in prompts("test", per_task=EVERYTHING)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_distinct_and_ordered_by_task(split):
    rows = metadata(split)
    assert len({row["prompt"] for row in rows}) == len(rows)
    tags = [row["tag"] for row in rows]
    assert tags == sorted(tags, key=TASKS.index)
    counts = Counter(tags)
    assert set(counts) == set(TASKS)
    assert max(counts.values()) == 150


@pytest.mark.parametrize(
    ("split", "numbers"),
    [("test", (32, 150, 120, 40, 112, 150)), ("validation", (32, 150, 48, 16, 48, 150)), ("train", (32, 150, 96, 150, 150, 150))],
)
def test_the_number_of_prompts_of_each_task(split, numbers):
    """The numbers that docs/shapes.md gives; figures of runs with others are not comparable."""
    assert Counter(row["tag"] for row in metadata(split)) == dict(zip(TASKS, numbers, strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_fewer_of_each_task_are_some_of_the_more(split):
    few, more = metadata(split, per_task=20), metadata(split)
    assert len(few) < len(more)
    assert all(row in more for row in few)


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(split):
    assert metadata(split) == metadata(split)
    assert metadata(split, seed=44) != metadata(split)
    assert prompts(split) == [row["prompt"] for row in metadata(split)]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_genevals_schema_and_say_what_their_prompt_says(split):
    for row in metadata(split):
        assert set(row) == {"tag", "include", "prompt"} | ({"exclude"} if row["tag"] == "counting" else set())
        for clause in row["include"]:
            assert set(clause) <= {"class", "count", "color", "position"}
            assert clause["class"] in SHAPES
        expected = parse(row["prompt"]).metadata()
        assert {key: row[key] for key in expected} == expected
        assert ("exclude" in row) == ("exclude" in expected)
        coloured = 0 if split == "train" else 1
        clauses_colors_relations = {
            "single_object": (1, 0, 0),
            "two_object": (2, coloured, 0),
            "counting": (1, coloured, 0),
            "colors": (1, 1, 0),
            "position": (2, 0, 1),
            "color_attr": (2, 2, 0),
        }[row["tag"]]
        found = (len(row["include"]), *(sum(key in clause for clause in row["include"]) for key in ("color", "position")))
        assert found == clauses_colors_relations


def test_an_unknown_split_is_an_error_that_lists_the_splits():
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test; got 'dev'"):
        metadata("dev")
