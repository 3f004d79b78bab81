"""What the captioner behind `shapes-reward` is taught on, the simulated annotator and its votes, and how a reward is measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffalign.rules import Detection, evaluate
from diffalign.shapes import prompts
from diffalign.shapes.scenes import SHAPES, Scene, Thing, render
from diffalign.shapes.train import judged as made
from diffalign.shapes.train import rewards_auc, text
from diffalign.shapes.train import rewards_captioner_tune as tune
from diffalign.shapes.train import rewards_captions as captions
from diffalign.shapes.train import rewards_described as describing
from diffalign.shapes.train import rewards_scenes as worlds

HELD_OUT_COLORS = {p for s in ("validation", "test") for p in prompts.color_pairs(s)}
HELD_OUT_RELATIONS = {p for s in ("validation", "test") for p in prompts.relation_pairs(s)}


@pytest.fixture(scope="module")
def tokenizer():
    return text.build_tokenizer()


# --- what it is taught on -----------------------------------------------------------------------------------------------------


def test_rich_scenes_show_no_held_out_pair_and_their_captions_hold_by_the_rules():
    rng = np.random.default_rng(1)
    forms = set()
    for _ in range(400):
        scene = captions.draw_rich_scene(rng)
        assert worlds.scene_allowed(scene)
        caption = captions.true_caption(rng, scene)
        row = made.row_of(caption)
        found: dict[str, list[Detection]] = {}
        for thing in scene.things:
            found.setdefault(thing.shape, []).append(Detection(thing.box, 1.0, mask=thing.color))
        assert evaluate(row, found, lambda _, ds: [d.mask for d in ds]).correct, (caption, scene)
        assert not _named(row)[0] & HELD_OUT_COLORS
        assert not _named(row)[1] & HELD_OUT_RELATIONS
        forms.add((len(scene.things), row["tag"]))
    assert {tag for _, tag in forms} == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}


def _named(row: dict) -> tuple[set, set]:
    """The pairs that a row of metadata names, relations both ways round."""
    colors = {(c["class"], c["color"]) for c in row["include"] if "color" in c}
    target = row["include"][0]["class"]
    sides = {(c["class"], c["position"][0]) for c in row["include"] if "position" in c}
    return colors, sides | {(target, captions._OPPOSITE[r]) for _, r in sides}


def test_what_is_called_false_of_the_near_copy_is_false():
    rng = np.random.default_rng(2)
    a = Scene((Thing("circle", "red", 16, 32, 11), Thing("heart", "blue", 48, 32, 11)))
    b = Scene((Thing("circle", "blue", 16, 32, 11), Thing("heart", "red", 48, 32, 11)))
    for _ in range(20):
        texts, differs = captions.captions_against(rng, a, b)
        for said, false in zip(texts, differs, strict=True):
            assert false == ("red" in said or "blue" in said), said


def test_held_out_words_are_left_out_of_the_softmax_where_they_would_follow_and_nowhere_else(tokenizer):
    table = captions.blocked_words(tokenizer)
    word = {
        w: tokenizer(w, add_special_tokens=False).input_ids[0]
        for w in ["left", "right", "above", "below", "circle", "circles", "star", "square", "and"]
    }

    def blocked(caption: str, place: int) -> set[str]:
        row = table[captions.blocked_rows(caption, 31)[place]]
        return {w for w, i in word.items() if row[i]}

    assert blocked("a circle above a star", 2) == {"right"}  # of a circle "right of" is held out, whatever does follow
    assert blocked("a photo of a circle and a heart", 5) == {"right"}
    assert blocked("a red circle", 3) == {"right"}  # and at the end
    assert blocked("an orange heart", 2) == {"circle", "circles"}
    assert blocked("three orange hearts", 2) == {"circle", "circles"}
    assert blocked("a heart left of a ring", 6 - 1) == {"circle", "circles"}  # it would stand right of the heart
    assert blocked("a heart below a ring", 4) == {"square"}  # it would stand above the heart
    assert blocked("two circles", 2) == set()
    assert all(row == 0 for row in captions.blocked_rows("", 5))


def test_the_annotator_never_sees_a_prompt_of_validation_or_test():
    rows = made.annotator_rows(300, 5)
    reserved = {worlds.split_carrier(p)[1] for s in ("validation", "test") for p in prompts.prompts(s)}
    for row in rows:
        assert worlds.split_carrier(row["prompt"])[1] not in reserved
        colors, sides = _named(row)
        assert not colors & HELD_OUT_COLORS
        assert not sides & HELD_OUT_RELATIONS
    assert {row["tag"] for row in rows} == set(made.TASK_SHARES)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_prompt_reads_back_as_its_own_row(split):
    for row in prompts.metadata(split):
        assert made.row_of(row["prompt"]) == row


# --- votes --------------------------------------------------------------------------------------------------------------------


def test_votes_follow_the_judge_but_for_the_flips():
    right = torch.rand(400, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    votes, truth = tune.votes_of(right, 7), tune.votes_of(right, 7, flipped=0.0)
    assert torch.equal(votes, -votes.transpose(1, 2))
    assert torch.equal(truth, right[:, :, None].float() - right[:, None, :].float())
    assert ((votes != truth)[truth != 0].float().mean() - tune.FLIPPED).abs() < 0.02
    assert (votes[truth == 0] == 0).all()


def test_the_preference_loss_is_bradley_terrys():
    votes = tune.votes_of(torch.tensor([[True, False, False]]), 0, flipped=0.0)
    s = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    loss = tune.preference_loss(s, votes)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2, rel=1e-5)
    loss.backward()
    assert s.grad[0, 0] < 0 < s.grad[0, 1]
    assert tune.preference_loss(torch.zeros(1, 3), votes).item() == pytest.approx(math.log(2))
    flipped = tune.preference_loss(s.detach(), -votes)
    assert flipped.item() == pytest.approx(loss.item() + 1.5, rel=1e-5)  # softplus(x) - softplus(-x) = x


def test_the_annotator_says_what_it_sees_and_nothing_that_is_reserved(tokenizer):
    rng = np.random.default_rng(3)
    scenes = [captions.draw_rich_scene(rng) for _ in range(40)]
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes])).unflatten(0, (10, 4))
    said = describing.described(images, tokenizer, 1, flipped=0.0)
    rules = worlds.tabulate(scenes)
    right = []
    for i, ids in enumerate(said.ids.flatten(0, 1)):
        for row in ids:
            text = tokenizer.decode(row, skip_special_tokens=True)
            if not text:
                continue
            assert describing.may_be_said(text)
            claim = torch.tensor([worlds.read_claim(text).encode()])
            right.append(worlds.holds(rules.rows(torch.tensor([i])), claim).item())
    assert len(right) > 40
    assert np.mean(right) > 0.97  # the detector's boxes lie on whole pixels
    assert not describing.may_be_said("a photo of an orange circle")
    assert not describing.may_be_said("a circle right of a star")
    assert not describing.may_be_said(prompts.metadata("test", per_task=1)[0]["prompt"])
    mistaken = describing.described(images, tokenizer, 1, flipped=1.0)
    assert (mistaken.ids != said.ids).any()


def test_an_image_with_nothing_in_it_has_no_caption(tokenizer):
    said = describing.described(torch.full((1, 2, 64, 64, 3), 144, dtype=torch.uint8), tokenizer, 1, 0.1)
    assert not said.known.any()
    assert not said.regions.any()


def test_regions_are_where_things_are_and_of_their_kind_and_colour(tokenizer):
    scene = Scene((Thing("circle", "red", 16, 16, 12), Thing("heart", "blue", 46, 46, 12)))
    image = render(scene)
    image[30:44, 8:12] = (250, 250, 250)  # a stroke that is no shape
    said = describing.described(torch.from_numpy(image)[None, None], tokenizer, 1, 0.0)
    kinds, hues = (labels[0].view(8, 8) for labels in describing.cell_labels(said.regions[0], 8))
    assert (kinds[2, 2], hues[2, 2]) == (SHAPES.index("circle") + 1, describing.COLOR_NAMES.index("red") + 1)
    assert (kinds[5, 5], hues[5, 5]) == (SHAPES.index("heart") + 1, describing.COLOR_NAMES.index("blue") + 1)
    assert kinds[4, 1] == describing.NO_SHAPE
    assert kinds[0, 7] == hues[0, 7] == 0
    sure = torch.zeros(1, 64, describing.KINDS + describing.HUES)
    sure[0, torch.arange(64), kinds.flatten()] = 50.0
    sure[0, torch.arange(64), describing.KINDS + hues.flatten()] = 50.0
    assert describing.region_loss(sure, kinds.view(1, 64), hues.view(1, 64)).item() < 1e-5
    even = describing.region_loss(torch.zeros_like(sure), kinds.view(1, 64), hues.view(1, 64)).item()
    assert even == pytest.approx(2 * math.log(describing.KINDS * describing.HUES), rel=1e-4)


# --- AUC and best of n --------------------------------------------------------------------------------------------------------


def judged(right: list[list[int]], tags: list[str]) -> made.Judged:
    n, g = len(right), len(right[0])
    return made.Judged(torch.zeros(n, g, 2, 2, 3, dtype=torch.uint8), torch.tensor(right).bool(), [{"tag": t, "prompt": "a"} for t in tags])


def test_the_auc_counts_pairs_within_a_prompt_and_ties_half():
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 5.0, 6.0, 7.0], [1.0, 2.0, 3.0, 4.0]])
    pool = judged([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]], ["colors", "colors", "position"])
    assert rewards_auc.prompt_aucs(scores, pool.right)[:2].tolist() == [(1 + 1 + 0 + 0.5) / 4, 1.0]
    figures = rewards_auc.auc_figures(scores, pool)
    assert figures["overall"]["value"] == pytest.approx((0.625 + 1.0) / 2)
    assert figures["overall"]["n"] == 2  # a prompt whose images are all right says nothing
    assert "position" not in figures


def test_best_of_n_is_counted_from_a_random_image_to_the_judges_own():
    pool = judged([[1, 0], [0, 1], [0, 1], [0, 0]], ["colors", "colors", "colors", "colors"])
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 0.0]])
    figures = rewards_auc.best_of_figures(scores, pool)
    assert [figures[k]["overall"] for k in ("random image", "by the reward", "by the judge")] == [0.375, 0.5, 0.75]
    assert figures["share of the judge's gain"] == pytest.approx(1 / 3, abs=1e-4)
