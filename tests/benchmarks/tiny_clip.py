"""A CLIP of random weights that runs in milliseconds, with the tokenizer of the tiny pipelines."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from tests.tiny import MAX_TOKENS, tiny_tokenizer


def tiny_clip(seed: int = 0, image_size: int = 16) -> tuple[CLIPModel, CLIPTokenizer]:
    tokenizer = tiny_tokenizer()
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, **shared, **marks)
    vision = CLIPVisionConfig(image_size=image_size, patch_size=8, **shared)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.eval(), tokenizer
