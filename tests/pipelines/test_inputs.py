"""Prompts, seeds and plugins: what is refused, in which words, and that text the model cannot see is reported."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from diffalign.pipelines import inputs
from tests.pipelines.methods import Ascend, Redraw
from tests.tiny import MAX_TOKENS, tiny_tokenizer

ONE = {"num_inference_steps": 1, "guidance_scale": 0.0}


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "prompt is an empty list"),
        (None, TypeError, "prompt must be a string or a list of strings, got NoneType"),
        (7, TypeError, "prompt must be a string or a list of strings, got int"),
        (["a circle", None], TypeError, r"prompt\[1\] must be a string, got NoneType"),
        ([b"a circle"], TypeError, r"prompt\[0\] must be a string, got bytes"),
    ],
)
@pytest.mark.parametrize("plugins", [(), (Ascend(),)], ids=["plain", "search"])
def test_bad_prompts(pipe, prompt, error, message, plugins):
    with pytest.raises(error, match=message):
        pipe(prompt, plugins=plugins)


def test_odd_prompts_are_prompts(pipe):
    prompts = ["", "a/b\\c", "a 🔴 circle\n", "круг"]
    out = pipe(prompts, seed=0, output_type="pt", **ONE)
    assert out.images.shape == (4, 3, 32, 32)
    assert torch.isfinite(out.images).all()
    assert out.truncated == [None] * 4
    assert torch.equal(pipe(tuple(prompts), seed=0, output_type="pt", **ONE).images, out.images)


@pytest.mark.parametrize("plugins", [(), (Redraw(),)], ids=["plain", "search"])
def test_text_that_does_not_fit_is_reported_once_as_written(pipe, caplog, plugins):
    kept = "A Red Circle left of a Blue Sq"
    long = "a red circle left of a blue square on THE Right " + "x" * 10_000
    with caplog.at_level(logging.WARNING):
        out = pipe([kept, long], seed=0, plugins=plugins, num_images_per_prompt=2, **ONE)
    assert out.truncated[:2] == [None, None]
    assert out.truncated[2] == out.truncated[3]
    assert long.endswith(out.truncated[2])
    seen = long[: len(long) - len(out.truncated[2])]
    tokenizer = pipe.tokenizer
    # but for the last letter, which knows whether its word ends there
    assert tokenizer(seen)["input_ids"][:-2] == tokenizer(long, truncation=True, max_length=MAX_TOKENS)["input_ids"][:-2]
    assert len(tokenizer(seen)["input_ids"]) == MAX_TOKENS
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("1 of 2 prompts are longer than the model's 32 tokens: 'a red circle")
    assert "E Right" in messages[0]
    assert len(messages[0]) < 1000


def test_negative_prompts_that_do_not_fit_are_reported_too(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe("a circle", negative_prompt="y" * 50, seed=0, num_inference_steps=1)
    assert [record.getMessage()[:24] for record in caplog.records] == ["1 of 1 negative prompts "]


def test_the_limit_itself_fits():
    tokenizer = tiny_tokenizer()
    assert inputs.text_cut_off(tokenizer, ["x" * 30, "x" * 31, ""]) == [None, "x", None]


def test_seeds(pipe):
    assert inputs.resolve_seeds(5, 3) == [5, 6, 7]
    assert inputs.resolve_seeds([9, 2], 2) == [9, 2]
    assert inputs.resolve_seeds(np.int64(4), 1) == [4]
    for bad, error, message in [
        (-1, ValueError, "seed must lie in 0"),
        (2**63 - 1, ValueError, "seed must lie in 0"),
        ([1, 2, 3], ValueError, "seed has 3 entries for 2 images"),
        (True, TypeError, "seed must be an integer"),
        (1.5, TypeError, "seed must be an integer, a list of integers or None, got float: 1.5"),
        ([1, "2"], TypeError, r"seed\[1\] must be an integer"),
    ]:
        with pytest.raises(error, match=message):
            pipe(["a", "b"], seed=bad)
    with pytest.raises(ValueError, match="pass seed= instead of generator=: both were given"):
        pipe("a", seed=1, generator=torch.Generator())


def test_fresh_seeds_are_reported_and_make_the_same_image_again(pipe):
    torch.manual_seed(0)
    first = pipe(["a", "b"], output_type="pt", **ONE)
    second = pipe(["a", "b"], output_type="pt", **ONE)
    assert len(set(first.seeds + second.seeds)) == 4
    assert torch.equal(pipe(["a", "b"], seed=first.seeds, output_type="pt", **ONE).images, first.images)
    torch.manual_seed(0)
    assert pipe(["a", "b"], output_type="pt", **ONE).seeds == first.seeds


def test_plugins(pipe):
    with pytest.raises(TypeError, match=r"plugins must be a list of methods, got Ascend; write plugins=\[method\]"):
        pipe("a", plugins=Ascend())
    with pytest.raises(TypeError, match="plugins holds the class Ascend; make an instance"):
        pipe("a", plugins=[Ascend])
    with pytest.raises(TypeError, match=r"plugins holds 'reno', which has neither search\(problem\) nor attach\(pipeline\)"):
        pipe("a", plugins=["reno"])
    with pytest.raises(ValueError, match=r"2 methods that search over noise \(ascend, redraw\); one call takes at most one"):
        pipe("a", plugins=[Ascend(), Redraw()])


def test_misspelt_arguments_are_not_swallowed(pipe):
    with pytest.raises(TypeError, match=r"StableDiffusionPipeline takes no argument 'guidance_scal'; did you mean 'guidance_scale'"):
        pipe("a", guidance_scal=3.0)
    with pytest.raises(TypeError, match="did you mean 'seed'"):
        pipe("a", seeds=3)
    with pytest.raises(TypeError, match=r"takes no argument 'zzzzzz'$"):
        pipe("a", zzzzzz=3)
