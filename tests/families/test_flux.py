"""FLUX.1 beyond the contract: packing, the shift by size, what the network is told, and the two kinds of guidance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import diffalign
from diffalign.backbone import Size
from diffalign.pipelines.presets import PRESETS
from diffalign.sampling import rollout
from tests.families.test_contract import PROMPTS, SEEDS, Brightness, generators
from tests.families.tiny import ROWS

SIZE = Size(48, 80)


@pytest.fixture(scope="module")
def dev():
    return ROWS["flux-dev"].pipeline(ROWS["flux-dev"].aligned_class())


@pytest.fixture(scope="module")
def schnell():
    return ROWS["flux-schnell"].pipeline(ROWS["flux-schnell"].aligned_class())


# ---- packing -------------------------------------------------------------------------------------------------------------------


def test_noise_is_drawn_unpacked_as_the_stock_call_draws_it(dev):
    ours = dev.draw_noise(generators(), SIZE)
    theirs, _ = FluxPipeline.prepare_latents(dev, 2, 16, SIZE.height, SIZE.width, torch.float32, torch.device("cpu"), generators())
    assert ours.shape == (2, 3 * 5, 64) == (2, *dev.noise_shape(SIZE))
    assert torch.equal(ours, theirs)
    unpacked = torch.stack([torch.randn(16, 6, 10, generator=generator) for generator in generators()])
    assert torch.equal(ours[:, 5 + 2, 4 * 7 + 2 * 1 + 0], unpacked[:, 7, 2 * 1 + 1, 2 * 2 + 0])  # row 1, column 2; channel 7, lower left


def test_decode_unpacks_by_the_size(dev):
    tokens = dev.draw_noise(generators(), SIZE)
    unpacked = torch.stack([torch.randn(16, 6, 10, generator=generator) for generator in generators()])
    with torch.no_grad():
        expected = dev.vae.decode(unpacked / 0.3611 + 0.1159).sample / 2 + 0.5
        torch.testing.assert_close(dev.decode(tokens, SIZE), expected.clamp(0, 1), rtol=0, atol=1e-5)
        assert dev.decode(tokens, Size(80, 48)).shape == (2, 3, 80, 48)


def test_images_are_encoded_as_by_the_stock_image_to_image_pipeline(dev, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    stock = FluxImg2ImgPipeline(**dev.components)
    images = torch.rand(2, 3, 48, 80, generator=generators()[0])
    with torch.no_grad():
        latents = stock._encode_vae_image(images * 2 - 1, generators()[0])
        assert torch.equal(dev.encode_images(images), dev._pack_latents(latents, 2, 16, 6, 10))


# ---- the loop ------------------------------------------------------------------------------------------------------------------


def test_levels_are_equidistant_and_shifted_by_the_number_of_tokens(dev, schnell):
    assert schnell.schedule(4, size=SIZE).noise == (1, 0.75, 0.5, 0.25, 0)
    for size, mu in ((Size(256, 256), 0.5), (Size(1024, 1024), 1.15), (SIZE, 0.5 + (15 - 256) * 0.65 / 3840)):
        levels = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (1, 2 / 3, 1 / 3)]
        schedule = dev.schedule(3, size=size)
        np.testing.assert_allclose(schedule.noise, [*levels, 0], rtol=1e-6)
        np.testing.assert_allclose(schedule.timesteps, [1000 * s for s in levels], rtol=1e-6)
        assert schedule.prediction == "flow"
    assert dev.schedule(size=Size(256, 256), sigmas=[1.0, 0.5]).noise[1] == pytest.approx(math.exp(0.5) / (math.exp(0.5) + 1))


@pytest.mark.parametrize("name", ["flux-schnell", "flux-dev"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_network_is_told_what_the_stock_call_tells_it(name, dtype):
    """Time in thousandths, rounded as there; guidance; places of words and patches. Not square, so rows and columns differ."""
    row = ROWS[name]
    pipe = row.pipeline(row.aligned_class(), dtype)
    told = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: told.append((args, kwargs)), with_kwargs=True)
    pipe(PROMPTS, seed=SEEDS, **{**row.whole_call(), "height": 48, "width": 80, "num_inference_steps": 3, "output_type": "latent"})
    stock, told[:] = list(told), []
    conditioning = pipe.encode(PROMPTS, unconditional=False, size=SIZE, embedded_scale=row.call["guidance_scale"], **row.texts)
    for t in pipe.schedule(3, size=SIZE).timesteps:
        pipe.denoise(pipe.draw_noise(generators(), SIZE), t, conditioning)
    for (_, theirs), (_, ours) in zip(stock, told, strict=True):
        assert ours.keys() - theirs.keys() == set()
        for argument in ours.keys() - {"hidden_states", "return_dict"}:
            a, b = ours[argument], theirs[argument]
            assert (a is b is None) or (a.dtype == b.dtype and torch.equal(a, b)), argument
    assert (told[0][1]["guidance"] is None) == (name == "flux-schnell")


# ---- guidance ------------------------------------------------------------------------------------------------------------------


def test_the_embedded_scale_is_what_the_stock_call_would_take(dev, schnell):
    assert schnell.embedded_scale_of({"guidance_scale": 3.0}) is None
    assert dev.embedded_scale_of({"guidance_scale": 0}) == 0.0
    assert dev.embedded_scale_of({}) == 3.5
    assert dev.encode(PROMPTS, unconditional=False).embedded_scale == 3.5
    preset = ROWS["flux-dev"].pipeline(ROWS["flux-dev"].aligned_class())
    preset.defaults = {**PRESETS["flux-dev"].defaults(), "guidance_scale": 2.0}
    assert preset.encode(PROMPTS, unconditional=False).embedded_scale == 2.0
    assert preset.embedded_scale_of({}) == 2.0


def test_what_the_conditioning_says_of_the_embedded_scale_goes_for_the_stock_loop_and_ours(dev):
    call = {"height": 48, "width": 80, "num_inference_steps": 2}
    noise = dev.draw_noise(generators(), SIZE)
    made = []
    for scale in (3.5, 7.0):
        conditioning = dev.encode(PROMPTS, unconditional=False, size=SIZE, embedded_scale=scale)
        with torch.no_grad():
            made.append(dev.noise_to_images(noise, conditioning, call, output_type="latent"))
            sampler = dev.stock_sampler(dev.timed_scheduler(2, size=SIZE))
            ours = rollout(dev, noise, conditioning, dev.schedule(2, size=SIZE), sampler).latents
        assert torch.equal(ours, made[-1])
        assert torch.equal(dev.noise_to_images(noise, conditioning, {**call, "guidance_scale": 3.5}, output_type="latent"), made[0])
    assert not torch.allclose(*made, atol=1e-3)


def test_without_a_negative_prompt_true_guidance_is_off_and_a_search_says_so(dev):
    call = {**ROWS["flux-dev-true-cfg"].call, "output_type": "np"}
    off, one = (dev(PROMPTS, seed=SEEDS, **{**call, "true_cfg_scale": scale}).images for scale in (4.0, 1.0))
    assert np.array_equal(off, one)
    on = dev(PROMPTS, seed=SEEDS, negative_prompt=["", ""], **call).images
    assert not np.allclose(on, off, atol=1e-3)
    search = [diffalign.BestOfN(Brightness(), budget=1)]
    with pytest.raises(ValueError, match=r"true_cfg_scale=4.0 needs a negative_prompt"):
        dev(PROMPTS, seed=SEEDS, plugins=search, **call)
    found = dev(PROMPTS, seed=SEEDS, plugins=search, negative_prompt="", **call).images
    np.testing.assert_allclose(found, on, rtol=0, atol=1e-5)
    found = dev(PROMPTS, seed=SEEDS, plugins=search, **{**call, "true_cfg_scale": 1.0}).images
    np.testing.assert_allclose(found, one, rtol=0, atol=1e-5)


def test_the_second_branch_is_encoded_only_when_asked(dev):
    assert set(dev.encode(PROMPTS, unconditional=False).tensors) == {"prompt_embeds", "pooled_prompt_embeds"}
    asked = dev.encode(PROMPTS, "green")
    assert set(asked.conditional()) == set(asked.unconditional()) == {"prompt_embeds", "pooled_prompt_embeds"}
    assert asked.tensors["negative_prompt_embeds"].shape == asked.tensors["prompt_embeds"].shape == (2, 512, 24)
