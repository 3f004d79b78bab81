"""Two captions for each pair: which, kept from run to run, and how well they fit."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from diffalign.cli import main
from diffalign.shapes.scenes import Scene, Thing, render
from diffalign.training.captioning import Captioning, caption_gap, caption_pairs
from diffalign.training.data import read_pairs
from diffalign.training.vlm import VLM
from tests.reward_models.tiny_vlms import write_judge
from tests.training.test_data import folder_of_pairs


class Talker:
    """Names images by file and shouts texts; counts what it was asked."""

    def __init__(self, limit: int = 10**9) -> None:
        self.asked, self.limit = 0, limit

    def count(self, items) -> None:
        if self.asked + len(items) > self.limit:
            raise KeyboardInterrupt
        self.asked += len(items)

    def caption(self, images, prompts) -> list[str]:
        self.count(images)
        return [f"{prompt} as  {image.stem}" for image, prompt in zip(images, prompts, strict=True)]

    def shout(self, texts) -> list[str]:
        self.count(texts)
        return [text.upper() for text in texts]

    def how(self, strategy: str, **more) -> Captioning:
        return Captioning(strategy, self.caption, "talker", self.shout, "talker loud", **{"batch_size": 2, **more})


def said(pairs) -> list[tuple]:
    return [(pair.prompt, pair.winner.name, pair.winner_caption, pair.loser_caption) for pair in pairs]


def test_each_strategy_gives_its_two_captions(tmp_path):
    folder = folder_of_pairs(tmp_path, 2, weight=2.0)
    assert said(caption_pairs(folder, Talker().how("seen")))[1] == ("1", "1-winner.png", "1 as 1-winner", "1 as 1-loser")
    assert said(caption_pairs(folder, Talker().how("hybrid")))[1] == ("1", "1-winner.png", "1 as 1-winner", "1 AS 1-LOSER")
    (folder / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text().replace('"1"', '"a red star"'))
    pairs = caption_pairs(folder, Talker().how("perturbed"))
    assert said(pairs)[1] == ("a red star", "1-winner.png", "a red star", "A RED STAR")
    assert read_pairs(folder / "captioned.jsonl")[0] == pairs
    assert {pair.weight for pair in pairs} == {2.0}


def test_a_stopped_run_goes_on_and_nothing_is_asked_twice(tmp_path):
    folder = folder_of_pairs(tmp_path, 4)
    first = Talker(limit=5)
    with pytest.raises(KeyboardInterrupt):
        caption_pairs(folder, first.how("seen"))
    assert not (folder / "captioned.jsonl").exists()
    second = Talker()
    whole = caption_pairs(folder, second.how("seen"))
    assert first.asked + second.asked == 8
    assert said(whole)[3] == ("2", "3-winner.png", "2 as 3-winner", "2 as 3-loser")
    third = Talker()
    caption_pairs(folder, third.how("hybrid"))
    assert third.asked == 4  # the losers' captions, said otherwise
    fourth = Talker()
    caption_pairs(folder, Captioning("seen", fourth.caption, "another", batch_size=3))
    assert fourth.asked == 8


def test_what_is_needed_is_named(tmp_path):
    for strategy, missing in (("hybrid", "caption"), ("perturbed", "perturb"), ("louder", "strategy")):
        with pytest.raises(ValueError, match=missing):
            Captioning(strategy, perturb=None if strategy == "perturbed" else str.upper)
    folder = folder_of_pairs(tmp_path, 1)
    with pytest.raises(ValueError, match="text for each"):
        caption_pairs(folder, Captioning("seen", lambda images, prompts: [""] * len(images), "mute"))


def test_the_gap_is_what_the_winner_s_caption_says_more(tmp_path):
    pairs = caption_pairs(folder_of_pairs(tmp_path, 3), Talker().how("seen"))

    def score(images, texts):
        return torch.tensor([10.0 if "winner" in text else 1.0 if "loser" in text else 4.0 for text in texts])

    means = caption_gap(pairs, score, batch_size=2)
    assert means == {"winner": 10.0, "loser": 1.0, "crossed": 1.0, "prompt_winner": 4.0, "prompt_loser": 4.0, "gap": 9.0}


def test_the_command_says_what_shapes_show(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name, shape in (("1-winner", "star"), ("1-loser", "ring")):
        Image.fromarray(render(Scene((Thing(shape, "red", 32, 32, 12),)))).save(tmp_path / "images" / f"{name}.png")
    row = {"prompt": "a red star", "winner": "images/1-winner.png", "loser": "images/1-loser.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["caption", "--data", str(tmp_path)]) == 0
    (pair,) = read_pairs(tmp_path / "captioned.jsonl")[0]
    assert pair.winner_caption.endswith("star")
    assert pair.loser_caption.endswith("ring")
    assert "1 pairs" in capsys.readouterr().out


def test_a_model_of_transformers_answers(tmp_path):
    """With random weights, so that what it says means nothing; but it is the same for the same image, and another for another."""
    write_judge(tmp_path / "vlm", "qwen2_vl")
    talk = VLM(tmp_path / "vlm", words=6)
    for name, color in (("a", (220, 30, 30)), ("b", (20, 30, 230))):
        Image.new("RGB", (40, 56), color).save(tmp_path / f"{name}.png")
    first, second = talk.caption([tmp_path / "a.png", tmp_path / "b.png"], ["", ""])
    assert talk.caption([tmp_path / "a.png"], [""]) == [first]
    assert first != second
    assert talk.perturb("weak")(["yes"]) != talk.perturb("weak")(["no"])
    with pytest.raises(ValueError, match="strength"):
        talk.perturb("huge")
