"""CLIP's tokens. Its vocabulary comes with open_clip; two ways to clean a prompt before it is split are in use.

open_clip repairs mojibake, resolves HTML entities, collapses white space and lowers (models trained or published with it: CLIPScore, HPS).
transformers composes accents, collapses white space and lowers (PickScore, MPS).
In both, special tokens spelled out in a prompt are read as text, so that no prompt can end itself early.
"""

from __future__ import annotations

import functools

import open_clip.tokenizer
from jaxtyping import Int
from torch import Tensor
from transformers import CLIPTokenizer

from diffalign.reward_models.checkpoints import tokenize

LENGTH, VOCABULARY = 77, 49408


def open_clip_tokens(prompts: list[str], reward: str) -> Int[Tensor, "n 77"]:
    """Ids of prompts cleaned as open_clip does it; what does not fit is named in a warning."""
    clean = open_clip.tokenizer.get_clean_fn("lower")
    return tokenize(clip_tokenizer(), [clean(prompt) for prompt in prompts], reward)


def transformers_tokens(prompts: list[str], reward: str) -> Int[Tensor, "n 77"]:
    """Ids as transformers' CLIPTokenizer gives them; what does not fit is named in a warning."""
    return tokenize(clip_tokenizer(), prompts, reward)


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """The published CLIPTokenizer, from the vocabulary in open_clip's package: no download, and much faster than open_clip's own."""
    bpe = open_clip.tokenizer.SimpleTokenizer()
    vocabulary = dict(bpe.encoder)
    for theirs, ours in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        vocabulary[ours] = vocabulary.pop(theirs)
    return CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks), model_max_length=LENGTH)
