"""`image-reward`: ImageReward 1.0, a BLIP that reads prompt and image together. Score = (affine map of [CLS] - mean) / std, about N(0, 1).

Paper: Xu et al., ImageReward (arXiv 2304.05977). Weights: ImageReward.pt, a plain state dict; the prompt goes through a BERT tokenizer.

    v = ViT(image)                          every patch, after the last layer norm
    h = BERT(prompt, cross-attention to v)  both directions, 35 tokens
    score = (w . h[CLS] + b - 0.16717) / 1.03334

The published head is five linear layers without activations between them, so it is one affine map (w, b); we multiply them out in
float64. The file carries no configuration: sizes are read off its tensors, attention heads are 64 wide, as in both published towers.
transformers' defaults for BLIP differ from ImageReward's in four places, each of which changes scores silently: epsilon of the vision
layer norms (1e-6), heads of the text encoder (12), the width it attends to (the ViT's), and `is_decoder`, without which there is no
cross-attention at all; attention stays bidirectional all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from diffalign.reward_models.base import Images, RewardModel, Scores, attention_mask
from diffalign.reward_models.checkpoints import collapse, load_strict, read_plain_tokenizer, read_weights, report_cut, without_weights
from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

TOKENS = 35  # with [CLS] and [SEP]
HEAD_WIDTH = 64
HEAD = (0, 2, 4, 6, 7)  # places of the linear layers among the dropouts
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's outputs on ImageReward's training data
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")  # of BLIP's pre-training
VISION = {  # ours <- the name in the checkpoint, after "blip.visual_encoder."
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj\.(\w+)": r"embeddings.patch_embedding.\1",
    r"norm\.(\w+)": r"post_layernorm.\1",
    r"blocks\.(\d+)\.norm([12])\.(\w+)": r"encoder.layers.\1.layer_norm\2.\3",
    r"blocks\.(\d+)\.attn\.qkv\.(\w+)": r"encoder.layers.\1.self_attn.qkv.\2",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"encoder.layers.\1.self_attn.projection.\2",
    r"blocks\.(\d+)\.mlp\.fc([12])\.(\w+)": r"encoder.layers.\1.mlp.fc\2.\3",
}


class ImageReward(RewardModel):
    """Prompt and image meet in every layer of the text encoder, so only token ids can be prepared, and nothing can be dropped."""

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        path = sources["model"].file("ImageReward.pt")
        tensors = rename(read_weights(path))
        self.vision, self.text, self.head = build(tensors, path)
        self.pixels = Preprocess(self.vision.config.image_size, OPENAI_MEAN, OPENAI_STD, round_crop=True)
        self.tokenizer = read_plain_tokenizer(sources["tokenizer"])
        self.tokenizer.enable_truncation(TOKENS)
        self.train(False)

    def encode_text(self, prompts: list[str]) -> list[Int[Tensor, " l"]]:
        encodings = self.tokenizer.encode_batch(prompts)
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:  # else what was not read is white space, or characters that BERT drops
                report_cut(self.name, TOKENS, prompt[max(end for _, end in encoding.offsets) :])
        return [torch.tensor(encoding.ids) for encoding in encodings]

    def collate(self, texts: list[Tensor]) -> Int[Tensor, "b l"]:
        return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1)

    def score(self, images: Images, texts: Int[Tensor, "b l"] | None) -> Scores:
        patches = self.vision(pixel_values=self.pixels(images)).last_hidden_state
        mask = attention_mask(texts >= 0, patches.dtype)
        states = self.text(input_ids=texts.clamp(min=0), attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (nn.functional.linear(states[:, 0].float(), self.head.weight.float(), self.head.bias.float())[:, 0] - MEAN) / STD


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names of transformers' BLIP: vision.*, text.* and mlp.layers.*. Others keep their names."""
    renamed = {}
    for name, tensor in tensors.items():
        rest = name.split(".", 2)[-1]
        if name.startswith("blip.text_encoder.") and name not in UNUSED:
            name = f"text.{rest}"
        elif name.startswith("blip.visual_encoder."):
            name = next((f"vision.{re.sub(old, new, rest)}" for old, new in VISION.items() if re.fullmatch(old, rest)), name)
        renamed[name] = tensor
    return renamed


def build(tensors: dict[str, Tensor], path: Path) -> tuple[BlipVisionModel, BlipTextModel, nn.Linear]:
    """The two towers with their weights, and the head as one affine map in float32. Raises ValueError naming what does not fit."""
    try:
        parts = without_weights(lambda: _empty(tensors))
    except KeyError as error:
        raise ValueError(f"{path} is no ImageReward checkpoint; missing: {error.args[0]}") from error
    load_strict(parts, tensors, path, unused=UNUSED)
    return parts["vision"], parts["text"], collapse(list(parts["mlp"]["layers"].values()))


def _empty(tensors: Mapping[str, Tensor]) -> nn.ModuleDict:
    """The modules these tensors belong to."""
    width, _, patch, _ = tensors["vision.embeddings.patch_embedding.weight"].shape
    words, hidden = tensors["text.embeddings.word_embeddings.weight"].shape
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_count(tensors, r"vision\.encoder\.layers\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round((tensors["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=len(tensors["text.encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_count(tensors, r"text\.encoder\.layer\.(\d+)\."),
        num_attention_heads=hidden // HEAD_WIDTH,
        max_position_embeddings=len(tensors["text.embeddings.position_embeddings.weight"]),
        is_decoder=True,
        bos_token_id=None,  # BLIP's [DEC], which nothing here uses
    )
    head = {str(i): nn.Linear(*reversed(tensors[f"mlp.layers.{i}.weight"].shape)) for i in HEAD}
    return nn.ModuleDict(
        {
            "vision": BlipVisionModel(vision),
            "text": BlipTextModel(text, add_pooling_layer=False),
            "mlp": nn.ModuleDict({"layers": nn.ModuleDict(head)}),
        }
    )


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in tensors if (match := re.match(pattern, name)))
