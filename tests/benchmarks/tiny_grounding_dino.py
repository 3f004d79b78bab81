"""Grounding DINO of random weights that runs in milliseconds, with a tokenizer whose marks lie where the model looks for them."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SwinConfig,
)

from tests.benchmarks.tiny_t2i import randomised

MARKS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}  # BERT's own; the model knows them
WORDS = ("dog", "cat", "red", "cup", "bench")


def tiny_grounding_dino(seed: int = 0) -> tuple[GroundingDinoForObjectDetection, GroundingDinoProcessor]:
    vocabulary = {f"[unused{i}]": i for i in range(1040) if i not in MARKS.values()} | MARKS
    vocabulary |= {word: 1040 + i for i, word in enumerate(WORDS)}
    tokenizer = BertTokenizer(vocab=dict(sorted(vocabulary.items(), key=lambda entry: entry[1])))
    text = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=3, out_features=["stage2", "stage3", "stage4"]
        ),
        text_config=text,
        d_model=32,
        num_queries=10,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        disable_custom_kernels=True,
        max_text_len=32,
    )
    processor = GroundingDinoProcessor(GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 256}), tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomised(GroundingDinoForObjectDetection(config), std=0.1), processor
