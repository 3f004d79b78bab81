"""The models that T2I-CompBench asks, at a size that runs in milliseconds: BLIP-VQA, DPT and OWLv2 of random weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPTokenizer,
    DPTConfig,
    DPTForDepthEstimation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
)

from tests.tiny import MAX_TOKENS, tiny_tokenizer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "?", "a", "the", "red", "green", "cup", "bench", "bowl", "dog", "blue")


def randomised(model: nn.Module, std: float = 0.2) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std)
    return model.eval()


def tiny_blip(seed: int = 0, patch: int = 16) -> tuple[BlipForQuestionAnswering, BertTokenizer]:
    """[DEC] and [ENC] are the two ids behind the words, as in the real one."""
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = BlipTextConfig(
        vocab_size=len(WORDS) + 2, encoder_hidden_size=32, bos_token_id=len(WORDS), sep_token_id=3, max_position_embeddings=40, **shared
    )
    vision = BlipVisionConfig(image_size=2 * patch, patch_size=patch, **shared)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipForQuestionAnswering(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
        return randomised(model), tokenizer


def tiny_dpt(seed: int = 0, patch: int = 8) -> DPTForDepthEstimation:
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=4 * patch,
        patch_size=patch,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomised(DPTForDepthEstimation(config))


def tiny_owlv2(seed: int = 0) -> tuple[Owlv2ForObjectDetection, Owlv2Processor]:
    tokenizer: CLIPTokenizer = tiny_tokenizer()
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1}
    config = Owlv2Config(
        text_config={"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, **shared, **marks},
        vision_config={"image_size": 32, "patch_size": 8, **shared},
        projection_dim=32,
    )
    processor = Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomised(Owlv2ForObjectDetection(config)), processor
