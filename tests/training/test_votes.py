"""Single images that were liked or not, as KTO's batches; and what watched rewards say of a policy."""

from __future__ import annotations

import json
import math

import pytest
import torch

from diffalign.backbone import Size
from diffalign.training.data import LatentStore
from diffalign.training.votes import VoteData, read_votes
from diffalign.training.watching import Watch, gain
from tests.training.test_data import write_image
from tests.training.toy import Toy


def folder_of_votes(folder, good: int, bad: int):
    """Liked images are light, the others dark; prompt "1" for the liked, "2" for the others."""
    lines = []
    for i in range(good + bad):
        write_image(folder / f"{i}.png", 200 + i if i < good else 20 + i, (8, 8))
        lines.append({"prompt": "1" if i < good else "2", "image": f"{i}.png", "good": i < good})
    (folder / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def data(folder, **more) -> VoteData:
    toy = Toy()
    return VoteData(read_votes(folder)[0], LatentStore(folder / "latents", toy.encode_images, Size(8, 8), "toy"), toy, **more)


def test_half_of_a_batch_is_liked_however_few_there_are(tmp_path):
    votes = data(folder_of_votes(tmp_path, 2, 10), drop_prompts=0.0)
    batch = votes.take(range(40))
    assert batch.good.float().mean() == 0.5
    light = batch.latents[..., -1, -1].flatten() > 0.5  # the first pixel of every image is white
    assert torch.equal(light, batch.good)
    assert batch.conditioning.prompts == tuple("1" if good else "2" for good in batch.good)
    alone = votes.take([7])
    assert torch.equal(alone.latents[0], batch.latents[7])


def test_prompts_are_dropped_at_the_stated_rate(tmp_path):
    batch = data(folder_of_votes(tmp_path, 2, 2), drop_prompts=0.3).take(range(1000))
    assert sum(prompt == "" for prompt in batch.conditioning.prompts) / 1000 == pytest.approx(0.3, abs=0.05)


def test_what_is_learned_from_has_an_identity(tmp_path):
    folder = folder_of_votes(tmp_path, 2, 2)
    before = data(folder).identity()
    assert data(folder).identity() == before
    lines = (folder / "votes.jsonl").read_text().replace('"prompt": "2"', '"prompt": "3"', 1)
    (folder / "votes.jsonl").write_text(lines)
    assert data(folder).identity() != before


def test_votes_that_cannot_be_read_are_dropped_and_votes_of_one_kind_refused(tmp_path):
    folder = folder_of_votes(tmp_path, 2, 2)
    (folder / "3.png").write_bytes(b"no image")
    votes, dropped = read_votes(folder)
    assert len(votes) == 3
    assert [each.line for each in dropped] == [4]
    (folder / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="of one kind"):
        read_votes(folder)
    with pytest.raises(FileNotFoundError, match=r"votes\.jsonl"):
        read_votes(folder / "nothing")


def test_a_gain_is_in_standard_deviations_of_the_reference():
    before = torch.tensor([0.0, 2.0, 4.0])  # standard deviation 2
    assert gain(before + 3, before) == pytest.approx(1.5)
    assert gain(torch.tensor([1.0, math.nan, 5.0]), torch.tensor([0.0, 9.0, 2.0])) == pytest.approx(2 / math.sqrt(2))
    assert gain(before, torch.zeros(3)) is None
    assert gain(before[:1], before[:1]) is None


def test_what_is_optimised_cannot_be_watched():
    score = {"a": lambda images, prompts: images.mean((1, 2, 3))}
    with pytest.raises(ValueError, match="optimised"):
        Watch(("1",), score, score)
    with pytest.raises(ValueError, match="held_out_prompts"):
        Watch((), score, {})
    with pytest.raises(ValueError, match="watched"):
        Watch(("1",), {}, score)
