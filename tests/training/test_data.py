"""Pairs from disk to batches: what is dropped, encoded once, split by prompt, shuffled by the seed; the same for both images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.backbone import Size
from diffalign.training.data import LatentStore, Order, PairData, PromptData, covering, read_pairs, seeded, split_by_prompt
from tests.training.toy import Toy

SIZE = Size(4, 4)


def write_image(path: Path, level: int, shape=(4, 4)) -> None:
    """Of one grey, with a column of white on the left so that a mirror shows."""
    pixels = np.full((*shape, 3), level, np.uint8)
    pixels[:, 0] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def folder_of_pairs(folder: Path, count: int = 6, **fields) -> Path:
    """Pair i: winner of grey 10 i, loser of grey 10 i + 5, prompt i // 2."""
    rows = []
    for i in range(count):
        for j, side in enumerate(("winner", "loser")):
            write_image(folder / "images" / f"{i}-{side}.png", (10 * i + 5 * j) % 256)
        rows.append({"prompt": str(i // 2 + 1), "winner": f"images/{i}-winner.png", "loser": f"images/{i}-loser.png", **fields})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Counting(Toy):
    """Latents are the first two columns and rows of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.prompts = 0, []

    def encode_images(self, images):
        self.images += len(images)
        return super().encode_images(images)

    def encode(self, prompts, *args, **kwargs):
        self.prompts += prompts
        return super().encode(prompts, *args, **kwargs)


def store(backbone, folder: Path, autoencoder: str = "a") -> LatentStore:
    return LatentStore(folder, backbone.encode_images, SIZE, autoencoder)


@pytest.fixture
def made(tmp_path):
    """(backbone, pairs, store) of six pairs."""
    backbone = Counting()
    pairs, _ = read_pairs(folder_of_pairs(tmp_path / "data"))
    return backbone, pairs, store(backbone, tmp_path / "cache")


# ---- reading -------------------------------------------------------------------------------------------------------------------


def test_pairs_are_read_and_what_cannot_be_is_dropped_as_a_pair(tmp_path, caplog):
    folder = folder_of_pairs(tmp_path)
    (folder / "images" / "1-loser.png").write_bytes(b"no image")
    (folder / "images" / "4-winner.png").unlink()
    pairs, dropped = read_pairs(folder)
    assert [pair.winner.name for pair in pairs] == ["0-winner.png", "2-winner.png", "3-winner.png", "5-winner.png"]
    assert [each.line for each in dropped] == [2, 5]
    assert "1-loser.png" in dropped[0].reason
    assert "2 of 6" in caplog.text
    assert read_pairs(folder / "pairs.jsonl") == (pairs, dropped)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "prompt, winner and loser"),
        ('{"prompt": "a", "winner": "x"}', "prompt, winner and loser"),
        ('{"prompt": "a", "winner": "x", "loser": "y", "wieght": 1}', "wieght"),
        ('{"prompt": "a", "winner": "x", "loser": "y", "weight": 0}', "weight"),
        ('{"prompt": 3, "winner": "x", "loser": "y"}', "prompt must be text"),
        ('{"prompt": "a", "winner": "x", "loser": "y"}', "no pair that can be used"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, row, told):
    (tmp_path / "pairs.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=told):
        read_pairs(tmp_path)


def test_a_folder_without_pairs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pairs\.jsonl"):
        read_pairs(tmp_path)


def test_the_split_is_by_prompt_and_does_not_depend_on_the_order(tmp_path):
    pairs, _ = read_pairs(folder_of_pairs(tmp_path, 40))
    train, held = split_by_prompt(pairs, 0.3)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held}
    assert len(train) + len(held) == 40
    again, _ = split_by_prompt(pairs[::-1], 0.3)
    assert set(again) == set(train)
    assert set(split_by_prompt(pairs, 0.3, seed=1)[0]) != set(train)
    assert split_by_prompt(pairs, 0) == (pairs, [])
    with pytest.raises(ValueError, match="held_out"):
        split_by_prompt(pairs[:2], 0.3)


# ---- encoding ------------------------------------------------------------------------------------------------------------------


def test_everything_is_encoded_once(made, tmp_path):
    backbone, pairs, latents = made
    data = PairData(pairs, latents, backbone)
    assert backbone.images == 12
    assert sorted(backbone.prompts) == ["", "1", "2", "3"]
    data.take(range(20))
    again = PairData(pairs, store(backbone, tmp_path / "cache"), backbone)
    assert backbone.images == 12
    assert torch.equal(again.take([0, 1]).winners, data.take([0, 1]).winners)
    PairData(pairs, store(backbone, tmp_path / "cache", "another autoencoder"), backbone)
    assert backbone.images == 24


def test_a_changed_file_is_encoded_anew_and_a_copy_is_not(made, tmp_path):
    backbone, pairs, latents = made
    PairData(pairs, latents, backbone)
    write_image(pairs[0].winner, 200)
    pairs[1].loser.write_bytes(pairs[2].loser.read_bytes())
    PairData(pairs, store(backbone, tmp_path / "cache"), backbone)
    assert backbone.images == 13


def test_images_are_cut_to_the_size_around_their_centre():
    image = torch.arange(8.0).expand(3, 4, 8) / 8
    torch.testing.assert_close(covering(image, SIZE), image[..., 2:6])
    assert covering(image, Size(4, 8)) is image
    assert covering(torch.rand(3, 5, 9), SIZE).shape == (3, 4, 4)
    assert covering(torch.rand(3, 2, 2), SIZE).shape == (3, 4, 4)


# ---- batches -------------------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_singles_in_any_order(made):
    backbone, pairs, latents = made
    data = PairData(pairs, latents, backbone, drop_prompts=0.4, flip=True)
    whole = data.take(range(18))
    for position in (17, 0, 9):
        one = data.take([position])
        assert torch.equal(one.winners[0], whole.winners[position])
        assert torch.equal(one.losers[0], whole.losers[position])
        assert one.conditioning.prompts == whole.conditioning.prompts[position : position + 1]
        assert torch.equal(one.conditioning.tensors["prompt_embeds"][0], whole.conditioning.tensors["prompt_embeds"][position])


def test_every_epoch_holds_every_pair_and_is_shuffled_by_the_seed(made):
    order = Order(6, 0)
    epochs = [[order[6 * epoch + i] for i in range(6)] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [order[i] for i in range(6)] == epochs[0]
    assert [[Order(6, 1)[6 * epoch + i] for i in range(6)] for epoch in range(5)] != epochs


def test_winners_losers_and_prompts_belong_together(made):
    backbone, pairs, latents = made
    batch = PairData(pairs, latents, backbone, drop_prompts=0.0).take(range(12))
    for winner, loser, prompt in zip(batch.winners, batch.losers, batch.conditioning.prompts, strict=True):
        i = round(winner[0, 0, 1].item() * 255 / 10)
        assert loser[0, 0, 1].item() * 255 == pytest.approx(10 * i + 5, abs=1e-3)
        assert prompt == str(i // 2 + 1)
    assert batch.weights is None
    assert batch.losers_conditioning is None


def test_both_images_are_mirrored_or_neither(made):
    backbone, pairs, latents = made
    batch = PairData(pairs, latents, backbone, flip=True).take(range(60))
    mirrored = [(latent[0, 0, 0] < 1).item() for latent in batch.winners]
    assert mirrored == [(latent[0, 0, 0] < 1).item() for latent in batch.losers]
    assert 15 < sum(mirrored) < 45


def test_prompts_are_dropped_for_guidance(made):
    backbone, pairs, latents = made
    batch = PairData(pairs, latents, backbone, drop_prompts=0.25).take(range(400))
    dropped = [prompt == "" for prompt in batch.conditioning.prompts]
    assert 70 < sum(dropped) < 130
    assert all((row == 0) == drop for row, drop in zip(batch.conditioning.tensors["prompt_embeds"][:, 0], dropped, strict=True))
    kept = PairData(pairs, latents, backbone, drop_prompts=0.0).take(range(400))
    assert "" not in kept.conditioning.prompts
    assert not kept.conditioning.has_unconditional
    with pytest.raises(ValueError, match="drop_prompts"):
        PairData(pairs, latents, backbone, drop_prompts=1.0)


def test_captions_and_weights_of_pairs(tmp_path):
    backbone = Counting()
    pairs, _ = read_pairs(folder_of_pairs(tmp_path / "data", weight=2, winner_caption="7"))
    batch = PairData(pairs, store(backbone, tmp_path / "cache"), backbone, drop_prompts=0.3).take(range(40))
    assert batch.weights.tolist() == [2.0] * 40
    assert set(batch.conditioning.prompts) == {"7", ""}
    assert set(batch.losers_conditioning.prompts) == {"1", "2", "3", ""}
    for winner, loser in zip(batch.conditioning.prompts, batch.losers_conditioning.prompts, strict=True):
        assert (winner == "") == (loser == "")


def test_prompts_get_a_seed_each():
    data = PromptData(["1", "2", "3"], Toy(), seed=4)
    batch = data.take(range(9))
    assert sorted(batch.conditioning.prompts) == ["1"] * 3 + ["2"] * 3 + ["3"] * 3
    assert len(set(batch.seeds)) == 9
    assert data.take([5]).seeds[0] == batch.seeds[5]
    assert batch.conditioning.has_unconditional
    assert set(PromptData(["1"], Toy(), seed=5).take(range(9)).seeds).isdisjoint(batch.seeds)


KEYS = ((0,), (1,), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (2**32,), (2**32, 0), (2**40 + 1,))


def test_keys_that_differ_share_no_draws():
    draws = [torch.rand(1, generator=seeded(*key)).item() for key in KEYS]
    assert len(set(draws)) == len(KEYS)
    assert torch.rand(1, generator=seeded(0, 1)).item() == draws[2]
