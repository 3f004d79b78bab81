"""What is PixArt's own: binned sizes, micro-conditions, the learned variance, the one-step student, and what T5 reads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from diffalign.backbone import Size
from diffalign.pipelines.presets import PRESETS
from tests.families.test_contract import PROMPTS, SEEDS, generators
from tests.families.tiny import ROWS
from tests.families.tiny_pixart import build, solver


@pytest.fixture(scope="module")
def small():
    """The network of 256 pixels."""
    row = ROWS["pixart-alpha-256"]
    return row.pipeline(row.aligned_class())


@pytest.fixture(scope="module")
def dmd():
    row = ROWS["pixart-dmd"]
    return row.pipeline(row.aligned_class())


# ---- sizes ---------------------------------------------------------------------------------------------------------------------


def test_sizes_are_moved_to_the_nearest_that_the_network_knows(small):
    assert small.made_size(Size(201, 333)) == Size(192, 320)
    assert small.noise_shape(Size(201, 333)) == (4, 24, 40)
    assert small.size_of({"height": 201, "width": 333}).binned
    exact = small.size_of({"height": 64, "width": 96, "use_resolution_binning": False})
    assert small.noise_shape(exact) == (4, 8, 12)
    assert small.decode(torch.zeros(1, 4, 24, 40), Size(201, 333)).shape == (1, 3, 201, 333)
    assert small.decode(torch.zeros(1, 4, 24, 40)).shape == (1, 3, 192, 320)  # no size: nothing is cropped
    assert small.decode(torch.zeros(1, 4, 8, 12), exact).shape == (1, 3, 64, 96)


def test_what_a_pipeline_does_by_default_a_size_does_too(small):
    before = small.defaults
    small.defaults = {"use_resolution_binning": False, "height": 64, "width": 64}
    try:
        assert small.noise_shape() == (4, 8, 8)
        assert small.noise_shape(small.size_of({"use_resolution_binning": True})) == (4, 32, 32)
        with pytest.raises(ValueError, match="divisible by 32"):  # patches of four latents
            small.noise_shape(Size(40, 64))
    finally:
        small.defaults = before


def test_a_network_of_another_size_has_no_bins():
    row = replace(ROWS["pixart-alpha"], build=build(sample_size=8))
    with pytest.raises(ValueError, match=r"sample_size 32, 64, 128.*is 8; pass use_resolution_binning=False"):
        row.pipeline(row.aligned_class()).noise_shape()


@pytest.mark.parametrize("preset", ["pixart-alpha", "pixart-sigma"])
def test_the_network_of_1024_pixels_makes_what_the_stock_one_makes(preset):
    """With binning on, up to the latents: 700 x 1000 is made at 832 x 1216, and alpha's network is told so."""
    more = {"use_additional_conditions": False} if preset == "pixart-sigma" else {}
    row = replace(ROWS[preset], build=build(patch_size=8, **more))
    call = {"height": 700, "width": 1000, "num_inference_steps": 2, "output_type": "latent"}
    ours = row.pipeline(row.aligned_class())
    stock = row.pipeline(row.aligned_class().stock_class)(PROMPTS, generator=generators(), **call).images
    assert stock.shape[1:] == ours.noise_shape(Size(700, 1000)) == (4, 104, 152)
    assert torch.equal(ours(PROMPTS, seed=SEEDS, **call).images, stock)
    told = ours.micro_conditions(stock, torch.float32)
    if preset == "pixart-alpha":
        assert told["resolution"].tolist() == [[832, 1216]] * 2
        assert told["aspect_ratio"].flatten().tolist() == pytest.approx([832 / 1216] * 2)
    else:
        assert set(told.values()) == {None}


# ---- the network and its student --------------------------------------------------------------------------------------------------


def test_the_learned_variance_is_left_out(dmd):
    texts = dmd.encode(PROMPTS, unconditional=False)
    x = dmd.draw_noise(generators(), dmd.size_of(ROWS["pixart-dmd"].call))
    with torch.no_grad():
        both = dmd.transformer(
            x,
            encoder_hidden_states=texts.tensors["prompt_embeds"],
            encoder_attention_mask=texts.tensors["prompt_attention_mask"],
            timestep=torch.tensor([400, 400]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        assert both.shape[1] == 8
        assert torch.equal(dmd.predict(x, 400.0, texts.conditional(), texts), both[:, :4])


def test_the_student_is_one_formula_from_unit_noise(dmd):
    """x0 = (z - sqrt(1 - abar) eps) / sqrt(abar) at t = 400, with abar from the betas themselves."""
    call = ROWS["pixart-dmd"].call
    schedule = dmd.schedule(timesteps=[400])
    assert schedule.timesteps == (400.0,)
    assert schedule.start == 1
    assert schedule.signal[-1] == 1
    abar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(401))
    assert schedule.signal[0] == pytest.approx(math.sqrt(abar), rel=1e-5)
    assert 1 / schedule.signal[0] == pytest.approx(2.27, abs=0.01)
    texts = dmd.encode(PROMPTS, unconditional=False)
    z = dmd.draw_noise(generators(), dmd.size_of(call))
    with torch.no_grad():
        eps = dmd.predict(z, 400.0, texts.conditional(), texts)
    x0 = (z - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    assert x0.abs().max() > 1.5  # a scheduler that clips to [-1, 1] would show
    torch.testing.assert_close(dmd(PROMPTS, seed=SEEDS, output_type="latent", **call).images, x0, rtol=1e-4, atol=1e-4)


def test_the_preset_makes_that_scheduler_of_its_teachers():
    made = DDPMScheduler.from_config(solver().config, **PRESETS["pixart-dmd"].scheduler_config)
    assert not made.config.clip_sample
    assert made.config.variance_type == "fixed_small"
    assert made.config.beta_schedule == "linear"


# ---- images and texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "factor"), [("pixart-alpha", 0.18215), ("pixart-sigma", 0.13025)])
def test_images_are_scaled_as_the_published_autoencoders_say(preset, factor):
    pipe = ROWS[preset].pipeline(ROWS[preset].aligned_class())
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        mean = pipe.vae.encode(2 * images - 1).latent_dist.mean
        torch.testing.assert_close(pipe.encode_images(images), mean * factor)
        decoded = pipe.vae.decode(mean).sample / 2 + 0.5
        torch.testing.assert_close(pipe.decode(mean * factor), decoded.clamp(0, 1))


def test_sigma_reads_on_where_alpha_stops(small):
    """250 words: more than alpha's 120 tokens, fewer than Sigma's 300. T5 is given lower case, and the cut is told as written."""
    sigma = ROWS["pixart-sigma"].pipeline(ROWS["pixart-sigma"].aligned_class())
    text = " ".join(["RED"] * 250)
    assert (small.text_limit(), sigma.text_limit()) == (120, 300)
    assert sigma.cut_text([text]) == [None]
    assert small.cut_text([text])[0].split() == ["RED"] * (250 - 119)  # the last place is the end token's
    assert sigma.encode([text]).tensors["prompt_embeds"].shape[1] == 300
    assert small.encode([text], max_sequence_length=50).tensors["prompt_attention_mask"].shape == (1, 50)


def test_the_unconditional_branch_is_encoded_only_when_asked(small):
    assert set(small.encode(PROMPTS, unconditional=False).tensors) == {"prompt_embeds", "prompt_attention_mask"}
    both = small.encode(PROMPTS, ["blue", ""])
    assert both.has_unconditional
    assert not torch.equal(*both.tensors["negative_prompt_embeds"])
