"""ImageReward against its network written once more in plain torch, on a tiny checkpoint in the published layout."""

from __future__ import annotations

import logging
import re
import shutil

import pytest
import torch
from torch import nn

from diffalign.reward_models.checkpoints import collapse
from tests.reward_models.conftest import PROMPTS
from tests.reward_models.plain_blip import PlainImageReward
from tests.reward_models.tiny_tokenizers import bert_tokenizer
from tests.reward_models.tiny_vlms import tiny_image_reward

NAME = "image-reward"


@pytest.fixture(scope="module")
def reward(load):
    return load(NAME)


@pytest.fixture(scope="module")
def plain(weights):
    tensors = torch.load(weights / NAME / "model" / "ImageReward.pt", weights_only=True)
    model = tiny_image_reward(len(tensors["blip.text_encoder.embeddings.word_embeddings.weight"]))
    model.load_state_dict(tensors)
    return model


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, ["", "a red circle " * 30, "Ünïcode, RED!"]])
def test_equals_the_plain_network(reward, plain, images, prompts):
    tokenizer = bert_tokenizer()
    tokenizer.enable_truncation(35)
    tokenizer.enable_padding(length=35, pad_id=0, pad_token="[PAD]")
    encodings = tokenizer.encode_batch(prompts)
    ids, mask = (torch.tensor([getattr(encoding, kind) for encoding in encodings]) for kind in ("ids", "attention_mask"))
    expected = plain(reward.pixels(images), ids, mask)
    assert expected.std() > 0.1
    torch.testing.assert_close(reward(images, prompts), expected, atol=1e-5, rtol=1e-5)


def test_a_full_size_network_has_the_published_number_of_tensors():
    with torch.device("meta"):
        model = PlainImageReward(
            width=1024, inner=4096, depth=24, size=224, patch=16, words=30524, text_width=768, text_inner=3072, text_depth=12
        )
    tensors = model.state_dict()
    assert len(tensors) == 625
    assert sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("position_ids")) == pytest.approx(446.67e6, rel=1e-4)


def test_what_transformers_would_set_otherwise(reward):
    assert {norm.eps for norm in reward.vision.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    assert {norm.eps for norm in reward.text.modules() if isinstance(norm, nn.LayerNorm)} == {1e-12}
    assert {layer.self_attn.head_dim for layer in reward.vision.encoder.layers} == {64}
    assert {layer.crossattention.self.attention_head_size for layer in reward.text.encoder.layer} == {64}
    assert reward.pixels.round_crop  # torchvision's crop, as the original's


def test_layers_without_activations_between_them_are_one():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 1)]
    x = torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(collapse(layers)(x), nn.Sequential(*layers)(x))


def test_a_head_that_gives_nothing_scores_minus_mean_over_standard_deviation(load, images):
    reward = load(NAME)
    nn.init.zeros_(reward.head.weight)
    nn.init.zeros_(reward.head.bias)
    torch.testing.assert_close(reward(images, PROMPTS), torch.full((3,), -0.16178))


def test_special_tokens_in_a_prompt_are_spelled(reward):
    (plain,), (spelled,) = reward.encode_text(["a red circle"]), reward.encode_text(["a red [SEP] circle [PAD]"])
    ends = {reward.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]")}
    assert len(spelled) > len(plain)
    assert [t for t in spelled.tolist() if t in ends] == [plain[0].item(), plain[-1].item()]


def test_a_prompt_is_read_to_the_thirty_fifth_token(load, caplog):
    reward = load(NAME)
    with caplog.at_level(logging.WARNING):
        (ids,) = reward.encode_text(["red " * 33])
        reward.encode_text(["\u200b\ue000", "   ", ""])  # dropped by BERT, not cut
        assert not caplog.records
        (longer,) = reward.encode_text(["red " * 34 + "circle"])
    assert torch.equal(ids, longer)
    assert "ignores the last 10 characters: 'red circle'" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blip.visual_encoder.blocks.1.attn.qkv.weight"), r"missing: vision\.encoder\.layers\.1\.self_attn\.qkv\.weight"),
        (lambda t: t.pop("blip.text_encoder.embeddings.word_embeddings.weight"), r"missing: text\.embeddings\.word_embeddings\.weight"),
        (lambda t: t.pop("mlp.layers.7.weight"), r"missing: mlp\.layers\.7\.weight"),
        (lambda t: t.pop("mlp.layers.4.bias"), r"missing: mlp\.layers\.4\.bias"),
        (lambda t: t.update({"blip.visual_encoder.blocks.0.ls1": torch.ones(1)}), r"unexpected: blip\.visual_encoder\.blocks\.0\.ls1"),
        (lambda t: t.update({"mlp.layers.9.weight": torch.ones(1, 1)}), r"unexpected: mlp\.layers\.9\.weight"),
        (lambda t: t.update({"blip.visual_encoder.norm.bias": torch.ones(3)}), r"of another shape: vision\.post_layernorm\.bias"),
    ],
)
def test_wrong_tensors_are_named(load, weights, tmp_path, change, message):
    shutil.copytree(weights / NAME, tmp_path / NAME)
    path = tmp_path / NAME / "model" / "ImageReward.pt"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=message) as caught:
        load(NAME, tmp_path)
    assert re.search(r"ImageReward\.pt", str(caught.value))


def test_a_missing_tokenizer_is_named(load, weights, tmp_path):
    shutil.copytree(weights / NAME, tmp_path / NAME)
    path = tmp_path / NAME / "tokenizer" / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer in .*tokenizer\.json cannot be read"):
        load(NAME, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"'image-reward': .*tokenizer\.json is missing; say where the tokenizer lies"):
        load(NAME, tmp_path)


@torch.no_grad()
def test_the_backbone_in_bfloat16(load, reward, images):
    rough = load(NAME, dtype="bfloat16")
    assert rough.text.dtype == rough.vision.dtype == torch.bfloat16
    assert rough.head.weight.dtype == torch.float32
    torch.testing.assert_close(rough(images, PROMPTS), reward(images, PROMPTS), atol=0.3, rtol=0)
