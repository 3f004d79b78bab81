"""The simulated annotator's votes, and the folder that it leaves."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from diffalign.cli import main
from diffalign.shapes import prompts
from diffalign.shapes.pairs import Annotator, exact_caption, voted
from diffalign.shapes.perturb import STRENGTHS, body, perturbed, turned
from diffalign.shapes.train.judged import reserved_bodies
from diffalign.shapes.train.rewards_described import Seen
from diffalign.shapes.train.rewards_scenes import read_claim, split_carrier
from diffalign.training.data import read_pairs
from diffalign.training.votes import read_votes


def records(groups: list[str]) -> list[dict]:
    """Images as images.jsonl has them; "101": three images of a prompt, the second wrong."""
    return [
        {"prompt": f"prompt {n}", "image": f"images/{n:04d}-{k}.png", "right": side == "1", "caption": f"caption {n}-{k}" if k else None}
        for n, group in enumerate(groups)
        for k, side in enumerate(group)
    ]


def test_only_a_right_and_a_wrong_image_of_one_prompt_make_a_pair():
    made = records(["11", "00", "1000", "1100", "10101010"])
    right = {record["image"]: record["right"] for record in made}
    pairs, votes = voted(made, Annotator(flips=0.0))
    assert Counter(pair["prompt"] for pair in pairs) == {"prompt 2": 1, "prompt 3": 2, "prompt 4": 4}
    for pair in pairs:
        assert right[pair["winner"]]
        assert not right[pair["loser"]]
        assert pair["winner"].rpartition("-")[0] == pair["loser"].rpartition("-")[0]
        for side in ("winner", "loser"):
            number, k = pair[side].removesuffix(".png").rpartition("/")[2].split("-")
            assert pair.get(f"{side}_caption") == (None if k == "0" else f"caption {int(number)}-{k}")
    images = [pair[side] for pair in pairs for side in ("winner", "loser")]
    assert len(images) == len(set(images))
    assert {vote["image"]: vote["good"] for vote in votes} == right


def test_a_stated_share_of_votes_is_wrong_and_prompts_take_turns():
    made = records(["1010"] * 1000)
    right = {record["image"]: record["right"] for record in made}
    pairs, votes = voted(made, Annotator(flips=0.2))
    assert sum(not right[pair["winner"]] for pair in pairs) / len(pairs) == pytest.approx(0.2, abs=0.03)
    assert sum(vote["good"] != right[vote["image"]] for vote in votes) / len(votes) == pytest.approx(0.2, abs=0.03)
    few, _ = voted(made, Annotator(flips=0.2, votes=1003))
    assert Counter(Counter(pair["prompt"] for pair in few).values()) == {1: 997, 2: 3}
    assert voted(made, Annotator(flips=0.2)) == (pairs, votes)
    assert voted(made, Annotator(flips=0.2, seed=1))[0] != pairs


def test_what_is_held_out_is_never_said():
    rng = np.random.default_rng(0)
    held_out = [Seen("circle", "orange", (10.0, 10.0, 30.0, 30.0))]
    assert (("circle", "orange")) in prompts.color_pairs("test")
    said = {exact_caption(held_out, rng) for _ in range(50)}
    assert not any(caption and "orange" in caption for caption in said)
    assert exact_caption([], rng) is None
    shown = [Seen("circle", "red", (10.0, 10.0, 30.0, 30.0))] * 2
    captions = {exact_caption(shown, rng) for _ in range(50)} - {None}
    assert any("two" in caption for caption in captions)
    assert not any(split_carrier(caption)[1] in reserved_bodies() for caption in captions)


def test_a_claim_in_words_is_read_back():
    for caption in ("a red star left of a blue ring", "an orange heart", "three green crosses", "two stars", "a circle and a ring"):
        assert body(read_claim(caption)) == caption


@pytest.mark.parametrize(
    "caption", ["a photo of a red diamond above a blue heart", "a red ring", "two red circles", "a circle and a green ring"]
)
def test_perturbation_changes_as_much_as_it_says(caption):
    rng = np.random.default_rng(0)
    before = read_claim(caption)
    other_way_round = turned(before) if before.second else before

    def same(one, other):
        return sum((one.count == other.count, one.first == other.first, one.second == other.second, one.relation == other.relation))

    for strength in STRENGTHS:
        for _ in range(20):
            said = perturbed(caption, strength, rng)
            assert split_carrier(said)[0] != split_carrier(caption)[0]
            after = read_claim(said)
            assert (after == other_way_round) == (strength == "weak")
            assert same(after, other_way_round) in {"weak": (4,), "medium": (3,), "strong": (2, 3)}[strength]


def test_captions_of_a_pair_are_of_the_kind_that_was_asked_for():
    made = [
        {**record, "prompt": "a red star", "caption": "a blue ring" if record["right"] else "a green cross"} for record in records(["10"])
    ]

    def captions(**how):
        (pair,), _ = voted(made, Annotator(flips=0.0, **how))
        return pair["winner_caption"], pair["loser_caption"]

    assert captions() == ("a blue ring", "a green cross")
    winner, loser = captions(captions="perturbed", strength="weak")
    assert winner == "a red star"
    assert loser.endswith(" a red star")
    winner, loser = captions(captions="hybrid", strength="weak")
    assert winner == "a blue ring"
    assert loser.endswith(" a green cross")
    with pytest.raises(ValueError, match="strength"):
        Annotator(strength="huge")


def test_the_command_resumes_and_other_images_are_refused(tiny_folder, tmp_path, capsys):
    out = tmp_path / "pairs"
    command = ["pairs", "--pipeline", str(tiny_folder), "--out", str(out), "--prompts", "3", "--images", "2", "--steps", "1",
               "--batch-size", "2"]  # fmt: skip
    assert main(command) == 0
    whole = (out / "images.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert len(lines) == 6
    pixels = (out / lines[3]["image"]).read_bytes()
    (out / "images.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"prompt"')  # killed while writing
    assert main(command) == 0
    assert (out / "images.jsonl").read_bytes() == whole
    assert (out / lines[3]["image"]).read_bytes() == pixels
    assert main([*command, "--guidance-scale", "1"]) == 1
    assert "guidance_scale" in capsys.readouterr().err
    about = json.loads((out / "about.json").read_text())
    assert about["images"] == 6
    assert about["annotator"]["flips"] == 0.1


def test_the_folder_is_read_as_pairs_and_as_votes(tmp_path):
    from tests.training.test_data import write_image

    made = records(["1100"])
    (tmp_path / "images").mkdir()
    for i, record in enumerate(made):
        write_image(tmp_path / record["image"], 20 * i, (8, 8))
    pairs, votes = voted(made, Annotator(flips=0.0))
    for name, lines in (("pairs.jsonl", pairs), ("votes.jsonl", votes)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_pairs(tmp_path)[0]) == 2
    assert Counter(vote.good for vote in read_votes(tmp_path)[0]) == {True: 2, False: 2}
    (tmp_path / "votes.jsonl").unlink()
    assert Counter(vote.good for vote in read_votes(tmp_path)[0]) == {True: 2, False: 2}  # of the pairs
    (tmp_path / "votes.jsonl").write_text('{"prompt": "a", "image": "images/0000-0.png", "good": 1}\n')
    with pytest.raises(ValueError, match="good"):
        read_votes(tmp_path)
