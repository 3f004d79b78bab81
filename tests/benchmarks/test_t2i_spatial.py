"""T2I-CompBench's spatial rules: each worked by hand, then the recorded answers of the original code."""

import numpy as np
import pytest
import torch

from diffalign.benchmarks.t2i_compbench.detections import FRAME, Labelled, overlap, to_frame
from diffalign.benchmarks.t2i_compbench.spatial import (
    BESIDE,
    RELATIONS_2D,
    RELATIONS_3D,
    Token,
    complex_objects,
    find_relation,
    position_2d,
    position_3d,
    published_mean,
    score_2d,
    score_3d,
    template_objects,
)
from tests.benchmarks import recorded


def box(x: float, y: float, size: float = 100.0):
    return (x, y, x + size, y + size)


def labelled(label: str, score: float, where) -> Labelled:
    return Labelled(label, score, tuple(map(float, where)))


# --- prompts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "objects"),
    [
        ("a girl on side of a desk", ("girl", "desk")),
        ("an airplane on the top of a bee", ("airplane", "bee")),
        ("a bee hidden by an apple", ("bee", "apple")),
    ],
)
def test_template_objects(prompt, objects):
    assert template_objects(prompt) == objects


def test_a_free_sentence_is_refused_by_the_template():
    with pytest.raises(ValueError, match="part-of-speech tagger"):
        template_objects("The red hat was on top of the brown coat rack.")


def test_relations_are_looked_for_in_upstreams_order():
    assert find_relation("a cup on the left of a key near a dog", RELATIONS_2D) == "near"
    assert find_relation("a cup on top of a key", RELATIONS_2D) == "on top of"
    assert find_relation("a cup hidden by a key", RELATIONS_3D) == "hidden"
    assert find_relation("a cup and a key", RELATIONS_2D) is None


def tagged(text: str) -> list[Token]:
    """ "word/POS" pairs."""
    return [Token(*pair.split("/")) for pair in text.split()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the/DET red/ADJ hat/NOUN was/AUX on/ADP top/NOUN of/ADP the/DET coat/NOUN rack/NOUN", ("hat", "coat")),
        ("the/DET dog/NOUN sat/VERB near/ADP a/DET tree/NOUN", ("dog", "tree")),
        ("the/DET dog/NOUN sat/VERB next/ADV to/ADP Big/PROPN Ben/PROPN today/ADV", ("dog", "Ben")),
        ("Tom/PROPN sat/VERB near/ADP a/DET tree/NOUN", ("Tom", "tree")),
        ("the/DET dog/NOUN ran/VERB", None),
        ("a/DET dog/NOUN near/ADP a/DET cat/NOUN near/ADP a/DET pig/NOUN", None),  # two prepositions, four objects
        ("a/DET dog/NOUN near/ADP Rome/PROPN", None),  # the last word has no successor, so it is not the end of a run
    ],
)
def test_complex_objects(text, expected):
    assert complex_objects(tagged(text)) == expected


# --- 2D -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relation", "a", "b", "expected"),
    [
        ("on the left of", box(0, 0), box(300, 50), 1.0),
        ("on the left of", box(300, 50), box(0, 0), 0.0),
        ("on the right of", box(300, 50), box(0, 0), 1.0),
        ("on the top of", box(0, 0), box(50, 300), 1.0),  # y grows downward
        ("on the bottom of", box(50, 300), box(0, 0), 1.0),
        ("on the left of", box(0, 0), box(200, 200), 0.0),  # the horizontal distance must be the greater
        ("on top of", box(0, 0), box(0, 300), 0.0),  # recognised, and never true
        (None, box(0, 0), box(0, 300), 0.0),
        # Shifted by half a side: IoU 50 * 100 / 15000 = 1/3, so 0.1 / (1/3).
        ("on the left of", box(0, 0), box(50, 0), 0.3),
        ("near", box(0, 0), box(149, 400), 1.0),  # one axis within 150 is enough
        ("near", box(0, 0), box(150, 300), 0.5),  # neither is: 150 / 300
        ("near", box(0, 0), box(0, 0), 1.0),  # overlap does not matter here
    ],
)
def test_position_2d(relation, a, b, expected):
    assert position_2d(relation, a, b) == pytest.approx(expected)


def test_all_words_for_beside_mean_the_same():
    assert {position_2d(relation, box(0, 0), box(200, 200)) for relation in BESIDE} == {0.75}


LEFT = "a dog on the left of a cat"


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ([labelled("dog", 0.8, box(0, 0)), labelled("cat", 0.6, box(300, 0))], 0.25 * 0.8 + 0.25 * 0.6 + 0.5),
        ([labelled("dog", 0.9, box(300, 0)), labelled("cat", 0.9, box(0, 0))], 0.0),  # 0.45 is below 0.5
        ([labelled("dog", 1.0, box(300, 0)), labelled("cat", 1.0, box(0, 0))], 0.5),  # 0.5 is not
        ([labelled("dog", 0.9, box(0, 0))], 0.0),
        ([labelled("dogs", 0.8, box(0, 0)), labelled("cat", 0.6, box(300, 0))], 0.0),  # labels match exactly
        # The first hit counts, so the second dog, well placed, does not.
        ([labelled("dog", 0.8, box(400, 0)), labelled("dog", 0.7, box(0, 0)), labelled("cat", 0.6, box(300, 0))], 0.0),
        ([], 0.0),
    ],
)
def test_score_2d(objects, expected):
    assert score_2d(LEFT, objects, template_objects(LEFT)) == pytest.approx(expected)


def test_people_are_persons():
    prompt = "a girl on the left of a desk"
    objects = [labelled("person", 0.8, box(0, 0)), labelled("desk", 0.6, box(300, 0))]
    assert score_2d(prompt, objects, template_objects(prompt)) == pytest.approx(0.85)


def test_a_sentence_without_a_pair_scores_nothing():
    assert score_2d("The dog ran.", [labelled("dog", 1.0, box(0, 0))], None) == 0.0


# --- 3D -----------------------------------------------------------------------------------------------------------------------


def depth_of(near) -> np.ndarray:
    """1 inside the box, given as x1, y1, x2, y2 in the order in which the published code reads it (rows by x), 0 outside."""
    depth = np.zeros((FRAME, FRAME))
    depth[near[0] : near[2], near[1] : near[3]] = 1
    return depth


@pytest.mark.parametrize(
    ("relation", "a", "b", "expected"),
    [
        # IoU of boxes shifted by 20 of 100 pixels: 80 / 120 = 2/3, above 0.5. A is the nearer one, by the strip that B does not share.
        ("in front of", box(0, 0), box(20, 0), 1.0),
        ("behind", box(0, 0), box(20, 0), 0.0),
        ("hidden", box(20, 0), box(0, 0), 1.0),
        # Shifted by 50: IoU 1/3, so (1/3) / 0.5.
        ("in front of", box(0, 0), box(50, 0), 2 / 3),
        ("in front of", box(0, 0), box(200, 0), 0.0),  # apart
        ("near", box(0, 0), box(20, 0), 0.0),
        (None, box(0, 0), box(20, 0), 0.0),
    ],
)
def test_position_3d(relation, a, b, expected):
    assert position_3d(relation, a, b, depth_of((0, 0, 20, 100))) == pytest.approx(expected)


def test_an_overlap_of_exactly_one_half_scores_nothing():
    a, b = (0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 100.0, 50.0)
    assert overlap(a, b) == 0.5
    assert position_3d("in front of", b, a, depth_of((0, 0, 100, 50))) == 0.0


def test_the_published_depth_is_transposed():
    """The near strip is at rows 0..20 of the map. Read as published, that is x 0..20; read right, y 0..20."""
    depth = depth_of((0, 0, 20, 479))
    a, b = box(0, 100), box(20, 100)
    assert position_3d("in front of", a, b, depth) == 1.0
    assert position_3d("in front of", a, b, depth, depth_axes="corrected") == 0.0
    assert position_3d("in front of", box(100, 0), box(100, 20), depth, depth_axes="corrected") == 1.0
    with pytest.raises(ValueError, match="depth_axes"):
        position_3d("in front of", a, b, depth, depth_axes="right")


def test_a_box_without_pixels_has_no_depth():
    assert position_3d("in front of", (5.0, 5.0, 5.2, 5.2), (5.0, 5.0, 5.3, 5.3), depth_of((0, 0, 20, 20))) == 0.0


def test_score_3d_keeps_small_scores_and_matches_substrings():
    prompt, depth = "a cat behind a car", np.zeros((FRAME, FRAME))
    assert score_3d(prompt, [labelled("cat", 0.8, box(0, 0))], ("cat", "car"), depth) == pytest.approx(0.2)
    cattle_and_carrot = [labelled("cattle", 0.8, box(0, 0)), labelled("carrot", 0.6, box(300, 0))]
    assert score_3d(prompt, cattle_and_carrot, ("cat", "car"), depth) == pytest.approx(0.35)


def test_the_last_object_seen_before_both_are_found_counts():
    prompt, depth = "a cat behind a car", np.zeros((FRAME, FRAME))
    cats = [labelled("cat", 0.8, box(0, 0)), labelled("cat", 0.6, box(0, 0))]
    car = [labelled("car", 0.4, box(300, 0))]
    assert score_3d(prompt, cats + car, ("cat", "car"), depth) == pytest.approx(0.25 * (0.6 + 0.4))
    assert score_3d(prompt, cats[:1] + car + cats[1:], ("cat", "car"), depth) == pytest.approx(0.25 * (0.8 + 0.4))
    assert score_3d(prompt, cats, ("cat", "car"), depth) == pytest.approx(0.25 * 0.8)  # one alone: its first


def test_boxes_go_to_the_frame_by_the_short_side():
    assert to_frame((0.0, 0.0, 512.0, 256.0), 1024, 512) == pytest.approx((0, 0, FRAME, FRAME / 2))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_published_mean_is_that_of_torch_with_eight_threads_whatever_their_number_here():
    """Flat and rough maps, regions of one run (at most 32768 values), of several, and whole rows, which lie in one piece."""
    rng = np.random.default_rng(0)
    maps = [np.full((FRAME, FRAME), 0.38, np.float32), rng.random((FRAME, FRAME), dtype=np.float32)]
    corners = [(0, 0, 479, 479), (20, 0, 400, 479), (43, 138, 232, 316), (5, 7, 405, 300), (1, 1, 478, 70), (9, 9, 99, 99), (4, 0, 5, 479)]
    regions = [depth[x1:x2, y1:y2] for depth in maps for x1, y1, x2, y2 in corners]
    ours = [published_mean(region) for region in regions]
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    theirs = [float(torch.from_numpy(region).mean()) for region in regions]
    torch.set_num_threads(before)
    assert ours == theirs


# --- what the original code answered ------------------------------------------------------------------------------------------


def objects_of(case) -> list[Labelled]:
    return [labelled(d["label"], d["score"], d["box"]) for d in case["detections"]]


def test_every_template_prompt_names_two_objects():
    for name in ("spatial_val.txt", "3d_spatial_val.txt"):
        prompts = [line for line in recorded.path(f"t2i_compbench/{name}").read_text().splitlines() if line.strip()]
        assert len(prompts) == 300
        for prompt in prompts:
            assert all(template_objects(prompt))
            assert find_relation(prompt, RELATIONS_3D if name.startswith("3d") else RELATIONS_2D)


def test_agreement_on_positions():
    pairs = recorded.load("t2i_2d_position_golden.json")["pairs"]
    for pair in pairs:
        assert position_2d(pair["locality"], pair["a"], pair["b"]) == pytest.approx(pair["score"], abs=1e-9), pair
    assert len(pairs) > 100


def test_agreement_in_2d():
    for case in recorded.load("t2i_2d_spatial_golden.json")["cases"]:
        score = score_2d(case["prompt"], objects_of(case), template_objects(case["prompt"]))
        assert score == pytest.approx(case["answer"], abs=1e-7), case["prompt"]


@pytest.mark.usefixtures("threads")
def test_agreement_in_3d():
    for case in recorded.load("t2i_3d_spatial_golden.json")["cases"]:
        depth = np.full((FRAME, FRAME), case["depth"]["base"], dtype=np.float32)
        for x1, y1, x2, y2, value in case["depth"]["rects"]:
            depth[y1:y2, x1:x2] = value
        score = score_3d(case["prompt"], objects_of(case), template_objects(case["prompt"]), depth)
        assert score == pytest.approx(case["answer"], abs=1e-6), case
