"""HPSv3++ against transformers' own processor and forward pass with the released code's formula written out, on a tiny checkpoint."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffalign.reward_models.hpsv3_plus import instruction
from tests.reward_models.conftest import PROMPTS
from tests.reward_models.test_pixels import photo, tensor_of

NAME = "hpsv3++"


@pytest.fixture(scope="module")
def reward(load):
    return load(NAME)


@pytest.fixture(scope="module")
def tensors(weights):
    return {name: tensor.float() for name, tensor in torch.load(weights / NAME / "model" / "hpsv3++.pth", weights_only=True).items()}


@torch.no_grad()
def by_transformers(folder, tensors, picture: Image.Image, prompt: str, iteration: float) -> torch.Tensor:
    """mu and log sigma of one picture: resized by Pillow, then by Qwen's processor; the whole published input, END and answer too."""
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = Qwen3VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer)
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.load_state_dict({name: t for name, t in tensors.items() if name.startswith(("model.", "lm_head."))})
    height, width = smart_resize(picture.height, picture.width, factor=28, min_pixels=200704, max_pixels=200704)
    seen = Qwen2VLImageProcessor.from_pretrained(folder)(
        images=picture.resize((width, height), Image.Resampling.BICUBIC), return_tensors="pt"
    )
    content = [{"type": "image"}, {"type": "text", "text": instruction().format(text_prompt=prompt)}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * int(seen["image_grid_thw"].prod() // 4))
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    kinds = (ids == config.image_token_id).int()
    states = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **seen).last_hidden_state
    h = states[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]
    group = linear(tensors, "cap_encoder.proj", h)
    group = (group * linear(tensors, "cap_encoder.pool_attn", group).softmax(dim=0)).sum(dim=0)  # of a group of one
    able = linear(tensors, "cap_encoder.out_proj", group).sigmoid()
    known = linear(tensors, "cond_encoder.2", F.gelu(linear(tensors, "cond_encoder.0", torch.stack([able[0], torch.tensor(iteration)]))))
    gamma, beta = linear(tensors, "film_gen.2", linear(tensors, "film_gen.0", known).relu()).chunk(2)
    h = h[0] * (1 + gamma) + beta
    return linear(tensors, "rm_head.5", linear(tensors, "rm_head.3", linear(tensors, "rm_head.0", h).relu()).relu())


def linear(tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


@pytest.mark.parametrize("iteration", [0.0, 0.7])
@pytest.mark.parametrize("size", [(300, 300), (200, 350)])
def test_equals_the_released_formula_one_picture_at_a_time(load, weights, tensors, size, iteration):
    pictures = [photo(*size, seed) for seed in range(3)]
    expected = torch.stack(
        [
            by_transformers(weights / NAME / "backbone", tensors, Image.fromarray(picture), prompt, iteration)[0]
            for picture, prompt in zip(pictures, PROMPTS, strict=True)
        ]
    )
    with torch.no_grad():
        scores = load(NAME, iteration=iteration)(torch.cat([tensor_of(np.array(picture)) for picture in pictures]), PROMPTS)
    assert expected.std() > 0.01
    tolerance = 1e-5 if size == (300, 300) else 0.02 * float(expected.std())  # bytes, where its processor resizes again by torchvision
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=1e-5)


def test_the_instruction_is_hpsv3s_without_its_part_on_the_text():
    text = instruction()
    assert "Text Alignment:**" not in text
    assert "lowest possible. \nTextual prompt - {text_prompt}\n\n\n\nPlease provide" in text
    assert text.endswith("<|Reward|>\n\nEND\n")


@torch.no_grad()
def test_the_iteration_moves_scores(load, reward, images):
    assert (load(NAME, iteration=1.0)(images, PROMPTS) - reward(images, PROMPTS)).abs().min() > 1e-4
    with pytest.raises(ValueError, match="option iteration must lie between 0 and 1, got 300"):
        load(NAME, iteration=300)


def test_by_default_in_bfloat16_but_for_what_follows_the_token(load):
    reward = load(NAME, dtype=None)
    assert {p.dtype for p in reward.backbone.parameters()} == {torch.bfloat16}
    for part in (reward.head, reward.condition, reward.film, reward.capability):
        assert {p.dtype for p in part.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("cap_encoder.proj.weight"), r"no HPSv3\+\+ checkpoint; missing: capability\.proj\.weight"),
        (lambda t: t.pop("film_gen.2.bias"), r"missing: film\.2\.bias"),
        (lambda t: t.update({"scale_gen.weight": torch.ones(2, 2)}), r"unexpected: scale_gen\.weight"),
        (lambda t: t.update({"cond_encoder.2.bias": torch.ones(3)}), r"of another shape: condition\.2\.bias"),
    ],
)
def test_wrong_tensors_are_named(load, weights, tmp_path, change, message):
    shutil.copytree(weights / NAME, tmp_path / NAME)
    path = tmp_path / NAME / "model" / "hpsv3++.pth"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load(NAME, tmp_path)
