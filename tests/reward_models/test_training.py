"""The three reward trainings: losses worked by hand, and each training run for a few steps, from nothing to a reward that loads."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from diffalign import reward_models
from diffalign.shapes.train import card, loop, rewards_clip, rewards_preference
from diffalign.shapes.train import rewards_scenes as worlds
from diffalign.shapes.train.rewards import train_aesthetic, train_clip, train_preference
from tests.reward_models.conftest import PROMPTS


@pytest.fixture(scope="module")
def pool(tokenizer):
    return rewards_clip.draw_pool(30, 3, tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return rewards_clip.build_clip(rewards_clip.model_config(tokenizer))


def test_contrastive_loss_by_hand():
    """Unit vectors, scale 1: image 0 sees texts (1, 0, 0); image 1 sees (0, 1, 1), but the last is true of it too, so it is left out."""
    images = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])  # the third is a ruined image: a negative for captions alone
    texts = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    truth = torch.tensor([[True, False, False], [False, True, True]])
    loss, logits = rewards_clip.contrastive_loss(images, texts, torch.tensor(1.0), truth)
    e = math.e
    by_image = [-math.log(e / (e + 2)), -math.log(e / (1 + e))]
    by_text = [-math.log(e / (e + 2)), -math.log(e / (1 + 2 * e))]
    assert loss.item() == pytest.approx(0.5 * (sum(by_image) / 2 + sum(by_text) / 2))
    torch.testing.assert_close(logits, torch.eye(2))


def test_cutting_captions_to_the_longest_changes_nothing(model, pool):
    ids = pool.true_ids.flatten(0, 1)[:20]
    with torch.no_grad():
        torch.testing.assert_close(rewards_clip.encode_text(model, ids), model.encode_text(ids), atol=1e-5, rtol=1e-5)


def test_the_pool_says_the_truth(pool):
    assert len(pool.images) == 60
    truth = worlds.holds(pool.tables, pool.true_claims.flatten(0, 1)).unflatten(1, pool.true_claims.shape[:2])
    own = truth[torch.arange(60), torch.arange(60)]
    assert own[:, : rewards_clip.TRUE_CAPTIONS].all()
    wrong = worlds.holds(pool.tables, pool.wrong_claims.flatten(0, 1)).unflatten(1, pool.wrong_claims.shape[:2])
    assert not wrong[torch.arange(60), torch.arange(60)].any()


def test_every_other_picture_of_the_pool_may_pass_through_an_autoencoder(tokenizer):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    small = AutoencoderKL(block_out_channels=(4,), latent_channels=2, norm_num_groups=2, sample_size=64, mid_block_add_attention=False)
    plain = rewards_clip.draw_pool(3, 4, tokenizer)
    passed, again = (rewards_clip.draw_pool(3, 4, tokenizer, small) for _ in range(2))
    assert torch.equal(passed.images, again.images)
    assert torch.equal(passed.images[1::2], plain.images[1::2])
    assert all(not torch.equal(a, b) for a, b in zip(passed.images[::2], plain.images[::2], strict=True))
    assert torch.equal(passed.true_ids, plain.true_ids)


def test_patch_labels_name_what_lies_there():
    from tests.reward_models.test_training_scenes import RED_LEFT_OF_BLUE

    shapes, colors = rewards_clip.patch_labels(worlds.tabulate([RED_LEFT_OF_BLUE]))
    shapes, colors = shapes.view(8, 8), colors.view(8, 8)  # circle at (16, 32), square at (48, 32), radius 10; patches of 8 pixels
    assert (shapes[3, 1], colors[3, 1]) == (0, 0)  # patch centre (12, 28): circle, red
    assert (shapes[4, 6], colors[4, 6]) == (1, worlds.COLOR_NAMES.index("blue"))
    assert (shapes[0, 0], colors[0, 0]) == (8, 10)
    assert (shapes < 8).sum() == 8


def test_every_weight_learns(model, pool):
    heads = rewards_clip.Heads()
    model.visual.output_tokens = True
    loss, figures = rewards_clip.clip_loss(model, heads, pool, "cpu")(0, torch.Generator().manual_seed(0))
    again, _ = rewards_clip.clip_loss(model, heads, pool, "cpu")(0, torch.Generator().manual_seed(0))
    model.visual.output_tokens = False
    assert loss.item() == again.item()
    loss.backward()
    still = [name for name, p in nn.ModuleDict({"clip": model, "heads": heads}).named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert 3 < figures["contrast"] < 6  # near the logarithm of the number of candidates


def test_preference_loss_by_hand():
    equal = torch.zeros(1)
    assert rewards_preference.preference_loss(equal, equal, torch.ones(1)).item() == pytest.approx(math.log(2))
    first, second = torch.tensor([2.0]), torch.tensor([0.5])
    won = -math.log(math.exp(2) / (math.exp(2) + math.exp(0.5)))
    lost = -math.log(math.exp(0.5) / (math.exp(2) + math.exp(0.5)))
    assert rewards_preference.preference_loss(first, second, torch.ones(1)).item() == pytest.approx(won)
    assert rewards_preference.preference_loss(second, first, torch.ones(1)).item() == pytest.approx(lost)
    assert rewards_preference.preference_loss(first, second, torch.tensor([0.5])).item() == pytest.approx((won + lost) / 2)


def test_preference_gradient_pulls_the_two_scores_apart():
    scores = torch.zeros(2, requires_grad=True)
    rewards_preference.preference_loss(scores[:1], scores[1:], torch.ones(1)).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([-0.5, 0.5]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """All three, trained for a few steps."""
    root = tmp_path_factory.mktemp("trained")
    run, few = root / "run", loop.LoopConfig(steps=2, lr=5e-3, seed=1, warmup=1)
    clip = train_clip(run, tokenizer, root / "shapes-clip", config=few, scenes=10, per_kind=1)
    train_preference(run, clip, root / "shapes-preference", config=few, pairs=6, per_kind=1, evaluated_pairs=6)
    train_aesthetic(run, clip, root / "shapes-aesthetic", config=few, pictures=20, evaluated=12)
    return root


@pytest.mark.parametrize("name", ["shapes-clip", "shapes-preference", "shapes-aesthetic"])
def test_what_is_trained_loads_and_is_described(trained, name):
    reward = reward_models.load(name, source=trained / name)
    x = torch.rand(3, 3, 64, 64, requires_grad=True)
    reward(x, PROMPTS).sum().backward()
    assert x.grad.flatten(1).norm(dim=1).min() > 0
    files = list((trained / name).iterdir())
    assert sum(file.stat().st_size for file in files) < 6e6
    assert all(file.stat().st_mode & 0o044 for file in files)
    assert not [file.name for file in files if file.suffix == ".tmp"]
    written = json.loads((trained / name / "card.json").read_text())
    assert (written["title"], written["seed"], written["licence"]) == (name, 1, "Apache-2.0")
    assert set(written["figures"]) == {"train", "validation", "test"}
    page = (trained / name / "README.md").read_text()
    assert page.startswith("---\nlicense: apache-2.0\n---\n\n# " + name)
    assert f"| command | `python -m diffalign.shapes.train {name}` |" in page


def test_training_moves_every_weight_and_keeps_clip_for_the_head(trained, tokenizer):
    torch.manual_seed(1)
    fresh = rewards_clip.build_clip(rewards_clip.model_config(tokenizer)).state_dict()
    reward = reward_models.load("shapes-clip", source=trained / "shapes-clip")
    unmoved = [n for n, t in reward.clip.state_dict().items() if torch.allclose(t, fresh[n].half().float(), atol=1e-7) and t.any()]
    assert unmoved == []
    head = reward_models.load("shapes-aesthetic", source=trained / "shapes-aesthetic")
    same = head.tower.state_dict()
    assert all(torch.equal(t, same[n]) for n, t in reward.clip.visual.state_dict().items())


def test_the_reward_is_what_training_scored(trained, tokenizer):
    """The figures of the cards are those of the reward that is loaded: training's own score and the reward's agree."""
    from transformers import CLIPModel

    levels = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = levels.permute(0, 3, 1, 2).float() / 255
    clip = reward_models.load("shapes-clip", source=trained / "shapes-clip")
    theirs = rewards_clip.clip_scores(clip.clip, tokenizer, "cpu")(levels, PROMPTS)
    torch.testing.assert_close(clip(images, PROMPTS), 100 * theirs, atol=1e-3, rtol=1e-5)
    model = CLIPModel.from_pretrained(trained / "shapes-preference", dtype=torch.float32)
    theirs = rewards_preference.preference_scores(model, tokenizer, "cpu")(levels, PROMPTS)
    reward = reward_models.load("shapes-preference", source=trained / "shapes-preference")
    torch.testing.assert_close(reward(images, PROMPTS), theirs, atol=1e-4, rtol=1e-5)


def test_wilsons_interval_by_hand():
    """8 of 10: centre (0.8 + 1.92 / 10) / 1.384, half width as Wilson (1927) has it."""
    found = card.interval(8, 10)
    assert (found["value"], found["n"]) == (0.8, 10)
    assert found["low"] == pytest.approx(0.4902, abs=1e-4)
    assert found["high"] == pytest.approx(0.9433, abs=1e-4)
    assert card.interval(0, 5)["low"] == 0
    assert card.interval(5, 5)["high"] == 1
    for correct, total in ((3, 2), (0, 0), (-1, 4)):
        with pytest.raises(ValueError, match="interval needs"):
            card.interval(correct, total)
