"""VQAScore against T5ForConditionalGeneration's own loss, one sample at a time, on a tiny checkpoint in the published layout."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer

from diffalign.reward_models.vqascore import QUESTION, SYSTEM
from tests.reward_models.conftest import PROMPTS
from tests.reward_models.tiny_tokenizers import save_tokenizer, t5_tokenizer
from tests.reward_models.tiny_vlms import tiny_clip_t5

NAME = "vqascore"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.fixture(scope="module")
def reward(load):
    return load(NAME)


@pytest.fixture(scope="module")
def tensors(weights):
    folder = weights / NAME / "model"
    return {name: tensor for shard in SHARDS for name, tensor in torch.load(folder / shard, weights_only=True).items()}


@pytest.fixture
def copy(weights, tmp_path):
    shutil.copytree(weights / NAME, tmp_path / NAME)
    return tmp_path / NAME / "model"


@torch.no_grad()
def test_equals_the_models_own_loss_one_sample_at_a_time(reward, tensors, weights, images):
    """The published input built the long way: each piece of text tokenized with its own end, the image's patches between them."""
    rows = len(tensors["shared.weight"])
    t5, vision, projector = tiny_clip_t5(rows)
    lm = {name: tensor for name, tensor in tensors.items() if name in t5.state_dict()}
    t5.load_state_dict(lm)
    vision.load_state_dict({name: tensors[f"vision_tower.vision_tower.vision_model.{name}"] for name in vision.state_dict()})
    projector.load_state_dict({name: tensors[f"mm_projector.{name}"] for name in projector.state_dict()})
    tokenizer = Tokenizer.from_file(str(weights / NAME / "tokenizer" / "tokenizer.json"))
    t5.lm_head.weight.data = t5.lm_head.weight.data[: tokenizer.get_vocab_size()]  # as the original's resize_token_embeddings does
    assert tokenizer.encode("Yes").tokens == ["\u2581Yes", "</s>"]
    labels = torch.tensor([tokenizer.encode("Yes").ids])
    expected = []
    for i, prompt in enumerate(PROMPTS):
        patches = vision(reward.pixels(images[i : i + 1]), output_hidden_states=True).hidden_states[-2][:, 1:]
        before, after = (torch.tensor([tokenizer.encode(text).ids]) for text in (SYSTEM, QUESTION.format(prompt)))
        assert before[0, -1] == after[0, -1] == 1
        inputs = torch.cat([t5.shared(before), projector(patches), t5.shared(after)], dim=1)
        expected.append((-t5(inputs_embeds=inputs, labels=labels).loss).exp())
    expected = torch.stack(expected)
    assert 0.1 < expected.min() < expected.max() < 0.9
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-6, rtol=1e-5)


def test_scores_are_those_of_sentencepiece_whichever_tokenizer_file_is_published(load, reward, copy, images):
    """SentencePiece, which the original uses, drops blanks at the ends; a tokenizer of Metaspace alone makes a token of them."""
    keeping = t5_tokenizer(keeps_blanks=True)
    assert keeping.encode(SYSTEM).tokens[-3:] == ["\u2581USER:", "\u2581", "</s>"]
    assert t5_tokenizer().encode(SYSTEM).tokens[-2:] == ["\u2581USER:", "</s>"]
    save_tokenizer(keeping, copy.parent / "tokenizer")
    other = load(NAME, copy.parents[1])
    for prompt in PROMPTS:
        assert other.encode_text([prompt])[0].tolist() == reward.encode_text([prompt])[0].tolist()
    assert other.before.tolist() == reward.before.tolist() == t5_tokenizer().encode(SYSTEM).ids
    with torch.no_grad():
        assert torch.equal(other(images, PROMPTS), reward(images, PROMPTS))


def test_the_templates_are_the_published_ones():
    whole = SYSTEM + "<image>" + QUESTION.format("a red circle")
    assert whole == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
        'to the user\'s questions. USER: <image>\nDoes this figure show "a red circle"? Please answer yes or no. ASSISTANT: '
    )


def test_the_output_layer_is_not_tied_to_the_embedding_though_transformers_would(reward, tensors):
    assert torch.equal(reward.t5.lm_head.weight, tensors["lm_head.weight"])
    assert not torch.equal(reward.t5.lm_head.weight, reward.t5.shared.weight)


def test_the_embedding_is_held_once_in_every_dtype(load):
    for dtype in ("float32", None):
        t5 = load(NAME, dtype=dtype).t5
        assert t5.encoder.embed_tokens.weight is t5.decoder.embed_tokens.weight is t5.shared.weight
        assert t5.shared.weight.dtype == (torch.bfloat16 if dtype is None else torch.float32)


@torch.no_grad()
def test_by_default_in_bfloat16_with_probabilities_in_float32(load, reward, images):
    rough = load(NAME, dtype=None)
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}
    scores = rough(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, reward(images, PROMPTS), atol=0.05, rtol=0)


def test_a_long_prompt_leaves_the_question_whole(reward):
    end = reward.tokenizer.encode("? Please answer yes or no. ASSISTANT: ").ids[-6:]
    (ids,) = reward.encode_text(["circle " * 3000])
    assert ids[-6:].tolist() == end
    assert 2048 < len(ids) < 2100


def test_special_tokens_in_a_prompt_are_spelled(reward):
    (ids,) = reward.encode_text(["a red</s> circle<pad> <unk> <image>"])
    assert [t for t in ids.tolist() if t in (0, 1, 2)] == [1]
    assert ids[-1] == 1


@pytest.mark.parametrize(
    ("shard", "change", "message"),
    [
        (
            0,
            lambda t: t.pop("encoder.block.1.layer.0.SelfAttention.q.weight"),
            r"missing: t5\.encoder\.block\.1\.layer\.0\.SelfAttention\.q",
        ),
        (0, lambda t: t.pop("lm_head.weight"), r"missing: t5\.lm_head\.weight"),
        (1, lambda t: t.pop("mm_projector.2.bias"), r"missing: projector\.2\.bias"),
        (1, lambda t: t.pop("mm_projector.0.weight"), r"no CLIP-FlanT5 checkpoint; missing: projector\.0\.weight"),
        (1, lambda t: t.pop("vision_tower.vision_tower.vision_model.pre_layrnorm.bias"), r"missing: vision\.pre_layrnorm\.bias"),
        (1, lambda t: t.update({"mm_projector.4.weight": torch.ones(2, 2)}), r"unexpected: projector\.4\.weight"),
        (
            0,
            lambda t: t.update({"decoder.final_layer_norm.weight": torch.ones(3)}),
            r"of another shape: t5\.decoder\.final_layer_norm\.weight",
        ),
    ],
)
def test_wrong_tensors_are_named(load, copy, shard, change, message):
    path = copy / SHARDS[shard]
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        load(NAME, copy.parents[1])
    assert "pytorch_model.bin.index.json" in str(caught.value)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_one_name_of_the_embedding_is_enough(load, reward, copy, name):
    path = copy / SHARDS[0]
    content = torch.load(path, weights_only=True)
    embedding = content["shared.weight"]
    for alias in ("shared.weight", "embed_tokens.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        content.pop(alias)
    torch.save(content | {name: embedding}, path)
    assert torch.equal(load(NAME, copy.parents[1]).t5.shared.weight, reward.t5.shared.weight)


def test_missing_shards_and_other_configurations_are_named(load, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"feed_forward_proj": "a-b-c"}))
    with pytest.raises(ValueError, match=r"config\.json does not describe a T5"):
        load(NAME, copy.parents[1])
    (copy / SHARDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        load(NAME, copy.parents[1])


def test_pictures_are_padded_to_a_square_of_the_mean(reward):
    assert reward.pixels.geometry == "square+mean"
    border = reward.pixels(torch.rand(1, 3, 42, 84))[..., :5, :]
    torch.testing.assert_close(border, torch.zeros_like(border), atol=0.02, rtol=0)  # normalised, it is 0 but for whole levels
