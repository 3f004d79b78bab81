"""Tokenizer and text encoder of the shapes models: an ordinary CLIPTokenizer and CLIPTextModel, small.

The encoder is first taught, on text alone, to say at each noun what the caption says of that thing: its shape, colour, number, size,
place, and on which side of the other thing it stands. What real models get from pretraining on captions, it gets from this.
It then learns on with the U-Net.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.shapes.captions import draw_scene, long_caption, short_caption
from diffalign.shapes.prompts import CARRIERS, NUMBER_WORDS, plural
from diffalign.shapes.scenes import COLORS, SHAPES
from diffalign.shapes.train import loop

MAX_LENGTH = 32
WIDTH = 128
CONFIG = loop.LoopConfig(steps=900, lr=1e-3, seed=12, ema_decay=0.99, warmup=50)
BATCH = 128
CAPTIONS = 30_000

_OTHER_WORDS = "a an and of the at left right above below top middle bottom center large small one photo picture drawing image"


def world_words() -> list[str]:
    """Every word a caption of the world can hold, in a fixed order."""
    words = list(SHAPES) + [plural(s) for s in SHAPES] + list(COLORS) + list(NUMBER_WORDS.values())
    words += _OTHER_WORDS.split() + " ".join(CARRIERS).split()
    return list(dict.fromkeys(words))


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the world is one token and any other text falls back to bytes, so nothing is unknown."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(world_words())] * 3, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in merges]
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=MAX_LENGTH)


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


# What is asked at each noun. The last answer of every question is "not said".
QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": (*COLORS, ""),
    "number": (*NUMBER_WORDS.values(), ""),
    "size": ("large", "small", ""),
    "row": ("top", "middle", "bottom", ""),
    "column": ("left", "center", "right", ""),
    "side": ("left", "right", "above", "below", ""),
    "other_shape": (*SHAPES, ""),
    "other_color": (*COLORS, ""),
}
_SINGULAR = {plural(s): s for s in SHAPES} | {s: s for s in SHAPES}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def describe(caption: str) -> dict[int, dict[str, str]]:
    """What a caption of the world says of each thing: word index of the noun -> answers to QUESTIONS ("" for not said)."""
    words = caption.split()
    nouns = [i for i, word in enumerate(words) if word in _SINGULAR]
    said: dict[int, dict[str, str]] = {}
    for k, i in enumerate(nouns):
        before = words[nouns[k - 1] + 1 if k else 0 : i]
        after = words[i + 1 : nouns[k + 1] if k + 1 < len(nouns) else len(words)]
        answer = dict.fromkeys(QUESTIONS, "")
        answer["shape"] = _SINGULAR[words[i]]
        answer["color"] = next((w for w in before if w in COLORS), "")
        answer["number"] = next((w for w in before if w in NUMBER_WORDS.values()), "")
        answer["size"] = next((w for w in before if w in ("large", "small")), "")
        if after[:2] == ["at", "the"]:
            answer["row"], answer["column"] = after[2], after[3]
        said[i] = answer
    if len(nouns) == 2:
        first, second = (said[i] for i in nouns)
        between = words[nouns[0] + 1 : nouns[1]]
        relation = between[0] if between and between[0] in _OPPOSITE else ""
        if relation:
            first["side"], second["side"] = relation, _OPPOSITE[relation]
        for mine, other in ((first, second), (second, first)):
            mine["other_shape"], mine["other_color"] = other["shape"], other["color"]
    return said


def train(
    run: Path, tokenizer: CLIPTokenizer, config: loop.LoopConfig = CONFIG, captions: int = CAPTIONS, device: str = "cpu"
) -> CLIPTextModel:
    """Teach the encoder QUESTIONS: each noun's state answers for its thing, the end token's for the first and the second thing."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(tokenizer).to(device)
    asked = ("noun", "end_first", "end_second")
    heads = nn.ModuleDict({f"{where}_{name}": nn.Linear(WIDTH, len(QUESTIONS[name])) for where in asked for name in QUESTIONS}).to(device)
    trainee = loop.Trainee({"encoder": encoder, "heads": heads}, config, run / "text.safetensors")
    rng = np.random.default_rng([config.seed, 2])
    texts = []
    for _ in range(captions):
        scene = draw_scene(rng)
        texts.append(long_caption(rng, scene) if rng.random() < 0.2 else short_caption(rng, scene))
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    nouns = _nouns(texts)

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(ids), (BATCH,), generator=generator)
        tokens = ids[index].to(device)
        states = encoder(tokens).last_hidden_state
        end = (tokens == tokenizer.eos_token_id).int().argmax(dim=1)
        rows = [(b, k, place, answers) for b, i in enumerate(index.tolist()) for k, (place, answers) in enumerate(nouns[i]) if k < 2]
        batch = torch.tensor([b for b, *_ in rows], device=device)
        order = torch.tensor([k for _, k, *_ in rows], device=device)
        position = torch.tensor([place for *_, place, _ in rows], device=device)
        answers = torch.tensor([answer for *_, answer in rows], device=device)
        at_noun, at_end = states[batch, position], states[batch, end[batch]]
        loss = states.new_zeros(())
        for q, name in enumerate(QUESTIONS):
            loss = loss + F.cross_entropy(heads[f"noun_{name}"](at_noun), answers[:, q])
            for k, where in enumerate(asked[1:]):
                loss = loss + F.cross_entropy(heads[f"{where}_{name}"](at_end[order == k]), answers[order == k, q])
        return loss, {"loss": loss.item()}

    loop.train(trainee, loss_of, "text encoder")
    trainee.use_average()
    return encoder.eval()


def _nouns(texts: list[str]) -> list[list[tuple[int, list[int]]]]:
    """Per caption, per noun: its token index (every word is one token, after the start token) and the index of each right answer."""
    return [
        [(word + 1, [options.index(said[name]) for name, options in QUESTIONS.items()]) for word, said in describe(text).items()]
        for text in texts
    ]
