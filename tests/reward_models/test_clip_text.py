"""Tokens of the CLIP family against open_clip's tokenizer and against the two ways of cleaning."""

from __future__ import annotations

import logging

import open_clip
import pytest
import torch

from diffalign.reward_models.clip_text import clip_tokenizer, open_clip_tokens, transformers_tokens

PLAIN = [
    "a photo of a cat",
    "A  Photo\tOF\n a CAT!!",
    "it's 2024, they'll say we've 3.14% of it",
    "",
    "café naïve Zürich Ångström",
    "日本語の猫 和 고양이",
    "🙂 a dog 🐶🐶",
    "x" * 500,
    "a very long prompt about nothing, " * 40,
    "under_score-and/slash \\ back",
]
UNCLEAN = [
    "salt &amp; pepper",
    "&lt;b&gt;bold&lt;/b&gt;",
    "&amp;lt;twice&amp;gt;",
    "“curly” ‘quotes’ – dash…",
    "ﬁre and ﬂame",
    "schÃ¶n",
    "full-width ＡＢＣ",
    "non breaking",
]
SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<end_of_text>", "<START_of_text>", "&lt;end_of_text&gt;")


def up_to_the_end(ids: torch.Tensor) -> list[list[int]]:
    """Rows until their end token: padding is zeros in open_clip and end tokens in transformers, and read by neither."""
    return [row[: row.index(49407) + 1] for row in ids.tolist()]


@pytest.mark.parametrize("prompts", [PLAIN, UNCLEAN])
def test_tokens_of_open_clip(prompts):
    assert up_to_the_end(open_clip_tokens(prompts, "r")) == up_to_the_end(open_clip.tokenize(prompts))


def test_tokens_of_transformers_differ_where_cleaning_does():
    ours = up_to_the_end(transformers_tokens(PLAIN + UNCLEAN, "r"))
    theirs = up_to_the_end(open_clip.tokenize(PLAIN + UNCLEAN))
    assert ours[: len(PLAIN)] == theirs[: len(PLAIN)]
    assert [a != b for a, b in zip(ours[len(PLAIN) :], theirs[len(PLAIN) :], strict=True)].count(True) >= 6


def test_the_vocabulary_is_clips():
    tokenizer = clip_tokenizer()
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49408, 49406, 49407, 49407)
    ids = transformers_tokens(["a cat"], "r")
    assert ids.shape == (1, 77)
    assert ids[0, :5].tolist() == [49406, 320, 2368, 49407, 49407]


@pytest.mark.parametrize("tokens", [open_clip_tokens, transformers_tokens])
@pytest.mark.parametrize("special", SPECIAL)
def test_special_tokens_in_a_prompt_are_text(tokens, special):
    (row,) = up_to_the_end(tokens([f"a red{special} circle"], "r"))
    assert len(row) > 7
    assert row.count(49406) == 1
    assert clip_tokenizer().decode(row[-2:-1]).strip() == "circle"


@pytest.mark.parametrize("tokens", [open_clip_tokens, transformers_tokens])
def test_what_is_cut_off_is_said(tokens, caplog):
    with caplog.at_level(logging.WARNING):
        ids = tokens(["fine", "word " * 80 + "the end"], "some-reward")
    assert ids[1, -1] == 49407
    assert caplog.messages == [
        "reward 'some-reward' reads 77 tokens; it ignores the last 32 characters: 'word word word word word the end'"
    ]
