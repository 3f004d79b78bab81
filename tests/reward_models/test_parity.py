"""The same random weights through open_clip, through transformers, and through our rewards give the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffalign.shapes.train.rewards_convert import convert, convert_weights
from tests.reward_models.conftest import PROMPTS, layout


@pytest.fixture(scope="module")
def ids(tokenizer):
    prompts = [*PROMPTS, "", "a photo of a large red circle at the top left and a small blue square at the bottom right"]
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def test_open_clip_and_transformers_agree_on_the_same_weights(tiny_clip, tokenizer, ids, images):
    twin = convert(layout(tokenizer), tiny_clip.state_dict())
    pixels = 2 * images - 1
    image, text = tiny_clip.encode_image(pixels), tiny_clip.encode_text(ids)
    assert image.std() > 0.1
    assert text.std() > 0.1
    torch.testing.assert_close(twin.get_image_features(pixel_values=pixels).pooler_output, image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(twin.get_text_features(input_ids=ids).pooler_output, text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(twin.logit_scale, tiny_clip.logit_scale)


@torch.no_grad()
def test_the_activation_is_gelu_and_not_transformers_default(tiny_clip, tokenizer, images):
    twin = convert(layout(tokenizer), tiny_clip.state_dict())
    for layer in twin.vision_model.encoder.layers:
        layer.mlp.activation_fn = torch.nn.Sequential(torch.nn.Identity(), _QuickGELU())
    different = twin.get_image_features(pixel_values=2 * images - 1).pooler_output - tiny_clip.encode_image(2 * images - 1)
    assert different.abs().max() > 1e-3


class _QuickGELU(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def test_the_key_map_loses_and_invents_nothing(tiny_clip):
    weights = tiny_clip.state_dict()
    converted = convert_weights(weights)
    assert sum(t.numel() for t in converted.values()) == sum(t.numel() for t in weights.values())
    with pytest.raises(KeyError, match=r"visual\.attn_pool\.query"):
        convert_weights(weights | {"visual.attn_pool.query": torch.zeros(1)})


@torch.no_grad()
def test_shapes_clip_is_a_hundred_cosines_of_the_model_open_clip_loads(weights, load, images):
    import open_clip

    model = open_clip.create_model(f"local-dir:{weights / 'shapes-clip'}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{weights / 'shapes-clip'}")(PROMPTS)
    expected = 100 * F.cosine_similarity(model.encode_image(2 * images - 1), model.encode_text(tokens))
    torch.testing.assert_close(load("shapes-clip")(images, PROMPTS), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_shapes_preference_is_the_logit_of_the_model_transformers_loads(weights, load, images):
    from transformers import CLIPModel, CLIPTokenizer

    folder = weights / "shapes-preference"
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", return_tensors="pt")
    logits = model(input_ids=batch.input_ids, pixel_values=2 * images - 1).logits_per_image
    torch.testing.assert_close(load("shapes-preference")(images, PROMPTS), logits.diagonal(), atol=1e-4, rtol=1e-5)


def test_the_preprocessing_transformers_reads_is_the_one_we_apply(weights, load):
    from PIL import Image
    from transformers import AutoImageProcessor

    from tests.reward_models.test_pixels import photo, tensor_of

    picture = photo(90, 120)
    processor = AutoImageProcessor.from_pretrained(weights / "shapes-preference")
    theirs = torch.as_tensor(processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"])
    difference = (load("shapes-preference").pixels(tensor_of(picture)) - theirs).abs() * 127.5
    assert difference.mean() < 1e-2
    assert difference.max() < 1.001


@torch.no_grad()
def test_float16_on_disk_costs_little(tiny_clip, tokenizer, load, images):
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    exact = F.cosine_similarity(tiny_clip.encode_image(2 * images - 1), tiny_clip.encode_text(ids))
    stored = load("shapes-clip")(images, PROMPTS) / 100
    assert not torch.equal(stored, exact)
    torch.testing.assert_close(stored, exact, atol=1e-2, rtol=0)
