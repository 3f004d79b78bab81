"""What only SDXL has: the size as a condition, zeros for no negative prompt, an autoencoder that needs float32, steps noised anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLImg2ImgPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import diffalign
from diffalign.backbone import Size
from diffalign.diffusion import Renoise
from diffalign.pipelines.presets import PRESETS
from diffalign.sampling import rollout
from tests.families import tiny_sdxl
from tests.families.test_contract import PROMPTS, SEEDS, Brightness, generators, values
from tests.families.tiny import ROWS, Row

CALL = {"num_inference_steps": 2, "guidance_scale": 4.0}
STATED = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 0.8, 1.1, 2.0]}
ATOL = 1e-5  # in images: the embeddings of a search are copies, at other addresses, and sums follow the alignment


def both(row: Row, dtype: torch.dtype = torch.float32):
    """(ours, stock) with the same weights."""
    return row.pipeline(row.aligned_class(), dtype), row.pipeline(row.aligned_class().stock_class, dtype)


def built(*arguments, **more) -> Row:
    return Row(preset="sdxl", build=tiny_sdxl.build(*arguments, **more))


@pytest.fixture(scope="module")
def pipe():
    """Tests leave it as they find it."""
    return ROWS["sdxl"].pipeline(ROWS["sdxl"].aligned_class())


# ---- steps noised anew -----------------------------------------------------------------------------------------------------------


def test_renoise_is_the_stock_loop_of_lcm():
    """To what the boundary scalings change: c_out = 1 - 1e-8 and c_skip = 4e-8 at t = 249, the last step's."""
    row = ROWS["sdxl-dmd2"]
    ours, stock = both(row)
    expected = stock(PROMPTS, generator=generators(), output_type="latent", **row.call).images
    own = generators()
    noise = ours.draw_noise(own)
    schedule = ours.schedule(timesteps=row.call["timesteps"])
    with torch.no_grad():
        out = rollout(ours, noise, ours.encode(PROMPTS, unconditional=False), schedule, Renoise(), generators=own, keep=["log_probs"])
    torch.testing.assert_close(out.latents, expected, rtol=1e-5, atol=1e-4)
    assert [std > 0 for std in out.stds] == [True, True, True, False]
    assert out.log_probs[-1] is None


def test_lcm_ends_at_clean_latents_whatever_its_configuration_says_of_the_level_behind():
    ours = ROWS["sdxl-dmd2"].pipeline(ROWS["sdxl-dmd2"].aligned_class())
    assert not ours.scheduler.config.set_alpha_to_one  # taken over from SDXL's own scheduler
    schedule = ours.schedule(timesteps=[999, 749, 499, 249])
    assert (schedule.signal[-1], schedule.noise[-1]) == (1.0, 0.0)
    alphas = ours.scheduler.alphas_cumprod
    assert schedule.signal[:-1] == pytest.approx([alphas[t].sqrt().item() for t in (999, 749, 499, 249)])
    assert schedule.start == 1


def test_hyper_sdxl_is_one_prediction_from_800():
    """x0 = (x - s eps(x, 800)) / a with x of unit variance, and a^2 the product of 1 - beta up to 800; then the autoencoder."""
    row = ROWS["hyper-sdxl"]
    ours, stock = both(row)
    x = ours.draw_noise(generators())
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    square = (1 - betas).cumprod(0)[800].item()
    assert square**-0.5 == pytest.approx(5.21, abs=0.01)  # how far the noise is stretched on its way to the image
    embeddings, _, pooled, _ = stock.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    told = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    with torch.no_grad():
        eps = stock.unet(x, 800, encoder_hidden_states=embeddings, added_cond_kwargs=told).sample
        latents = (x - (1 - square) ** 0.5 * eps) / square**0.5
        expected = (stock.vae.decode(latents / 0.13025).sample / 2 + 0.5).clamp(0, 1)
        found = ours.noise_to_images(x, ours.encode(PROMPTS, unconditional=False), row.call)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["hyper-sdxl", "sdxl-dmd2"])
def test_a_preset_visits_its_own_timesteps_and_says_once_what_lcm_thinks_of_them(name, caplog):
    ours = ROWS[name].pipeline(ROWS[name].aligned_class())
    ours.defaults = {**PRESETS[name].defaults(), "height": 64, "width": 64}
    assert ours.schedule().timesteps == PRESETS[name].timesteps
    caplog.clear()
    found = ours(PROMPTS, seed=SEEDS, plugins=[diffalign.BestOfN(Brightness(), budget=3 * PRESETS[name].steps)], output_type="np")
    assert 0 < len([record for record in caplog.records if "timestep schedule" in record.getMessage()]) <= 2
    plain = ours(PROMPTS, seed=SEEDS, output_type="np").images
    np.testing.assert_allclose(values(found.initial_images), values(plain), rtol=0, atol=ATOL)
    expected = ours(PROMPTS, seed=SEEDS, output_type="np", timesteps=list(PRESETS[name].timesteps), guidance_scale=0.0).images
    assert np.array_equal(values(plain), values(expected))


# ---- conditions ------------------------------------------------------------------------------------------------------------------


def test_the_network_is_told_the_size_of_what_it_makes(pipe):
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, _, given: seen.append(given["added_cond_kwargs"]), with_kwargs=True)
    try:
        size = Size(48, 80)
        pipe.denoise(pipe.draw_noise(generators(), size), 500, pipe.encode(PROMPTS, size=size), 4.0)
        pipe(PROMPTS, height=48, width=80, **CALL)
    finally:
        handle.remove()
    assert seen[0]["time_ids"].tolist() == [[48, 80, 0, 0, 48, 80]] * 4
    assert all(torch.equal(seen[0][name].float(), seen[1][name].float()) for name in ("time_ids", "text_embeds"))


def test_another_original_size_and_crop_are_the_stock_ones_also_in_a_search(pipe):
    stock = ROWS["sdxl"].pipeline(type(pipe).stock_class)
    call = {**CALL, "original_size": (32, 32), "crops_coords_top_left": (8, 16), "negative_original_size": (16, 16),
            "negative_target_size": (64, 64), "output_type": "np"}  # fmt: skip
    expected = values(stock(PROMPTS, generator=generators(), **call).images)
    assert np.array_equal(values(pipe(PROMPTS, seed=SEEDS, **call).images), expected)
    found = pipe(PROMPTS, seed=SEEDS, plugins=[diffalign.BestOfN(Brightness(), budget=1)], **call)
    np.testing.assert_allclose(values(found.initial_images), expected, rtol=0, atol=ATOL)
    assert not np.allclose(values(pipe(PROMPTS, seed=SEEDS, output_type="np", **CALL).images), expected, atol=1e-4)


@pytest.mark.parametrize("negative", [None, "", "a blue cup", ["", "a red ring"]])
def test_no_negative_prompt_is_zeros_and_an_empty_one_is_a_text(pipe, negative):
    texts = pipe.encode(PROMPTS, negative).tensors
    for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        assert bool(texts[name].any()) == (negative is not None)
    call = {**CALL, "negative_prompt": negative, "output_type": "np"}
    plain = values(pipe(PROMPTS, seed=SEEDS, **call).images)
    found = pipe(PROMPTS, seed=SEEDS, plugins=[diffalign.BestOfN(Brightness(), budget=1)], **call)
    np.testing.assert_allclose(values(found.initial_images), plain, rtol=0, atol=ATOL)


def test_the_unconditional_branch_is_encoded_only_when_asked_for(pipe):
    assert set(pipe.encode(PROMPTS, "red", unconditional=False).tensors) == {"prompt_embeds", "pooled_prompt_embeds"}


def test_one_side_alone_is_taken_as_the_stock_call_takes_it(pipe):
    assert pipe.size_of({"width": 40}) == Size(64, 40)
    assert pipe(PROMPTS[0], seed=3, width=40, num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 5)


def test_networks_distilled_with_their_guidance_scale_take_it_as_an_input():
    row = built(lambda: tiny_sdxl.base(LCMScheduler), time_cond_proj_dim=6)
    ours, stock = both(row)
    call = {"num_inference_steps": 2, "guidance_scale": 8.0}
    assert ours.embedded_scale_of(call) == 8
    assert ours.embedded_scale_of({}) == 5
    assert not ours.has_two_branches(call)
    expected = stock(PROMPTS, generator=generators(), output_type="latent", **call).images
    own = generators()
    noise = ours.draw_noise(own)
    sampler = ours.stock_sampler(ours.timed_scheduler(2), own)
    with torch.no_grad():
        out = rollout(ours, noise, ours.encode(PROMPTS, unconditional=False, embedded_scale=8.0), ours.schedule(2), sampler)
    assert torch.equal(out.latents, expected)
    plain = values(ours(PROMPTS, seed=SEEDS, output_type="np", **call).images)
    search = ours(PROMPTS, seed=SEEDS, plugins=[diffalign.BestOfN(Brightness(), budget=1)], output_type="np", **call)
    np.testing.assert_allclose(values(search.initial_images), plain, rtol=0, atol=ATOL)


# ---- the autoencoder ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_decodes_in_float32_and_is_half_again(upcast):
    row = built(tiny_sdxl.turbo, vae={"force_upcast": upcast})
    ours, stock = both(row, torch.float16)
    call = {"num_inference_steps": 1, "guidance_scale": 0.0}
    expected = values(stock(PROMPTS, generator=generators(), output_type="np", **call).images)
    assert np.array_equal(values(ours(PROMPTS, seed=SEEDS, output_type="np", **call).images), expected)
    assert np.array_equal(expected, expected.astype(np.float16)) == (not upcast)
    conditioning = ours.encode(PROMPTS, unconditional=False)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.enable_gradient_checkpointing()
        noise = ours.draw_noise(generators()).requires_grad_()
        images = ours.noise_to_images(noise, conditioning, call)
        assert np.array_equal(np.moveaxis(images.detach().numpy(), 1, -1), expected)
        found.append(torch.autograd.grad(images.square().mean(), noise)[0])
        assert torch.isfinite(found[-1]).all()
        assert found[-1].flatten(1).norm(dim=1).min() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-6)
    with torch.no_grad():
        assert np.array_equal(np.moveaxis(ours.noise_to_images(noise, conditioning, call).numpy(), 1, -1), expected)
    assert ours.encode_images(images.detach()).dtype == torch.float32
    assert {ours.vae.dtype, ours.unet.dtype} == {torch.float16}


@pytest.mark.parametrize("stated", [{}, STATED], ids=["plain", "mean and std"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_latents_are_scaled_as_in_the_stock_calls(stated, dtype, monkeypatch):
    ours, stock = both(built(tiny_sdxl.turbo, vae={**stated, "force_upcast": False}), dtype)
    call = {"num_inference_steps": 1, "guidance_scale": 0.0}
    expected = values(stock(PROMPTS, generator=generators(), output_type="np", **call).images)
    with torch.no_grad():
        decoded = ours.decode(stock(PROMPTS, generator=generators(), output_type="latent", **call).images)
    assert np.array_equal(np.moveaxis(decoded.numpy(), 1, -1), expected)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    other = StableDiffusionXLImg2ImgPipeline(**stock.components, add_watermarker=False)
    with torch.no_grad():
        pixels = other.image_processor.preprocess(image).to(dtype)
        encoded = other.prepare_latents(pixels, None, 2, 1, dtype, torch.device("cpu"), add_noise=False)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}  # theirs scales in bfloat16
        torch.testing.assert_close(ours.encode_images(image), encoded.float(), **tolerance)
