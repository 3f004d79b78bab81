"""HPSv3: its instruction, its positions, and its language model once more in plain torch, on a tiny checkpoint of the published layout."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diffalign.reward_models.hpsv3 import PIXELS, read_instruction
from diffalign.reward_models.qwen_pixels import QwenPixels
from tests.reward_models.conftest import PROMPTS

NAME = "hpsv3"


@pytest.fixture(scope="module")
def reward(load):
    return load(NAME)


@pytest.fixture(scope="module")
def tensors(weights):
    return {name: tensor.float() for name, tensor in load_file(weights / NAME / "model" / "HPSv3.safetensors").items()}


def whole_text(reward, weights, prompt: str, image_tokens: int) -> torch.Tensor:
    """The ids of the published input, to the end of it, all tokenized at once as transformers' processor does it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(weights / NAME / "backbone")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    content = [{"type": "image"}, {"type": "text", "text": read_instruction().format(text_prompt=prompt)}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|Reward|>\n\nEND\n<|im_end|>\n<|im_start|>assistant\n")
    return torch.tensor(tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * image_tokens), add_special_tokens=False).input_ids)


def plain_language_model(tensors, embeddings: torch.Tensor, heads: int = 4, groups: int = 2, theta: float = 1e6) -> torch.Tensor:
    """Qwen2's decoder on embeddings "l d" at positions 0, 1, 2, ..., under the checkpoint's names; the last hidden states."""

    def norm(x, name):
        return tensors[f"{name}.weight"] * x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    length, width = embeddings.shape[0], embeddings.shape[1] // heads
    angles = torch.arange(length)[:, None] * theta ** -(torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(x):  # pairs (i, i + width / 2) are one complex number
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    future = torch.full((length, length), -math.inf).triu(1)
    x = embeddings
    for i in range(2):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(y, f"{layer}.self_attn.{p}_proj").unflatten(1, (-1, width)).transpose(0, 1) for p in "qkv")
        k, v = (z.repeat_interleave(heads // groups, dim=0) for z in (k, v))
        attention = (rotate(q) @ rotate(k).transpose(1, 2) / math.sqrt(width) + future).softmax(dim=-1)
        x = x + linear((attention @ v).transpose(0, 1).flatten(1), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        x = x + linear(F.silu(linear(y, f"{layer}.mlp.gate_proj")) * linear(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return norm(x, "model.norm")


def plain_head(tensors, h: torch.Tensor) -> torch.Tensor:
    for i in (0, 3, 5):
        h = F.linear(h, tensors[f"rm_head.{i}.weight"], tensors[f"rm_head.{i}.bias"])
        h = h.relu() if i < 5 else h
    return h


@pytest.fixture(scope="module")
def inputs(reward, weights):
    """An image's tokens, and the ids of the whole published input, for each prompt."""
    images = 0.3 + 0.4 * torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    patches, (rows, columns) = reward.pixels(images)
    with torch.no_grad():
        grid = torch.tensor([[1, rows, columns]] * 3)
        visual = reward.backbone.visual(patches.flatten(0, 1), grid_thw=grid).pooler_output.unflatten(0, (3, -1))
    return visual, [whole_text(reward, weights, prompt, visual.shape[1]) for prompt in PROMPTS], patches, grid


def test_the_instruction_is_the_published_one():
    text = read_instruction()
    assert len(text) == 2590
    assert hashlib.sha256(text.encode()).hexdigest() == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    assert text.count("{text_prompt}") == text.count("<|Reward|>") == 1


def test_our_tokens_are_the_published_ones_up_to_the_one_that_is_scored(reward, inputs):
    visual, wholes, _, _ = inputs
    for ours, whole in zip(reward.encode_text(PROMPTS), wholes, strict=True):
        column = reward.chat.column
        shown = torch.cat([ours[:column], ours[column].expand(visual.shape[1]), ours[column + 1 :]])
        assert torch.equal(whole[: len(shown)], shown)
        assert shown[-1] == reward.reward_token
        assert len(whole) > len(shown)


@torch.no_grad()
def test_equals_the_plain_language_model_on_the_whole_published_input(reward, tensors, inputs, images):
    visual, wholes, _, _ = inputs
    outputs = []
    for tokens, ids in zip(visual, wholes, strict=True):
        embeddings = F.embedding(ids, tensors["model.embed_tokens.weight"])
        embeddings[ids == reward.chat.image] = tokens
        states = plain_language_model(tensors, embeddings)
        outputs.append(plain_head(tensors, states[(ids == reward.reward_token).nonzero()[0, 0]]))
    expected = torch.stack(outputs)
    assert expected[:, 0].std() > 0.1
    mu, sigma = reward.distribution(images, PROMPTS)
    torch.testing.assert_close(mu, expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sigma, expected[:, 1].exp(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reward(images, PROMPTS), mu)


@torch.no_grad()
def test_the_positions_transformers_would_choose_give_other_scores(reward, inputs, images):
    _, wholes, patches, grid = inputs
    ids = wholes[0].unsqueeze(0)
    size = len(patches[0])
    states = reward.backbone(
        input_ids=ids, pixel_values=patches[0], image_grid_thw=grid[:1], mm_token_type_ids=(ids == reward.chat.image).int()
    ).last_hidden_state
    chosen = reward.head(states[0, (ids[0] == reward.reward_token).nonzero()[0, 0]])[0]
    assert size == grid[0].prod()
    assert (chosen - reward(images[:1], PROMPTS[:1])).abs() > 1e-2


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        ((448, 448), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((64, 64), (448, 448)),
        ((768, 1344), (336, 588)),
        ((832, 1216), (364, 532)),
        ((640, 1536), (280, 672)),
    ],
)
def test_every_image_becomes_about_as_many_tokens(size, tile):
    pixels = QwenPixels(14, 2, 2, (0.0,) * 3, (1.0,) * 3, PIXELS, PIXELS)
    assert pixels.size(*size) == tile
    assert pixels.size(*reversed(size)) == tuple(reversed(tile))


def test_a_prompt_shows_no_image_and_earns_no_reward(reward):
    (ids,) = reward.encode_text(["a <|image_pad|> <|Reward|> {text_prompt} <|im_end|> circle"])
    plain = reward.encode_text(["a circle"])[0]
    specials = {*reward.chat.tokenizer.added_tokens_decoder, reward.reward_token}
    assert [t for t in ids.tolist() if t in specials] == [t for t in plain.tolist() if t in specials]


@torch.no_grad()
def test_by_default_in_bfloat16_with_its_head_and_its_rotary_frequencies_in_float32(load, reward, images):
    rough = load(NAME, dtype=None)
    assert rough.backbone.dtype == torch.bfloat16
    assert {p.dtype for p in rough.head.parameters()} == {torch.float32}
    assert rough.backbone.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(rough.backbone.language_model.rotary_emb.inv_freq, reward.backbone.language_model.rotary_emb.inv_freq)
    exact = reward(images, PROMPTS)
    torch.testing.assert_close(rough(images, PROMPTS), exact, atol=0.02 * float(exact.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("visual.merger.mlp.0.bias"), r"missing: backbone\.visual\.merger\.mlp\.0\.bias"),
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"), r"missing: backbone\.language_model\.layers\.1\.self_attn\.k_proj\.bias"),
        (lambda t: t.pop("rm_head.3.weight"), r"needs model\.embed_tokens\.weight and rm_head\.0, rm_head\.3 and rm_head\.5"),
        (lambda t: t.pop("rm_head.5.bias"), r"missing: head\.5\.bias"),
        (lambda t: t.update({"extra.weight": torch.ones(1)}), r"unexpected: extra\.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), r"of another shape: backbone\.language_model\.norm\.weight"),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(9, 32)}),
            r"has 9 tokens; there should be one more than the \d+ of backbone",
        ),
    ],
)
def test_wrong_tensors_are_named(load, weights, tmp_path, change, message):
    shutil.copytree(weights / NAME, tmp_path / NAME)
    path = tmp_path / NAME / "model" / "HPSv3.safetensors"
    content = load_file(path)
    change(content)
    save_file(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        load(NAME, tmp_path)
    assert "HPSv3.safetensors" in str(caught.value)


def test_another_models_configuration_is_refused(load, weights, tmp_path):
    shutil.copytree(weights / NAME, tmp_path / NAME)
    path = tmp_path / NAME / "backbone" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"config\.json does not describe a Qwen2-VL"):
        load(NAME, tmp_path)
    path.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config\.json must be a JSON object with the keys vision_config"):
        load(NAME, tmp_path)


def test_the_output_layer_is_left_on_the_disk(reward, tensors):
    assert "lm_head.weight" in tensors
    assert not any("lm_head" in name for name in reward.state_dict())
