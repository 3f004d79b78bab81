"""`shapes-watch`: its votes, a training that resumes, a folder that loads."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign import reward_models
from diffalign.reward_models.shapes_film import FilmConfig, FilmScorer
from diffalign.shapes.train import loop
from diffalign.shapes.train import rewards_captions as captions
from diffalign.shapes.train import rewards_watch as watching


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


FEW = loop.LoopConfig(steps=4, lr=1e-3, seed=9, warmup=1, save_every=2)


def test_watching_resumed_equals_watching_uninterrupted_and_every_weight_learns(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "FilmConfig", lambda *ids: FilmConfig(*ids, channels=8, text=12, blocks=2))
    settings = watching.WatchConfig(batch=6, scenes=12)
    whole = watching.train_watch(tmp_path / "a", tokenizer, None, FEW, settings)
    original = loop.train
    monkeypatch.setattr(loop, "train", lambda *args: original(*args, until=2))
    watching.train_watch(tmp_path / "b", tokenizer, None, FEW, settings)
    assert loop.progress(tmp_path / "b" / "watch.safetensors")[0] == 2
    monkeypatch.setattr(loop, "train", original)
    resumed = watching.train_watch(tmp_path / "b", tokenizer, None, FEW, settings)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    pool = captions.draw_pool(8, 1, tokenizer)
    whole.train()
    loss, _ = watching.watch_loss(whole, pool, settings, "cpu")(0, torch.Generator().manual_seed(1))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in whole.parameters())


def test_a_flipped_vote_asks_for_the_opposite():
    own, crossed = torch.tensor([2.0]), torch.tensor([-1.0])
    straight = watching.vote_loss(own, crossed, torch.tensor([False]))
    assert straight.item() == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-5)
    assert watching.vote_loss(own, crossed, torch.tensor([True])).item() == pytest.approx(straight.item() + 3, rel=1e-5)


def test_the_folder_of_the_watching_reward_loads(tokenizer, tmp_path):
    torch.manual_seed(1)
    model = FilmScorer(FilmConfig(len(tokenizer), tokenizer.eos_token_id, channels=8, text=12, blocks=2)).half().float()
    watching.save_watch(tmp_path, model, tokenizer)
    reward = reward_models.load("shapes-watch", source=tmp_path)
    images, texts = torch.rand(2, 3, 64, 64), ["a circle", "a red star left of a ring"]
    eight_bit = (images * 255).round().byte().permute(0, 2, 3, 1)
    ours = watching.watch_scores(watching.load_watch(tmp_path), tokenizer, "cpu")(eight_bit, texts)
    torch.testing.assert_close(reward((images * 255).round() / 255, texts), ours.detach(), atol=1e-5, rtol=1e-4)
