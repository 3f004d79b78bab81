"""What is SANA's own: the instruction before the prompt, binned sizes, and Sprint's steps on the circle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import diffalign
from diffalign.backbone import Size
from diffalign.diffusion import Renoise
from diffalign.sampling import rollout
from tests.families.test_contract import PROMPTS, SEEDS, Brightness, generators, values
from tests.families.tiny import ROWS
from tests.families.tiny_sana import INSTRUCTION, SMALL, SPRINT, build, circle


@pytest.fixture(scope="module")
def sana():
    return ROWS["sana"].pipeline(ROWS["sana"].aligned_class())


@pytest.fixture(scope="module")
def sprint():
    return ROWS["sana-sprint"].pipeline(ROWS["sana-sprint"].aligned_class())


# ---- prompts -------------------------------------------------------------------------------------------------------------------


def test_the_instruction_of_the_stock_call_goes_before_every_prompt(sana, sprint):
    for pipe in (sana, sprint):
        with torch.no_grad():
            stock = pipe.encode_prompt(PROMPTS, complex_human_instruction=INSTRUCTION, max_sequence_length=300)[0]
            bare = pipe.encode_prompt(PROMPTS, complex_human_instruction=[], max_sequence_length=300)[0]
        assert stock.shape[1] == 300
        assert torch.equal(pipe.encode(PROMPTS).tensors["prompt_embeds"], stock)
        assert torch.equal(pipe.encode(PROMPTS, complex_human_instruction=[]).tensors["prompt_embeds"], bare)
        assert not torch.equal(stock, bare)
    both = sana.encode(PROMPTS)
    with torch.no_grad():  # the other branch is read without it
        assert torch.equal(both.tensors["negative_prompt_embeds"], sana.encode_prompt(["", ""], False, complex_human_instruction=[])[0])
    assert not sana.encode(PROMPTS, unconditional=False).has_unconditional


def test_a_prompt_may_use_the_tokens_after_the_instruction(sana):
    """Exactly what the stock tokenizer drops is told, as written."""
    before = "\n".join(INSTRUCTION)
    most = len(sana.tokenizer.encode(before)) + 300 - 2
    words = 0
    while len(sana.tokenizer.encode(before + "red " * words + "red")) < most:
        words += 1
    assert len(sana.tokenizer.encode(before + "red " * words + "red")) == most
    assert sana.cut_text(["RED " * words + "RED "]) == [None]
    assert sana.cut_text(["RED " * words + "RED blue"]) == [" blue"]
    assert sana.text_limit() == 300


def test_a_negative_prompt_is_refused_where_there_is_one_branch(sprint):
    with pytest.raises(ValueError, match="negative_prompt='blue' has no effect on SANA-Sprint"):
        sprint.encode(PROMPTS, "blue")
    assert not sprint.encode(PROMPTS).has_unconditional
    assert not sprint.has_two_branches({"guidance_scale": 4.5})


# ---- sizes and images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["sana", "sana-sprint"])
def test_the_network_of_1024_pixels_makes_what_the_stock_one_makes(preset):
    """With binning on, up to the latents: 700 x 1000 is made at 832 x 1216."""
    row = ROWS[preset]
    call = {"height": 700, "width": 1000, "num_inference_steps": 2, "output_type": "latent"}
    ours = row.pipeline(row.aligned_class())
    stock = row.pipeline(row.aligned_class().stock_class)(PROMPTS, generator=generators(), **call).images
    assert stock.shape[1:] == ours.noise_shape(Size(700, 1000)) == (8, 26, 38)
    assert torch.equal(ours(PROMPTS, seed=SEEDS, **call).images, stock)
    assert ours.default_size() == Size(1024, 1024)
    assert ours.noise_shape() == (8, 32, 32)
    with pytest.raises(ValueError, match="divisible by 32"):
        ours.size_of({"height": 48, "width": 64, "use_resolution_binning": False})


def test_sprint_knows_the_sizes_of_one_network_and_sana_of_four(sana):
    assert set(type(sana).bins) == {16, 32, 64, 128}
    row = replace(ROWS["sana-sprint"], build=build(circle, sample_size=16, **SPRINT))
    with pytest.raises(ValueError, match=r"sample_size 32, and this one's is 16; pass use_resolution_binning=False"):
        row.pipeline(row.aligned_class()).noise_shape()


def test_images_are_scaled_as_the_published_autoencoder_says(sana):
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        latents = sana.vae.encode(2 * images - 1).latent
        torch.testing.assert_close(sana.encode_images(images), latents * 0.41407)
        torch.testing.assert_close(sana.decode(latents * 0.41407), (sana.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))


def test_sanas_steps_are_shifted_by_three(sana):
    schedule = sana.schedule(4)
    assert schedule.prediction == "flow"
    plain = [0.999 * (4 - i) / 4 for i in range(4)]
    assert schedule.noise == pytest.approx([*(3 * s / (1 + 2 * s) for s in plain), 0], abs=1e-6)
    assert schedule.timesteps == tuple(float(int(1000 * s)) for s in schedule.noise[:-1])
    assert schedule.start == 1
    assert sana.embedded_scale_of({"guidance_scale": 4.5}) is None


@pytest.mark.parametrize("preset", ["sana", "sana-sprint"])
def test_noise_is_float32_beside_half_precision_weights(preset):
    half = ROWS[preset].pipeline(ROWS[preset].aligned_class(), torch.bfloat16)
    call = {**ROWS[preset].call, "output_type": "latent"}
    noise = half.draw_noise(generators(), half.size_of(call))
    assert torch.equal(half(PROMPTS, seed=SEEDS, latents=noise, **call).images, half(PROMPTS, seed=SEEDS, **call).images)


# ---- Sprint --------------------------------------------------------------------------------------------------------------------


def test_sprints_schedule_is_the_circle(sprint):
    two = sprint.schedule()
    assert two.timesteps == pytest.approx([1.5708, 1.3])
    assert two.signal == pytest.approx([math.cos(1.5708), math.cos(1.3), 1], abs=1e-6)
    assert two.noise == pytest.approx([1, math.sin(1.3), 0], abs=1e-6)
    assert two.start == 1
    four = sprint.schedule(4)
    assert four.timesteps == pytest.approx([1.5708 * (4 - i) / 4 for i in range(4)], rel=1e-6)
    assert sprint.schedule(2, intermediate_timesteps=1.1).timesteps == pytest.approx([1.5708, 1.1])
    assert sprint.schedule(1, max_timesteps=1.5).timesteps == pytest.approx([1.5])
    with pytest.raises(ValueError, match="timesteps cannot be used with SANA-Sprint's scheduler"):
        sprint.schedule(timesteps=[1.5, 0])


def test_one_step_of_sprint_is_one_formula(sprint):
    """In double precision from a plain call of the network: x0 = cos(t) x - sin(t) v, v from the flow's output F by the paper's change."""
    call = {**SMALL, "num_inference_steps": 1, "guidance_scale": 3.0}
    texts = sprint.encode(PROMPTS, embedded_scale=3.0)
    x = sprint.draw_noise(generators(), sprint.size_of(call))
    t = 1.5708
    s = math.sin(t) / (math.sin(t) + math.cos(t))
    size = math.hypot(s, 1 - s)
    with torch.no_grad():
        flow = sprint.transformer(
            x * size,
            encoder_hidden_states=texts.tensors["prompt_embeds"],
            encoder_attention_mask=texts.tensors["prompt_attention_mask"],
            timestep=torch.tensor([s, s]),
            guidance=torch.tensor([0.3, 0.3]),  # times 0.1, the network's own unit
        ).sample
    v = ((1 - 2 * s) * (x * size).double() + (1 - 2 * s + 2 * s * s) * flow.double()) / size
    x0 = math.cos(t) * x.double() - math.sin(t) * v
    torch.testing.assert_close(sprint(PROMPTS, seed=SEEDS, output_type="latent", **call).images, x0.float(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(sprint.predict(x, t, texts.conditional(), texts), v.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_every_number_of_steps_is_the_stock_call_and_renoising_in_our_loop(sprint, steps):
    """The stock call itself must be told intermediate_timesteps=None but for two steps."""
    call = {**SMALL, "num_inference_steps": steps, "output_type": "latent"}
    stock = ROWS["sana-sprint"].pipeline(type(sprint).stock_class)
    told = {} if steps == 2 else {"intermediate_timesteps": None}
    expected = stock(PROMPTS, generator=generators(), **call, **told).images
    assert torch.equal(sprint(PROMPTS, seed=SEEDS, **call).images, expected)
    own = generators()
    noise = sprint.draw_noise(own, sprint.size_of(call))
    with torch.no_grad():
        out = rollout(sprint, noise, sprint.encode(PROMPTS), sprint.schedule(steps), Renoise(), generators=own)
    torch.testing.assert_close(out.latents, expected, rtol=1e-4, atol=1e-4)  # cosines in double precision here, in single there
    assert out.evaluations == [steps] * 2


def test_a_search_takes_any_number_of_steps(sprint):
    call = {**SMALL, "num_inference_steps": 3, "output_type": "np"}
    out = sprint(PROMPTS, seed=SEEDS, plugins=[diffalign.BestOfN(Brightness(), budget=2)], **call)
    again = sprint(PROMPTS, seed=out.seeds, latents=out.noise, **call).images
    assert abs(values(again) - values(out.images)).max() < 1e-5


def test_the_embedded_scale_is_the_networks_input(sprint):
    x = sprint.draw_noise(generators(), sprint.size_of(SMALL))
    by_default, same, other = (sprint.encode(PROMPTS, embedded_scale=scale) for scale in (None, 4.5, 1.0))
    assert by_default.embedded_scale == sprint.embedded_scale_of({}) == 4.5
    with torch.no_grad():
        first, second, third = (sprint.predict(x, 1.3, each.conditional(), each) for each in (by_default, same, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
