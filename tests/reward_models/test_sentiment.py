"""Image sentiment recomputed by hand from the model open_clip loads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffalign.reward_models import sentiment
from diffalign.reward_models.sentiment import CAPTIONS, PLEASANT, UNPLEASANT
from tests.reward_models.conftest import PROMPTS

NAME = "image-sentiment"


@torch.no_grad()
def test_log_odds_of_zero_shot_classes(weights, load, images):
    import open_clip

    model = open_clip.create_model(f"local-dir:{weights / NAME}", force_quick_gelu=True).eval()
    tokenizer = open_clip.get_tokenizer("ViT-L-14")
    classes = []
    for emotions in (PLEASANT, UNPLEASANT):
        captions = [caption.format(emotion) for emotion in emotions for caption in CAPTIONS]
        embeddings = F.normalize(model.encode_text(tokenizer(captions)), dim=1)
        classes.append(F.normalize(embeddings.mean(dim=0), dim=0))
    reward = load(NAME)
    logits = 100 * F.normalize(model.encode_image(reward.pixels(images)), dim=1) @ torch.stack(classes, dim=1)
    probabilities = logits.log_softmax(dim=1)
    torch.testing.assert_close(reward(images, PROMPTS), probabilities[:, 0] - probabilities[:, 1], atol=1e-4, rtol=1e-4)


def test_what_is_pleasant_decides_the_sign(load, images, monkeypatch):
    before = load(NAME)(images, PROMPTS)
    monkeypatch.setattr(sentiment, "PLEASANT", UNPLEASANT)
    monkeypatch.setattr(sentiment, "UNPLEASANT", PLEASANT)
    torch.testing.assert_close(load(NAME)(images, PROMPTS), -before)


def test_the_text_tower_is_gone_once_the_captions_are_read(load):
    reward = load(NAME)
    assert not any("token_embedding" in name or name.startswith("clip.transformer") for name in reward.state_dict())
    with pytest.raises(ValueError, match="has no text encoder"):
        reward.drop_text_encoder()
