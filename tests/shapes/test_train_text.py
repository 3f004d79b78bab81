"""The tokenizer and what the text encoder is taught: one token a word, nothing unknown, answers that are what the caption says."""

import numpy as np
import pytest
from transformers import CLIPTokenizer

from diffalign.shapes.captions import draw_scene, short_caption
from diffalign.shapes.train import text


@pytest.fixture(scope="module")
def tokenizer():
    return text.build_tokenizer()


def test_every_word_of_the_world_is_one_token(tokenizer):
    assert [word for word in text.world_words() if len(tokenizer.tokenize(word)) != 1] == []


def test_captions_hold_only_words_of_the_world():
    rng, words = np.random.default_rng(0), set(text.world_words())
    for _ in range(300):
        assert set(short_caption(rng, draw_scene(rng)).split()) <= words


@pytest.mark.parametrize("prompt", ["", "an astronaut", "a/b\\c", "ein Käfer 🪲", "x" * 10_000])
def test_other_text_is_never_unknown_and_always_fits(tokenizer, prompt):
    ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
    assert len(ids) == text.MAX_LENGTH
    assert ids[0] == tokenizer.bos_token_id
    inner = tokenizer(prompt, truncation=True).input_ids[1:-1]
    assert tokenizer.unk_token_id not in inner


def test_saved_tokenizer_loads_as_a_clip_tokenizer_with_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    caption = "a photo of two red crosses"
    assert again(caption).input_ids == tokenizer(caption).input_ids
    assert again.model_max_length == text.MAX_LENGTH


def test_describe_says_of_each_noun_what_the_caption_says():
    said = text.describe("a photo of a red circle left of a square")
    circle, square = said[5], said[9]
    assert (circle["shape"], circle["color"], circle["side"], circle["other_shape"]) == ("circle", "red", "left", "square")
    assert (square["color"], square["side"], square["other_color"]) == ("", "right", "red")
    assert text.describe("three blue hearts")[2] | {"other_shape": ""} == dict.fromkeys(text.QUESTIONS, "") | {
        "shape": "heart",
        "color": "blue",
        "number": "three",
    }
    large = text.describe("a large pink star at the top left and a small ring at the middle center")
    assert (large[3]["size"], large[3]["row"], large[3]["column"]) == ("large", "top", "left")
