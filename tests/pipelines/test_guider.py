"""The guider inside a modular pipeline's own denoising loop."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep

from diffalign.methods.adaptive_guidance import AdaptiveGuidance
from diffalign.methods.guidance_rivals import DeltaReuse, FixedFraction
from pipelines.guidance_hook import guide
from pipelines.guider import AdaptiveGuider
from tests.tiny_families import FAMILIES

SD3 = FAMILIES["sd3"]
SCALE = 4.0


@pytest.fixture(scope="module")
def stock():
    return SD3.pipeline()


@pytest.fixture
def modular(stock):
    pipeline = StableDiffusion3DenoiseStep().init_pipeline()
    pipeline.update_components(transformer=stock.transformer, scheduler=stock.scheduler, guider=ClassifierFreeGuidance(SCALE))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, stock, prompts=(1, 2), steps=6):
    """The denoising block alone, from the noise and embeddings of tests/tiny_families.py."""
    from tests.tiny_families import draw

    stock.scheduler.set_timesteps(steps)
    latents = torch.stack([draw(SD3.latent, seed, "noise") for seed in prompts])
    return pipeline(latents=latents, timesteps=stock.scheduler.timesteps, num_inference_steps=steps, output="latents",
                    joint_attention_kwargs=None, **SD3.conditioning(prompts))  # fmt: skip


def guider_of(method, stock):
    return AdaptiveGuider.of(method, stock.scheduler, guidance_scale=SCALE)


def test_full_guidance_is_the_stock_guider(modular, stock):
    expected = run(modular, stock)
    torch.testing.assert_close(expected, SD3(stock, [1, 2]), rtol=1e-4, atol=1e-4)
    modular.update_components(guider=AdaptiveGuider(SCALE))
    assert torch.equal(run(modular, stock), expected)
    guider = guider_of(AdaptiveGuidance(threshold=math.inf), stock)
    modular.update_components(guider=guider)
    assert torch.equal(run(modular, stock), expected)
    assert guider.report.evaluations == [12, 12]


@pytest.mark.parametrize("method", [FixedFraction(fraction=0.5), DeltaReuse(fraction=0.5), AdaptiveGuidance(threshold=0.9, decision="all")])
def test_equals_the_hook(method, modular, stock):
    with guide(stock, method) as guided:
        expected = SD3(stock, [1, 2])
    guider = guider_of(method, stock)
    modular.update_components(guider=guider)
    calls = []
    handle = stock.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    found = run(modular, stock)
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert guider.report.evaluations == guided.report.evaluations
    assert len(calls) == guider.report.evaluations[0]
    assert not stock.transformer._forward_pre_hooks


def test_samples_stop_one_by_one(modular, stock):
    """A batch has one number of evaluations, and yet each sample its own latch."""
    with guide(stock, AdaptiveGuidance(threshold=math.inf)) as guided:
        SD3(stock, [1, 2])
    first, second = (series[2] for series in guided.report.diagnostics["cosine"])
    method = AdaptiveGuidance(threshold=(first + second) / 2, warm_up=0.5)
    with guide(stock, method) as guided:
        expected = SD3(stock, [1, 2])
    assert guided.report.evaluations[0] != guided.report.evaluations[1]
    guider = guider_of(method, stock)
    modular.update_components(guider=guider)
    torch.testing.assert_close(run(modular, stock), expected, rtol=1e-4, atol=1e-4)
    assert guider.report.evaluations == [max(guided.report.evaluations)] * 2


def test_the_next_run_wants_its_negative_prompt(modular, stock):
    """Stock guiders that stopped early say before the next run that there is one condition; and after an exception `reset` helps."""
    guider = guider_of(FixedFraction(fraction=0.5), stock)
    modular.update_components(guider=guider)
    expected = run(modular, stock)
    assert guider.num_conditions == 2
    assert torch.equal(run(modular, stock), expected)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("planted")

    handle = stock.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(modular, stock)
    handle.remove()
    assert guider.num_conditions == 1
    guider.reset()
    assert guider.num_conditions == 2
    assert torch.equal(run(modular, stock), expected)


def test_config_goes_through_disk(tmp_path, stock):
    guider = guider_of(FixedFraction(), stock)
    guider.save_pretrained(tmp_path)
    loaded = AdaptiveGuider.from_pretrained(tmp_path)
    assert loaded.guidance_scale == SCALE
    assert loaded.method is None
    assert guider.new(guidance_scale=2.0).guidance_scale == 2.0


def test_it_must_know_the_scheduler(modular, stock):
    modular.update_components(guider=AdaptiveGuider.of(FixedFraction(), None, guidance_scale=SCALE))
    with pytest.raises(ValueError, match="must know the scheduler"):
        run(modular, stock)


def test_epsilon_networks_are_compared_in_x0(stock):
    """The network's input, which guiders are not told, reaches the cosine."""
    guider = AdaptiveGuider.of(AdaptiveGuidance(threshold=math.inf), diffusers.DDIMScheduler(), guidance_scale=SCALE)
    guider.scheduler.set_timesteps(4)
    network = torch.nn.Identity()
    generator = torch.Generator().manual_seed(0)
    x, c, u = torch.randn(3, 1, 4, 8, 8, generator=generator)
    guider.set_state(0, 4, guider.scheduler.timesteps[0])
    guider.prepare_models(network)
    network(x)
    guider.cleanup_models(network)
    guider.forward(c, u)
    noise = float((1 - guider.scheduler.alphas_cumprod[750]).sqrt())
    expected = torch.nn.functional.cosine_similarity((x - noise * c).flatten(), (x - noise * u).flatten(), dim=0)
    assert guider._policy.diagnostics["cosine"][0][0] == pytest.approx(float(expected), abs=1e-5)
