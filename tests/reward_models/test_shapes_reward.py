"""`shapes-reward`: the captioner's likelihood, what its trainer teaches and leaves open, rounds that resume, how it is measured."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffalign import reward_models
from diffalign.reward_models.shapes_captioner import Captioner, CaptionerConfig, other_way_round
from diffalign.shapes.train import base as base_stage
from diffalign.shapes.train import judged as made
from diffalign.shapes.train import loop, rewards_captioner_tune, text
from diffalign.shapes.train import rewards_captioner as first
from diffalign.shapes.train import rewards_captioner_tune as tune
from diffalign.shapes.train import rewards_captions as captions
from diffalign.shapes.train import rewards_climb as climbing


@pytest.fixture
def captioner(tokenizer) -> Captioner:
    torch.manual_seed(3)
    ids = CaptionerConfig(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    return Captioner(dataclasses.replace(ids, width=16, heads=2, image_layers=1, text_layers=1, stem=4))


def ids_of(tokenizer, *texts: str) -> torch.Tensor:
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids


# --- the likelihood -----------------------------------------------------------------------------------------------------------


def test_the_likelihood_is_that_of_a_softmax_and_ends_with_the_end_token(captioner, tokenizer):
    ids = ids_of(tokenizer, "a circle", "a red circle left of a star")
    memory = captioner.encode_image(torch.rand(2, 3, 64, 64))
    nats = captioner.log_likelihood(memory, ids)
    logits = captioner(memory[:1], ids[:1, :3])[0]
    by_hand = [math.log(logits[k].softmax(0)[ids[0, k + 1]]) for k in range(3)]  # a, circle, the end
    np.testing.assert_allclose(nats[0, :3].detach(), by_hand, rtol=1e-4)
    assert (nats[0, 3:] == 0).all()
    torch.testing.assert_close(nats[:1, :3], captioner.log_likelihood(memory[:1], ids[:1]))  # a longer neighbour changes nothing
    torch.testing.assert_close(tune.said(nats, ids, tokenizer.eos_token_id)[0], nats[0, :2].sum())  # the score has no end


def test_captions_read_the_memory_they_are_told_to(captioner, tokenizer):
    ids = ids_of(tokenizer, "a circle", "a star")
    memory = captioner.encode_image(torch.rand(2, 3, 64, 64))
    crossed = captioner.log_likelihood(memory, ids, torch.tensor([1, 0]))
    torch.testing.assert_close(crossed, captioner.log_likelihood(memory.flip(0), ids))


def test_a_caption_longer_than_the_network_reads_is_refused(captioner, tokenizer):
    captioner.config = dataclasses.replace(captioner.config, length=4)
    with pytest.raises(ValueError, match="ids have 7 tokens; the captioner reads at most 4"):
        captioner.trimmed(ids_of(tokenizer, "a circle and a star"))


def test_the_reward_is_the_captioner_of_its_folder(captioner, tokenizer, tmp_path):
    first.save_reward(tmp_path, captioner.half().float(), tokenizer)
    reward = reward_models.load("shapes-reward", source=tmp_path)
    images, texts = torch.rand(2, 3, 64, 64), ["a ring and a circle", "two red stars"]
    ours = tune.final_reward(first.load_captioner(tmp_path), tokenizer)(images, texts)
    torch.testing.assert_close(reward(images, texts), ours.detach())
    assert (reward(images, texts) < 0).all()


def test_a_folder_of_other_sizes_is_refused_in_a_sentence(captioner, tokenizer, tmp_path):
    first.save_reward(tmp_path, captioner, tokenizer)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"heads": 2', '"heads": 5'))
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        reward_models.load("shapes-reward", source=tmp_path)


def test_blocked_words_have_no_part_in_the_likelihood(captioner, tokenizer):
    table = captions.blocked_words(tokenizer)
    caption = "a circle above a star"
    blocked = table[torch.tensor([captions.blocked_rows(caption, 31)])]
    memory, ids = captioner.encode_image(torch.rand(1, 3, 64, 64)), ids_of(tokenizer, caption)
    captioner.log_likelihood(memory, ids, blocked=blocked).sum().backward()
    assert captioner.head.bias.grad[tokenizer("heart", add_special_tokens=False).input_ids[0]] != 0
    only = torch.zeros_like(captioner.head.bias)
    logits = captioner(memory, ids[:, :7]).detach()[0]
    right = tokenizer("right", add_special_tokens=False).input_ids[0]
    for k in range(6):
        if k != 2:  # there, after the subject, "right" is blocked
            only[right] -= (logits[k].masked_fill(blocked[0, k], -torch.inf)).softmax(0)[right]
    torch.testing.assert_close(captioner.head.bias.grad[right], only[right], atol=1e-5, rtol=1e-3)


# --- training, at a toy's size ------------------------------------------------------------------------------------------------


def tiny_pipeline(tokenizer, vae_channels: int = 8, **scheduler: object) -> StableDiffusionPipeline:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(4)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=vae_channels, norm_num_groups=4, layers_per_block=1, sample_size=64,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text.WIDTH, attention_head_dim=2,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text.build_encoder(tokenizer), tokenizer=tokenizer, unet=unet,
        scheduler=base_stage.build_scheduler(**scheduler), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Captioners of width 16."""
    monkeypatch.setattr(
        first, "CaptionerConfig", lambda *sizes: CaptionerConfig(*sizes, width=16, heads=2, image_layers=1, text_layers=1, stem=4)
    )


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


FEW = loop.LoopConfig(steps=4, lr=1e-3, seed=9, warmup=1, save_every=2)
LITTLE = first.CaptioningConfig(batch=6)


def test_captioning_resumed_equals_captioning_uninterrupted(small, tokenizer, tmp_path):
    whole = first.train_captioner(tmp_path / "a", tokenizer, None, FEW, LITTLE, scenes=12)
    half = dataclasses.replace(FEW, steps=2)
    state = loop.Trainee({"captioner": first.build(tokenizer)}, FEW, tmp_path / "b" / "captioner.safetensors")
    torch.manual_seed(FEW.seed)
    state = loop.Trainee({"captioner": first.build(tokenizer)}, FEW, tmp_path / "b" / "captioner.safetensors")
    pool = captions.draw_pool(12, FEW.seed, tokenizer)
    loss_of = first.captioning_loss(state.modules["captioner"], pool, tokenizer, LITTLE, "cpu")

    def stopped(step: int, generator: torch.Generator):
        if step == half.steps:
            raise KeyboardInterrupt
        return loss_of(step, generator)

    with pytest.raises(KeyboardInterrupt):
        loop.train(state, stopped, "stopped")
    resumed = first.train_captioner(tmp_path / "b", tokenizer, None, FEW, LITTLE, scenes=12)
    assert torch.equal(weights_of(whole), weights_of(resumed))


def test_every_weight_of_the_captioner_learns(small, tokenizer):
    model = first.build(tokenizer)
    pool = captions.draw_pool(8, 1, tokenizer)
    loss, figures = first.captioning_loss(model, pool, tokenizer, LITTLE, "cpu")(0, torch.Generator().manual_seed(1))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert 0 <= figures["ranked"] <= 1


def test_a_captioner_that_was_never_trained_is_asked_for(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="train captioner --run"):
        first.train_captioner(tmp_path, tokenizer, None, finished=True)
    with pytest.raises(FileNotFoundError, match="train captioner shapes-reward"):
        first.load_captioner(tmp_path)


def test_a_climb_raises_what_it_climbs_and_repeats_itself(tokenizer):
    pipeline = tiny_pipeline(tokenizer, prediction_type="sample")

    def reward(images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return images[:, 0].mean(dim=(1, 2))

    settings = climbing.ClimbConfig(steps=3, length=0.2, kept=(0, 3), bfloat16=False)
    make = climbing.climber(pipeline, reward, settings)
    texts = ["a circle"] * 4 + ["a star"] * 2
    images = make(texts, torch.Generator().manual_seed(1))
    assert images.shape == (6, 3, 64, 64)
    brightness = reward(images, texts).view(3, 2)
    assert (brightness[:, 1] > brightness[:, 0]).all()
    assert torch.equal(images, make(texts, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="a group must hold whole climbs of 2 images"):
        make(["a circle"] * 3, torch.Generator())


def test_a_step_on_the_sphere_has_its_length_and_a_flat_place_is_stayed_at():
    z = torch.nn.functional.normalize(torch.randn(2, 8), dim=1) * 8**0.5
    gradient = torch.randn(2, 8)
    gradient[1] = 0
    gradient[0] -= (gradient[0] @ z[0]) / 8 * z[0]  # tangent
    moved = climbing.on_sphere(z, gradient, 0.1)
    assert moved.norm(dim=1).tolist() == pytest.approx([8**0.5] * 2)
    assert torch.equal(moved[1], z[1])
    assert (moved[0] @ gradient[0]) > 0
    assert math.tan(math.acos(((moved[0] @ z[0]) / 8).item())) == pytest.approx(0.1, rel=1e-2)


def test_images_are_made_once_and_belong_to_their_prompts(tokenizer, tmp_path):
    pipeline = tiny_pipeline(tokenizer)
    calls = []

    def counted(texts, generator):
        calls.append(len(texts))
        return make(texts, generator)

    make = made.from_pipeline(pipeline, 2, (1.0, 3.0))
    rows = made.annotator_rows(3, 1)
    one = made.make_judged(tmp_path / "x", rows, 4, counted, 5, "images")
    two = made.make_judged(tmp_path / "x", rows, 4, counted, 5, "images")
    assert calls == [12]
    assert one.images.shape == (3, 4, 64, 64, 3)
    assert torch.equal(one.images, two.images)
    with pytest.raises(ValueError, match="holds images of other prompts or another number"):
        made.make_judged(tmp_path / "x", made.annotator_rows(3, 2), 4, counted, 5, "images")


def test_rounds_resume_to_the_bit_and_the_reward_they_leave_loads(small, tokenizer, tmp_path, monkeypatch):
    settings = tune.TuneConfig(
        base_prompts=2, base_steps=1, first_steps=2, rounds=2, climbed_prompts=2, fresh_prompts=(2,), prompts=2,
        captions=first.CaptioningConfig(batch=4), scenes=6,
    )  # fmt: skip
    climb = climbing.ClimbConfig(steps=3, kept=(0, 1, 2, 3))
    # Untrained generators are never right; the verdicts are drawn instead, from the images themselves so that they repeat.
    verdict = type("V", (), {})

    def drawn(images: np.ndarray, rows: list[dict]) -> list:
        out = []
        for i, _ in enumerate(rows):
            v = verdict()
            v.correct = i % 3 == 0
            out.append(v)
        return out

    monkeypatch.setattr(made, "judge_images", drawn)
    few = dataclasses.replace(FEW, steps=2, save_every=1)

    def run(folder: Path):
        turbo, base = tiny_pipeline(tokenizer, prediction_type="sample"), tiny_pipeline(tokenizer)
        torch.manual_seed(2)
        model, head = tune.train_first_round(folder, first.build(tokenizer), tokenizer, base, few, settings)
        return tune.train_rounds(folder, model, head, tokenizer, turbo, base, few, settings, climb)

    whole = run(tmp_path / "a")
    original = loop.train

    def once(trainee, loss_of, label, companions=()):
        if "round 1" in label:
            raise KeyboardInterrupt
        original(trainee, loss_of, label, companions)

    monkeypatch.setattr(rewards_captioner_tune.loop, "train", once)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    monkeypatch.setattr(rewards_captioner_tune.loop, "train", original)
    resumed = run(tmp_path / "b")
    assert torch.equal(weights_of(whole), weights_of(resumed))
    first.save_reward(tmp_path / "shapes-reward", whole, tokenizer)
    reward = reward_models.load("shapes-reward", source=tmp_path / "shapes-reward")
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(x, ["a circle", "two stars"]).sum(), x)
    assert (gradient.flatten(1).abs().sum(dim=1) > 0).all()


def test_moved_images_keep_their_content_and_mirror_only_where_they_may():
    images = torch.zeros(40, 64, 64, 3, dtype=torch.uint8)
    images[:, 20:30, 20:24] = 200  # left of the middle
    symmetric = torch.arange(40) % 2 == 0
    out = tune.moved(images, symmetric, 5, torch.Generator().manual_seed(1))
    assert (out.flatten(1).sum(dim=1, dtype=torch.int64) == images[0].sum(dtype=torch.int64)).all()
    left = out[:, :, :32].flatten(1).any(dim=1)
    assert left[~symmetric].all()
    assert 0 < left[symmetric].sum() < 20
    assert torch.equal(tune.moved(images, symmetric & False, 0, torch.Generator()), images)


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("a ring left of a star", "a star right of a ring"),
        ("a photo of an orange circle above a red heart", "a photo of a red heart below an orange circle"),
        ("a drawing of a square and a cross", "a drawing of a cross and a square"),
        ("a picture of two red hearts", "a picture of two red hearts"),
        ("a circle and a star and a ring", "a circle and a star and a ring"),
        ("", ""),
    ],
)
def test_two_things_can_be_named_from_either(prompt, other):
    assert other_way_round(prompt) == other
    assert other_way_round(other) == prompt


def test_a_prompt_scores_the_same_whichever_thing_is_named_first(captioner, tokenizer, tmp_path):
    first.save_reward(tmp_path, captioner, tokenizer)
    reward = reward_models.load("shapes-reward", source=tmp_path)
    images = torch.rand(1, 3, 64, 64)
    scores = [reward(images, [said]) for said in ("a ring left of a star", "a star right of a ring")]
    torch.testing.assert_close(*scores)
    memory = reward.captioner.encode_image(images)
    ids = ids_of(tokenizer, "a ring left of a star", "a star right of a ring")
    each = [tune.said(reward.captioner.log_likelihood(memory, one[None]), one[None], tokenizer.eos_token_id).exp() for one in ids]
    torch.testing.assert_close(scores[0].exp(), each[0] + each[1], rtol=1e-3, atol=0.0)
    alone = ids_of(tokenizer, "a ring")
    torch.testing.assert_close(
        reward(images, ["a ring"]), tune.said(reward.captioner.log_likelihood(memory, alone), alone, tokenizer.eos_token_id)
    )
