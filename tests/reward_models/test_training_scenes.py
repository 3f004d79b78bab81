"""The exact knowledge behind the reward trainings: claims and their truth, twins, votes, composition, damage."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from diffalign.rules import Detection, Limits, judge
from diffalign.shapes.captions import WRONGS, draw_scene, long_caption, relations, short_caption, wrong_caption
from diffalign.shapes.detector import judge_images
from diffalign.shapes.prompts import prompts
from diffalign.shapes.scenes import SHAPES, SIZE, Scene, Thing, coverage, render
from diffalign.shapes.train import rewards_aesthetic, rewards_images, rewards_report, rewards_votes
from diffalign.shapes.train import rewards_scenes as worlds

RED_LEFT_OF_BLUE = Scene((Thing("circle", "red", 16, 32, 10), Thing("square", "blue", 48, 32, 10)))
THREE_STARS = Scene(tuple(Thing("star", color, 12 + 20 * i, 32, 9) for i, color in enumerate(("green", "green", "black"))))


def true_of(scene: Scene, caption: str) -> bool:
    claim = torch.tensor([worlds.read_claim(caption).encode()])
    return worlds.holds(worlds.tabulate([scene]), claim).item()


@pytest.mark.parametrize(
    ("caption", "left_right", "stars"),
    [
        ("a photo of a red circle left of a blue square", True, False),
        ("a circle left of a square", True, False),
        ("a square right of a circle", True, False),
        ("a drawing of a square left of a circle", False, False),
        ("a blue circle and a red square", False, False),
        ("a red circle and a square", True, False),
        ("a circle above a square", False, False),
        ("a circle", True, False),
        ("two circles", False, False),
        ("three stars", False, True),
        ("two stars", False, False),
        ("two green stars", False, False),  # two are green, but there is a third: GenEval excludes it
        ("a black star", False, True),
        ("a red star", False, False),
    ],
)
def test_what_holds_of_two_scenes(caption, left_right, stars):
    assert true_of(RED_LEFT_OF_BLUE, caption) is left_right
    assert true_of(THREE_STARS, caption) is stars


def metadata(claim: worlds.Claim) -> dict:
    """A claim in GenEval's schema."""

    def clause(kind: worlds.Kind, count: int = 1) -> dict:
        return {"class": kind[0], "count": count} | ({"color": kind[1]} if kind[1] else {})

    first = clause(claim.first, claim.count)
    if claim.second is None:
        exclude = [{"class": claim.first[0], "count": claim.count + 1}] if claim.count > 1 else []
        return {"tag": "any", "include": [first], "exclude": exclude}
    if claim.relation is None:
        return {"tag": "any", "include": [first, clause(claim.second)]}
    return {"tag": "any", "include": [clause(claim.second), first | {"position": [claim.relation, 0]}]}


def true_detections(scene: Scene) -> dict[str, list[Detection]]:
    found: dict[str, list[Detection]] = {}
    for thing in scene.things:
        found.setdefault(thing.shape, []).append(Detection(thing.box, 1.0, thing.color))
    return found


def genevals(claim: worlds.Claim, scene: Scene) -> bool:
    return judge(metadata(claim), true_detections(scene), lambda _, found: [d.mask for d in found], Limits()).correct


def test_the_truth_of_every_claim_in_every_scene_is_genevals():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, "test") for _ in range(120)]
    captions = [c for scene in scenes[:60] for c in (short_caption(rng, scene), wrong_caption(rng, scene)[0])] + prompts("test")[::4]
    claims = [worlds.read_claim(caption) for caption in captions]
    ours = worlds.holds(worlds.tabulate(scenes), torch.tensor([claim.encode() for claim in claims]))
    theirs = torch.tensor([[genevals(claim, scene) for claim in claims] for scene in scenes])
    repeated = torch.tensor([[c.count == 1 and sum(t.shape == c.first[0] for t in s.things) > 1 for c in claims] for s in scenes])
    assert ours.float().mean() > 0.01
    assert repeated.float().mean() < 0.1
    assert torch.equal(ours[~repeated], theirs[~repeated])
    assert (ours | ~theirs).all()  # of several such things GenEval looks at one, so whatever it grants holds here too


def test_captions_of_a_scene_are_true_and_wrong_ones_false():
    rng = np.random.default_rng(1)
    for _ in range(150):
        scene = draw_scene(rng, "validation")
        assert true_of(scene, short_caption(rng, scene))
        assert not true_of(scene, wrong_caption(rng, scene)[0])


def test_other_captions_are_no_claims():
    rng = np.random.default_rng(2)
    for caption in (long_caption(rng, RED_LEFT_OF_BLUE), "a photo of a cat", "", "five stars", "a very red circle", "a mauve circle"):
        with pytest.raises(ValueError, match="is not a short caption"):
            worlds.read_claim(caption)


def test_a_claim_that_cannot_be_held_holds_of_nothing():
    assert not worlds.holds(worlds.tabulate([RED_LEFT_OF_BLUE, THREE_STARS]), torch.tensor([worlds.UNKNOWN])).any()


def test_negatives_name_no_held_out_pair():
    assert not worlds.claim_allowed(worlds.read_claim("an orange circle"))  # test's colour pair
    assert not worlds.claim_allowed(worlds.read_claim("a circle right of a star"))  # test's relation
    assert not worlds.claim_allowed(worlds.read_claim("a star left of a circle"))  # the same scene in other words
    assert worlds.claim_allowed(worlds.read_claim("a red circle left of a heart"))
    rng = np.random.default_rng(3)
    for _ in range(100):
        scene = draw_scene(rng)
        captions = worlds.wrong_captions(rng, scene, 3)
        assert len(captions) == 3
        for caption in captions:
            assert worlds.claim_allowed(worlds.read_claim(caption))
            assert not true_of(scene, caption)


def test_twins_differ_in_the_respect_named_and_stay_in_the_split():
    rng = np.random.default_rng(4)
    kinds = Counter()
    for _ in range(250):
        scene = draw_scene(rng)
        other, kind = worlds.twin(rng, scene)
        kinds[kind] += 1
        assert worlds.scene_allowed(scene)
        assert worlds.scene_allowed(other)
        short_caption(rng, other)  # every twin can be named
        assert not overlapping(other)
        before, after = scene.things, other.things
        if kind == "count":
            assert abs(len(before) - len(after)) == 1
        elif kind == "swapped_colors":
            assert [t.color for t in after] == [t.color for t in before][::-1]
            assert [(t.shape, t.x, t.y) for t in after] == [(t.shape, t.x, t.y) for t in before]
        elif kind == "swapped_relation":
            assert set(relations(*after)) == set(relations(*before[::-1]))
        else:
            unchanged = {"color": "shape", "shape": "color"}[kind]
            assert [(getattr(t, unchanged), t.x, t.y) for t in after] == [(getattr(t, unchanged), t.x, t.y) for t in before]
            assert [getattr(t, kind) for t in after] != [getattr(t, kind) for t in before]
    assert set(kinds) == set(WRONGS)


def overlapping(scene: Scene) -> bool:
    return bool((np.stack([coverage(t) for t in scene.things]).sum(axis=0) > 1.01).any())


def test_a_twin_that_cannot_be_is_none():
    rng = np.random.default_rng(5)
    assert worlds.twin(rng, Scene((Thing("circle", "red", 32, 32, 10),)), "swapped_colors") is None
    assert worlds.twin(rng, THREE_STARS, "swapped_relation") is None


def test_tables_tell_pairs_relations_and_number():
    tables = worlds.tabulate([RED_LEFT_OF_BLUE])
    facts = tables.facts[0].nonzero().flatten().tolist()
    circle, square = SHAPES.index("circle"), SHAPES.index("square")
    red, blue = worlds.COLOR_NAMES.index("red"), worlds.COLOR_NAMES.index("blue")
    assert facts == [circle * 10 + red, square * 10 + blue, 80 + circle * 4 + 0, 80 + square * 4 + 1, worlds.FACTS - 4 + 1]
    assert not worlds.taught_facts()[circle * 10 + worlds.COLOR_NAMES.index("orange")]


def test_evaluation_scenes_are_held_out_ones():
    rng = np.random.default_rng(6)
    for split in ("validation", "test"):
        for _ in range(20):
            assert not worlds.scene_allowed(rewards_report.held_out_scene(rng, split))
    assert worlds.scene_allowed(rewards_report.held_out_scene(rng, "train"))


@pytest.mark.parametrize("kind", WRONGS)
def test_evaluation_cases_are_right_and_wrong_as_they_say(kind):
    rng = np.random.default_rng(7)
    images, true, wrong = rewards_report.caption_cases(rng, "test", kind, 3)
    assert images.shape == (3, SIZE, SIZE, 3)
    assert [worlds.split_carrier(c)[0] for c in true] == [worlds.split_carrier(c)[0] for c in wrong]
    right, left, captions = rewards_report.image_cases(rng, "test", kind, 3)
    assert all(not torch.equal(a, b) for a, b in zip(right, left, strict=True))
    assert len(captions) == 3


def test_retrieval_of_the_judge_is_perfect_and_of_a_constant_nil():
    """The exact detector, asked whether the caption holds, as a score; and a score that always ties."""

    def exact(images, captions):
        rows = [metadata(worlds.read_claim(caption)) for caption in captions]
        return torch.tensor([float(verdict.correct) for verdict in judge_images(images.numpy(), rows)])

    perfect = rewards_report.retrieval(exact, "validation", 0, 3)
    useless = rewards_report.retrieval(lambda images, captions: torch.zeros(len(images)), "validation", 0, 1)
    for side in ("captions", "images"):
        assert perfect[side]["all"]["value"] > 0.9
        assert perfect[side]["all"]["n"] == 3 * len(WRONGS)
        assert useless[side]["all"]["value"] == 0


def test_utility_by_hand():
    """3 for the truth + 1.5 x 0.5 for half damage + 0.75 x 0.8 purity + 0.75 x (10 - 6) / (largest - 6) for size - 0.75 for the square."""
    claim = worlds.read_claim("a red circle")
    size = (10 - 6) / (rewards_votes.LARGEST - 6)
    assert rewards_votes.utility(RED_LEFT_OF_BLUE, True, 0.5, 0.8, claim) == pytest.approx(3 + 0.75 + 0.6 + 0.75 * size - 0.75)
    assert rewards_votes.utility(RED_LEFT_OF_BLUE, False, 0.0, 1.0, None) == pytest.approx(1.5 + 0.75 + 0.75 * size)


def test_votes_repeat_and_their_ceiling_is_between_chance_and_certainty():
    votes, again = (rewards_votes.draw_votes(40, 1, "validation") for _ in range(2))
    assert torch.equal(votes.images, again.images)
    assert votes.prompts == again.prompts
    assert torch.equal(votes.probability, again.probability)
    lapse = rewards_votes.LAPSE / 2
    assert (votes.probability > lapse).all()
    assert (votes.probability < 1 - lapse).all()
    assert 0.6 < votes.ceiling < 1 - lapse
    share = votes.cast(torch.Generator().manual_seed(0), 2000)
    torch.testing.assert_close(share, votes.probability, atol=0.06, rtol=0)
    assert set(votes.cast(torch.Generator().manual_seed(0), 2).tolist()) <= {0.0, 0.5, 1.0}


def test_damage_grows_with_its_strength_and_none_is_none():
    picture = torch.from_numpy(render(RED_LEFT_OF_BLUE))
    other = torch.from_numpy(render(THREE_STARS))
    for kind in rewards_votes.DAMAGES:
        strengths = [
            (rewards_votes.damaged(picture, kind, s, other, torch.Generator().manual_seed(0)).float() - picture.float()).abs().mean().item()
            for s in (0.0, 0.3, 1.0)
        ]
        assert strengths[0] == 0 < strengths[1] < strengths[2]
    with pytest.raises(ValueError, match="kind must be one of noise, blotches, blur, ghost; got 'fire'"):
        rewards_votes.damaged(picture, "fire", 1.0, other, torch.Generator())
    assert torch.equal(rewards_votes.washed_out(picture, 1.0), picture)
    assert rewards_votes.washed_out(picture, 0.0).unique().numel() == 1


def test_composition_by_hand():
    """One circle of radius 10 in the middle: balance 1, margin (32 - 10) / 8 cut to 1, evenness 1, so 10. At x = 22 the mass is 10 off."""
    centred = Thing("circle", "red", 32, 32, 10)
    assert rewards_aesthetic.composition([centred]) == pytest.approx(10)
    assert rewards_aesthetic.composition([centred], damage=0.4) == pytest.approx(10 - 10 * 0.25 * 0.4)
    assert rewards_aesthetic.composition([Thing("circle", "red", 22, 32, 10)]) == pytest.approx(10 * (0.35 * 0.5 + 0.2 + 0.2 + 0.25))
    assert rewards_aesthetic.composition([Thing("circle", "red", 14, 32, 10)]) == pytest.approx(10 * (0.35 * 0.1 + 0.2 * 0.5 + 0.2 + 0.25))
    uneven = [Thing("circle", "red", 16, 32, 8.5), Thing("circle", "red", 48, 32, 10)]
    lean = 16 * (10**2 - 8.5**2) / (10**2 + 8.5**2)
    expected = 0.35 * (1 - lean / 20) + 0.2 * (64 - 58) / 8 + 0.2 * (0.85 - 0.7) / 0.3 + 0.25
    assert rewards_aesthetic.composition(uneven) == pytest.approx(10 * expected, abs=1e-3)
    assert rewards_aesthetic.composition([]) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_are_what_is_drawn(shape):
    thing = Thing(shape, "black", SIZE / 2, SIZE / 2, 12)
    assert rewards_aesthetic.area(thing) == pytest.approx(coverage(thing).sum(), rel=0.06)


def test_disturbed_images_stay_images_and_ruined_ones_are_ruined():
    scenes = [draw_scene(np.random.default_rng(i)) for i in range(24)]
    images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
    disturbed, again = (rewards_images.disturb(images, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(disturbed, again)
    assert disturbed.min() >= 0
    assert disturbed.max() <= 1
    moved = (disturbed - images).abs().flatten(1).mean(dim=1)
    assert 0 < (moved == 0).sum() < 14  # a quarter is left alone
    assert moved.max() < 0.2
    ruined = rewards_images.ruin(images, torch.Generator().manual_seed(0))
    assert ((ruined - images).abs().flatten(1).mean(dim=1) > 0.005).all()
    assert math.isfinite(ruined.sum().item())
