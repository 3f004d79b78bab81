"""With plugins=() an aligned pipeline is the stock one, to the bit; and what it saves is a stock folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline

from diffalign.pipelines.families.stable_diffusion import AlignedStableDiffusionPipeline
from tests.pipelines.methods import Dim
from tests.tiny import ancestral_scheduler, tiny_scheduler, tiny_stable_diffusion

PROMPTS = ["a red circle", "two blue squares"]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


CALLS = {
    "guided": {"num_inference_steps": 3},
    "one step, no guidance": {"num_inference_steps": 1, "guidance_scale": 0.0},
    "negative": {"num_inference_steps": 2, "negative_prompt": ["green", "dark"]},
    "rescaled": {"num_inference_steps": 2, "guidance_rescale": 0.7},
    "stochastic": {"num_inference_steps": 3, "eta": 1.0},
    "size": {"num_inference_steps": 1, "height": 16, "width": 48},
    "latent": {"num_inference_steps": 1, "output_type": "latent"},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_is_the_stock_batch(name, pipe, stock):
    call = {"output_type": "pt", **CALLS[name]}
    ours = pipe(PROMPTS, seed=[3, 8], **call)
    theirs = stock(PROMPTS, generator=generators(3, 8), **call)
    assert torch.equal(ours.images, theirs.images)
    assert ours.seeds == [3, 8]
    assert ours.trace is ours.noise is ours.initial_images is None


@pytest.mark.parametrize("scheduler", [tiny_scheduler(prediction_type="sample"), ancestral_scheduler()], ids=["sample", "ancestral"])
def test_other_schedulers(scheduler, pipe, stock):
    pipe.scheduler, stock.scheduler = scheduler, type(scheduler).from_config(scheduler.config)
    ours = pipe(PROMPTS[0], seed=5, num_inference_steps=2, output_type="pt").images
    theirs = stock(PROMPTS[0], generator=torch.Generator().manual_seed(5), num_inference_steps=2, output_type="pt").images
    assert torch.equal(ours, theirs)


def test_images_per_prompt_take_consecutive_seeds(pipe, stock):
    ours = pipe(PROMPTS, seed=10, num_images_per_prompt=2, num_inference_steps=1, output_type="pt")
    theirs = stock(PROMPTS, generator=generators(10, 11, 12, 13), num_images_per_prompt=2, num_inference_steps=1, output_type="pt")
    assert torch.equal(ours.images, theirs.images)
    assert ours.seeds == [10, 11, 12, 13]
    assert len(ours.truncated) == 4


def test_pil_positional_arguments_and_tuples(pipe, stock):
    ours = pipe(PROMPTS[0], 16, 32, 2, seed=1, return_dict=False)
    theirs = stock(PROMPTS[0], 16, 32, 2, generator=torch.Generator().manual_seed(1), return_dict=False)
    assert ours[1] is theirs[1] is None
    assert np.array_equal(np.asarray(ours[0][0]), np.asarray(theirs[0][0]))
    assert ours[0][0].size == (32, 16)


def test_embeddings_and_generators_of_the_caller(pipe, stock):
    embeddings = stock.encode_prompt(PROMPTS, "cpu", 1, True)
    call = {"prompt_embeds": embeddings[0], "negative_prompt_embeds": embeddings[1], "num_inference_steps": 1, "output_type": "pt"}
    ours, theirs = pipe(generator=generators(1, 2), **call), stock(generator=generators(1, 2), **call)
    assert torch.equal(ours.images, theirs.images)
    assert ours.seeds is None
    assert ours.truncated is None
    assert torch.equal(pipe(seed=1, **call).images, theirs.images)


def test_half_precision(tmp_path):
    ours = tiny_stable_diffusion(dtype=torch.bfloat16)
    theirs = tiny_stable_diffusion(StableDiffusionPipeline, dtype=torch.bfloat16)
    images = ours(PROMPTS, seed=3, num_inference_steps=2, output_type="pt").images
    assert images.dtype == torch.bfloat16
    assert torch.equal(images, theirs(PROMPTS, generator=generators(3, 4), num_inference_steps=2, output_type="pt").images)
    noise = ours.draw_noise(generators(3, 4))
    assert noise.dtype == torch.float32
    assert torch.equal(ours(PROMPTS, latents=noise, seed=3, num_inference_steps=2, output_type="pt").images, images)


def test_defaults_fill_only_what_is_missing(pipe):
    pipe.defaults = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 16, "width": 16}
    counter = Dim(1.0)
    assert pipe(PROMPTS[0], seed=0, plugins=[counter]).images[0].size == (16, 16)
    assert counter.calls == 1
    assert pipe(PROMPTS[0], seed=0, height=32, num_inference_steps=2, plugins=[counter]).images[0].size == (16, 32)
    assert counter.calls == 3


def test_a_default_timestep_yields_to_any_other_schedule(pipe):
    pipe.defaults = {"num_inference_steps": 1, "timesteps": [400]}
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # DDIM takes no timesteps of the caller's
    pipe(PROMPTS[0], seed=0)
    assert seen == [400]
    pipe(PROMPTS[0], seed=0, num_inference_steps=2)
    assert len(seen) == 3
    assert 400 not in seen[1:]


def test_step_methods_act_during_the_call_only(pipe):
    call = {"seed": 0, "num_inference_steps": 2, "output_type": "pt"}
    plain = pipe(PROMPTS[0], **call).images
    assert not torch.equal(pipe(PROMPTS[0], plugins=[Dim()], **call).images, plain)
    assert torch.equal(pipe(PROMPTS[0], **call).images, plain)


def test_saves_a_stock_folder(pipe, tiny_folder):
    index = json.loads((tiny_folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    expected = pipe(PROMPTS[0], seed=4, num_inference_steps=1, output_type="pt").images
    for cls in (StableDiffusionPipeline, DiffusionPipeline, AlignedStableDiffusionPipeline):
        loaded = cls.from_pretrained(tiny_folder)
        assert type(loaded) is (StableDiffusionPipeline if cls is DiffusionPipeline else cls)
        images = loaded(PROMPTS[0], generator=torch.Generator().manual_seed(4), num_inference_steps=1, output_type="pt").images
        assert torch.equal(images, expected)


def test_a_stock_pipeline_can_be_upgraded_without_copying_weights(stock):
    aligned = AlignedStableDiffusionPipeline.from_pipe(stock)
    assert aligned.unet is stock.unet
    images = aligned(PROMPTS[0], seed=4, num_inference_steps=1, output_type="pt").images
    theirs = stock(PROMPTS[0], generator=torch.Generator().manual_seed(4), num_inference_steps=1, output_type="pt").images
    assert torch.equal(images, theirs)
