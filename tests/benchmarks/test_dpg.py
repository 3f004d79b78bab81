"""DPG-Bench: dependencies and categories by hand, then the recorded answers of the original code."""

import pytest
from PIL import Image

from diffalign.benchmarks.dpg.questions import category_scores, from_grid, image_score, parse_questions, to_grid
from tests.benchmarks import recorded

CHAIN = {1: [0], 2: [1], 3: [2], 4: [0]}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (("yes", "yes", "yes", "yes"), 1.0),
        (("no", "yes", "yes", "yes"), 0.25),  # the second falls with the first, and the third with the second
        (("yes", "no", "yes", "yes"), 0.5),
        (("yes", "Yes", "yes", "no"), 0.25),  # only "yes" is yes
    ],
)
def test_a_question_needs_its_parents(answers, expected):
    assert image_score(CHAIN, dict(enumerate(answers, 1))) == expected


def test_an_item_is_the_mean_of_its_images():
    images = [dict.fromkeys(CHAIN, "yes"), dict.fromkeys(CHAIN, "no")]
    assert sum(image_score(CHAIN, image) for image in images) / len(images) == 0.5


@pytest.mark.parametrize(
    ("parents", "answers", "message"), [(CHAIN, {1: "yes"}, "one answer per question"), ({1: [7]}, {1: "yes"}, r"depends on \[7\]")]
)
def test_wrong_questions_are_named(parents, answers, message):
    with pytest.raises(ValueError, match=message):
        image_score(parents, answers)


HEAD = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
ROWS = (
    "a,t,k,1,0,entity,whole,entity - whole (dog),Is there a dog?\n"
    'a,t,k,2,"0, 1",attribute,color,"attribute - color (dog, red)",Is the dog red?\n'
    "b,t,k,1,0,global,,global (photo),Is it a photo?\n"
)


def test_questions_are_read_whole():
    questions = parse_questions(HEAD + ROWS, "dpg_bench.csv")
    assert questions["a"].parents == {1: [0], 2: [0, 1]}
    assert questions["a"].category == {1: "entity - whole", 2: "attribute - color"}
    assert questions["b"].text == {1: "Is it a photo?"}


@pytest.mark.parametrize(
    ("text", "message"), [("a,b\n1,2\n", "lacks the columns"), (HEAD + ROWS.replace('"0, 1"', '"0, 5"'), r"depends on \[5\]")]
)
def test_a_wrong_questions_file_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_questions(text, "dpg_bench.csv")


def test_categories_take_raw_answers_of_all_images():
    answers = {"a": [{1: "no", 2: "yes"}, {1: "yes", 2: "yes"}], "b": [{1: "yes"}, {1: "no"}]}
    scores = category_scores(parse_questions(HEAD + ROWS, "dpg_bench.csv"), answers)
    assert scores == {"attribute": 100, "entity": 50, "global": 50, "attribute - color": 100, "entity - whole": 50}


def test_grid_and_back():
    tiles = [Image.new("RGB", (8, 6), color) for color in ("red", "green", "blue", "white")]
    grid = to_grid(tiles)
    assert grid.size == (16, 12)
    assert [tile.getpixel((0, 0)) for tile in from_grid(grid)] == [tile.getpixel((0, 0)) for tile in tiles]
    assert from_grid(to_grid(tiles[:1]), 1)[0].size == (8, 6)
    with pytest.raises(ValueError, match="1 or 4 images"):
        to_grid(tiles[:3])
    with pytest.raises(ValueError, match="even sides"):
        from_grid(Image.new("RGB", (9, 8)))


def test_agreement_on_scores():
    for case in recorded.load("dpg_scoring_golden.json")["cases"]:
        parents = {int(question): needed for question, needed in case["dependency"].items()}
        images = [{int(question): answer for question, answer in image.items()} for image in case["answers"]]
        assert [image_score(parents, image) for image in images] == pytest.approx(case["expected"]["per_image"])
        mean = sum(image_score(parents, image) for image in images) / len(images)
        assert mean == pytest.approx(case["expected"]["item_score"])
