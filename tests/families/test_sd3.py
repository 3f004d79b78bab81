"""What only Stable Diffusion 3 has: a missing T5, shifts by size, layers skipped under guidance, scaled and shifted latents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import diffalign
from diffalign.backbone import Size
from diffalign.sampling import rollout
from tests.families.test_contract import PROMPTS, SEEDS, Brightness, generators, values
from tests.families.tiny import ROWS

CALL = {"num_inference_steps": 3, "guidance_scale": 3.0}
ATOL = 1e-5  # in images: the embeddings of a search are copies, at other addresses, and sums follow the alignment


@pytest.fixture(scope="module")
def pipes():
    """Row -> its aligned pipeline; tests leave them as they find them."""
    return {name: ROWS[name].pipeline(ROWS[name].aligned_class()) for name in ("sd3.5-medium", "sd3-without-t5")}


@pytest.mark.parametrize("length", [1, 7])
def test_without_t5_the_places_of_its_tokens_are_as_many_as_asked_for(pipes, length):
    pipe = pipes["sd3-without-t5"]
    texts = pipe.encode(PROMPTS, max_sequence_length=length).tensors
    assert texts["prompt_embeds"].shape[1] == pipe.tokenizer.model_max_length + length
    assert not texts["prompt_embeds"][:, -length:].any()
    assert texts["pooled_prompt_embeds"].shape[1] == pipe.transformer.config.pooled_projection_dim
    call = {**CALL, "max_sequence_length": length, "output_type": "np"}
    plain = pipe(PROMPTS, seed=SEEDS, **call).images
    found = pipe(PROMPTS, seed=SEEDS, plugins=[diffalign.BestOfN(Brightness(), budget=1)], **call).initial_images
    np.testing.assert_allclose(values(found), values(plain), rtol=0, atol=ATOL)
    assert not np.allclose(values(plain), values(pipe(PROMPTS, seed=SEEDS, **CALL, output_type="np").images), atol=1e-4)


def test_what_t5_alone_reads_is_not_called_cut(pipes):
    long = "red " * 40  # 160 letters: past both CLIP encoders' 32 tokens, within T5's 256
    assert pipes["sd3.5-medium"].cut_text([long]) == [None]
    assert pipes["sd3-without-t5"].cut_text([long])[0]


def test_the_unconditional_branch_is_encoded_only_when_asked_for(pipes):
    assert set(pipes["sd3.5-medium"].encode(PROMPTS, unconditional=False).tensors) == {"prompt_embeds", "pooled_prompt_embeds"}


def shifted(noise: float, shift: float = 3.0) -> float:
    return shift * noise / (1 + (shift - 1) * noise)


def test_the_published_shift_moves_the_noise_levels(pipes):
    """s' = 3 s / (1 + 2 s), of steps as long as each other from 1 to the least level of training, 0.001, which is shifted already."""
    schedule = pipes["sd3.5-medium"].schedule(3)
    least = shifted(0.001)
    assert schedule.noise == pytest.approx([1, shifted((1 + least) / 2), shifted(least), 0])
    assert schedule.signal == pytest.approx([1 - s for s in schedule.noise])
    assert schedule.timesteps == pytest.approx([1000 * s for s in schedule.noise[:-1]])
    assert schedule.start == 1


def test_a_shift_by_size_is_the_stock_one():
    """mu is a straight line through (256 patches, 0.5) and (4096, 1.15); then s' = e^mu / (e^mu + 1 / s - 1)."""
    row = ROWS["sd3.5-medium"]
    pipe, stock = row.pipeline(row.aligned_class()), row.pipeline(row.aligned_class().stock_class)
    for each in (pipe, stock):
        each.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    size = Size(48, 80)
    mu = 0.5 + (3 * 5 - 256) * (1.15 - 0.5) / (4096 - 256)
    assert pipe.schedule(3, size=size).noise[1] == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / 0.5005 - 1))
    assert pipe.schedule(3, size=size, mu=0.0).noise[1] == pytest.approx(0.5005)
    expected = stock(PROMPTS, generator=generators(), output_type="latent", height=48, width=80, **CALL).images
    own = generators()
    noise = pipe.draw_noise(own, size)
    scheduler = pipe.timed_scheduler(3, size=size)
    with torch.no_grad():
        out = rollout(pipe, noise, pipe.encode(PROMPTS), pipe.schedule(3, size=size), pipe.stock_sampler(scheduler), guidance_scale=3.0)
    assert torch.equal(out.latents, expected)


def test_layers_skipped_under_guidance_reach_a_search(pipes):
    pipe = pipes["sd3.5-medium"]
    call = {**CALL, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0, "output_type": "np"}
    plain = values(pipe(PROMPTS, seed=SEEDS, **call).images)
    found = pipe(PROMPTS, seed=SEEDS, plugins=[diffalign.BestOfN(Brightness(), budget=1)], **call)
    np.testing.assert_allclose(values(found.initial_images), plain, rtol=0, atol=ATOL)
    assert not np.allclose(plain, values(pipe(PROMPTS, seed=SEEDS, output_type="np", **CALL).images), atol=1e-4)


def test_one_side_alone_is_taken_as_the_stock_call_takes_it(pipes):
    pipe = pipes["sd3.5-medium"]
    assert pipe.size_of({"height": 48}) == Size(48, 64)
    assert pipe(PROMPTS[0], seed=3, height=48, num_inference_steps=1, output_type="latent").images.shape == (1, 16, 6, 8)


def test_a_side_must_hold_whole_patches(pipes):
    assert pipes["sd3.5-medium"].multiple == 16
    assert pipes["sd3-without-t5"].multiple == 8
    with pytest.raises(ValueError, match="divisible by 16"):
        pipes["sd3.5-medium"].size_of({"height": 40, "width": 64})


def test_latents_are_scaled_and_shifted_as_in_stock_image_to_image(pipes):
    pipe = pipes["sd3.5-medium"]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = pipe.vae.encode(pipe.image_processor.preprocess(images)).latent_dist.mode()
        torch.testing.assert_close(pipe.encode_images(images), (mean - 0.0609) * 1.5305)
        torch.testing.assert_close(pipe.decode(pipe.encode_images(images)), (pipe.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1))
