"""`vqascore`: CLIP-FlanT5 asked whether the image shows the prompt. Score = geometric mean of P("Yes") and P(end | "Yes"), in (0, 1].

Paper: Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text Generation (arXiv 2404.01291). Weights:
zhiqiulin/clip-flant5-xxl (or -xl), a T5 with a CLIP tower and a two-layer projector, in shards of torch's format; Apache-2.0.

    v = projector(CLIP ViT-L/14-336, second last layer, patches without [CLS])
    score = exp(mean over the tokens a of "Yes</s>" of log p_T5(a | "<system> USER: " v "\\n<question> ASSISTANT: ", tokens before a))

Each sample's mean is its own (a loss averaged over a batch, as some ports take it, is one number for all). The two pieces of text are
tokenised apart, so an end token stands before the image, as in training. Padding is on the right of the encoder's input and masked.
The original's SentencePiece drops blanks at both ends of a text. Published tokenizer.json files differ in that: some keep the
blank that ends both pieces as a token of its own, which changes scores by up to three times. So it is taken off here.

The question keeps its end: of a prompt beyond 2,048 tokens the rest is left out, and reported, where the original cuts the question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from diffalign.files import read_json
from diffalign.reward_models.base import Images, RewardModel, Scores, attention_mask
from diffalign.reward_models.checkpoints import load_strict, read_plain_tokenizer, read_weights, report_cut, weights_file, without_weights
from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess
from diffalign.reward_models.qwen_text import float_linear, pad
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

SYSTEM = (  # of the conversations CLIP-FlanT5 was tuned on, LLaVA's
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
QUESTION = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
ANSWER = "Yes"
PROMPT_TOKENS = 2048
HEAD_WIDTH = 64  # of CLIP's attention, whatever the size
TOWER = "vision_tower.vision_tower.vision_model."
SHARED = ("shared.", "embed_tokens.", "encoder.embed_tokens.", "decoder.embed_tokens.")  # names of one and the same embedding
UNUSED = (
    "vision.embeddings.position_ids",
    "t5.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",  # in older T5 files; never used
)


class VQAScore(RewardModel):
    """Question and image meet in the encoder, so only token ids can be prepared."""

    full_precision = ()

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        path = weights_file(sources["model"], "model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model.bin")
        tensors = rename(read_weights(path, None))
        self.t5, self.vision, self.projector = build(sources["model"].file("config.json"), tensors, path)
        self.tokenizer = read_plain_tokenizer(sources["tokenizer"])
        self.special = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        before, answer = self.tokenizer.encode(SYSTEM.strip()).ids, self.tokenizer.encode(ANSWER).ids
        self.register_buffer("before", torch.tensor(before), persistent=False)
        self.register_buffer("answer", torch.tensor(answer), persistent=False)
        self.pixels = Preprocess(self.vision.config.image_size, OPENAI_MEAN, OPENAI_STD, "square+mean")
        self.train(False)

    def encode_text(self, prompts: list[str]) -> list[Int[Tensor, " l"]]:
        questions = [QUESTION.replace("{}", self._cut(prompt)).strip() for prompt in prompts]
        return [torch.tensor(self.tokenizer.encode(question).ids) for question in questions]

    def _cut(self, prompt: str) -> str:
        for token in self.special:  # T5's vocabulary holds its own special tokens, so that "</s>" in a prompt would be one
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
        offsets = self.tokenizer.encode(prompt, add_special_tokens=False).offsets
        end = offsets[PROMPT_TOKENS - 1][1] if len(offsets) > PROMPT_TOKENS else len(prompt)
        report_cut(self.name, PROMPT_TOKENS, prompt[end:])
        return prompt[:end]

    def collate(self, texts: list[Tensor]) -> Int[Tensor, "b l"]:
        return pad(texts)

    def score(self, images: Images, texts: Int[Tensor, "b l"] | None) -> Scores:
        b = len(images)
        states = self.vision(self.pixels(images).to(self.vision.dtype), output_hidden_states=True).hidden_states[-2]
        embed = self.t5.shared
        parts = [embed(self.before).expand(b, -1, -1), self.projector(states[:, 1:]), embed(texts.clamp(min=0))]
        inputs = torch.cat(parts, dim=1)
        seen = nn.functional.pad(texts >= 0, (inputs.shape[1] - texts.shape[1], 0), value=True)
        mask = attention_mask(seen, inputs.dtype)
        encoded = self.t5.encoder(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        answer = self.answer.expand(b, -1)
        start = answer.new_full((b, 1), self.t5.config.decoder_start_token_id)
        decoded = self.t5.decoder(
            input_ids=torch.cat([start, answer[:, :-1]], dim=1),
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        tokens = self.t5.lm_head.weight[: self.tokenizer.get_vocab_size()]  # the original cuts rows beyond the tokenizer's, too
        logits = float_linear(decoded.flatten(0, 1), tokens).unflatten(0, answer.shape)
        return logits.log_softmax(dim=-1).gather(2, answer.unsqueeze(2)).mean(dim=(1, 2)).exp()


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors as t5.*, vision.* and projector.*; of the names of its one embedding, the first that is there."""
    embedding = next((tensors[f"{name}weight"] for name in SHARED if f"{name}weight" in tensors), None)
    renamed = {f"t5.{name}weight": embedding for name in SHARED if name != "embed_tokens."} if embedding is not None else {}
    for name, tensor in tensors.items():
        if name.startswith(TOWER):
            renamed["vision." + name.removeprefix(TOWER)] = tensor
        elif name.startswith("mm_projector."):
            renamed["projector." + name.removeprefix("mm_projector.")] = tensor
        elif not name.startswith(SHARED):
            renamed[f"t5.{name}"] = tensor
    return renamed


def build(config_path: Path, tensors: dict[str, Tensor], path: Path) -> tuple[T5ForConditionalGeneration, CLIPVisionModel, nn.Sequential]:
    """T5, the CLIP tower and the projector, with their weights as stored. Raises ValueError naming what does not fit."""
    config = read_json(config_path, ("d_model", "num_layers"))
    try:
        vision = _vision_config(tensors)
        rows, wide = len(tensors["t5.shared.weight"]), len(tensors["projector.0.weight"])
    except KeyError as error:
        raise ValueError(f"{path} is no CLIP-FlanT5 checkpoint; missing: {error.args[0]}") from error
    projector = nn.Sequential(nn.Linear(vision.hidden_size, wide), nn.GELU(), nn.Linear(wide, config["d_model"]))
    try:
        parts = without_weights(lambda: _parts(config | {"vocab_size": rows}, vision))
    except Exception as error:  # transformers validates configurations with exceptions of its own
        raise ValueError(f"{config_path} does not describe a T5 ({error})") from error
    parts["projector"] = projector
    load_strict(parts, tensors, path, unused=UNUSED)
    t5 = parts["t5"]
    t5.set_input_embeddings(t5.shared)  # one parameter again, which a cast would otherwise copy three times
    return t5, parts["vision"], projector


def _parts(config: dict[str, Any], vision: CLIPVisionConfig) -> nn.ModuleDict:
    known = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "torch_dtype", "dtype")}
    t5 = T5ForConditionalGeneration(T5Config(**(known | {"tie_word_embeddings": False})))
    return nn.ModuleDict({"t5": t5, "vision": CLIPVisionModel(vision)})


def _vision_config(tensors: Mapping[str, Tensor]) -> CLIPVisionConfig:
    """The tower these tensors belong to; the checkpoint's own configuration only names it."""
    width, _, patch, _ = tensors["vision.embeddings.patch_embedding.weight"].shape
    layers = {int(match[1]) for name in tensors if (match := re.match(r"vision\.encoder\.layers\.(\d+)\.", name))}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round((len(tensors["vision.embeddings.position_embedding.weight"]) - 1) ** 0.5),
        patch_size=patch,
        hidden_act="quick_gelu",
    )
