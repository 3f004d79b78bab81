"""Wan beyond the contract: videos in both directions, rewards over frames, and the two kinds of Wan 2.2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline
from PIL import Image

import diffalign
from diffalign.backbone import Size
from diffalign.noise import NoiseDistribution
from diffalign.pipelines.families.wan import AlignedWanPipeline
from diffalign.rewards.frames import FrameReward
from diffalign.rewards.mix import RewardMix
from diffalign.sampling import rollout
from tests.families import tiny_wan
from tests.families.parts import finish, wake
from tests.families.test_contract import BFLOAT16, PROMPTS, SEEDS, Brightness, generators, values
from tests.families.tiny import ROWS

ROW = ROWS["wan2.1-1.3b"]
SIZE = Size(32, 48, 9)


@pytest.fixture(scope="module")
def wan():
    return ROW.pipeline(AlignedWanPipeline)


# ---- videos --------------------------------------------------------------------------------------------------------------------


def test_noise_has_a_latent_for_every_four_frames_and_is_the_stock_noise(wan):
    ours = wan.draw_noise(generators(), SIZE)
    theirs = WanPipeline.prepare_latents(wan, 2, 16, 32, 48, 9, torch.float32, torch.device("cpu"), generators())
    assert ours.shape == (2, 16, 3, 4, 6)
    assert torch.equal(ours, theirs)
    assert wan.default_size() == Size(480, 832, 81)
    assert wan.noise_shape() == (16, 21, 60, 104)


@pytest.mark.parametrize("frames", [2, 4, 80])
def test_frames_that_do_not_fit_are_refused(wan, frames):
    with pytest.raises(ValueError, match=rf"num_frames must be 4 k \+ 1, as 1, 5, 9, got {frames}"):
        wan.size_of({**ROW.call, "num_frames": frames})


def test_latents_are_scaled_by_every_channels_mean_and_deviation(wan):
    latents = wan.draw_noise(generators(), SIZE)
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (wan.vae.config.latents_mean, wan.vae.config.latents_std))
    with torch.no_grad():
        expected = wan.vae.decode(latents * std + mean).sample.permute(0, 2, 1, 3, 4) / 2 + 0.5
        torch.testing.assert_close(wan.decode(latents), expected, rtol=0, atol=1e-5)
    assert expected.shape == (2, 9, 3, 32, 48)


def test_videos_are_encoded_as_by_the_stock_video_to_video_pipeline(wan):
    parts = {name: wan.components[name] for name in ("tokenizer", "text_encoder", "transformer", "vae")}
    stock = WanVideoToVideoPipeline(**parts, scheduler=tiny_wan.scheduler())
    stock.scheduler.add_noise = lambda latents, noise, timestep: latents
    videos = torch.rand(2, 9, 3, 32, 48, generator=generators()[0])
    with torch.no_grad():
        given = stock.video_processor.preprocess_video(videos, height=32, width=48)
        theirs = stock.prepare_latents(given, 2, 16, 32, 48, torch.float32, torch.device("cpu"), generators(), None, None)
        torch.testing.assert_close(wan.encode_images(videos), theirs, rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_the_decoders_cache_of_features(wan):
    """The last frame depends on the first latent, through the cache alone."""
    latents = wan.draw_noise(generators([3]), SIZE).requires_grad_()
    (gradient,) = torch.autograd.grad(wan.decode(latents)[:, -1].sum(), latents)
    assert (gradient.abs().amax(dim=(0, 1, 3, 4)) > 0).all()
    (gradient,) = torch.autograd.grad(wan.decode(latents)[:, 0].sum(), latents)
    assert (gradient.abs().amax(dim=(0, 1, 3, 4)) > 0).tolist() == [True, False, False]


# ---- searches ------------------------------------------------------------------------------------------------------------------


class Red:
    """An image reward: how red it is."""

    name, differentiable = "red", True

    def prepare(self, prompts):
        pass

    def __call__(self, images, prompts):
        assert images.shape[1:] == (3, 32, 32)
        return images[:, 0].flatten(1).mean(1)


def test_reno_climbs_an_image_reward_over_frames(wan):
    reward = RewardMix({"red": (FrameReward(Red(), frames=3), 1.0)})
    events = []
    out = wan(PROMPTS, seed=SEEDS, plugins=[diffalign.ReNO(reward, budget=4, starts=1)], progress=events.append, **ROW.call)
    assert out.images.shape == (2, 5, 32, 32, 3)  # the stock call's output where it is not told: arrays
    assert events[0].images.shape == (2, 5, 3, 32, 32)
    assert all(max(series) > series[0] for series in out.trace.rewards["total"])
    assert out.noise.shape == (2, 16, 2, 4, 4)


def test_find_learns_from_a_reward_over_frames_and_its_distribution_makes_more_videos(wan, tmp_path):
    reward = RewardMix({"red": (FrameReward(Red(), frames=3), 1.0)})
    out = wan(PROMPTS, seed=SEEDS, plugins=[diffalign.FIND(reward, budget=6, candidates=3)], output_type="pt", **ROW.call)
    chosen = out.images[:, [0, 2, 4]]  # the middles of three equal parts of five frames
    best = [series[k] for series, k in zip(out.trace.rewards["total"], out.trace.best, strict=True)]
    assert chosen[:, :, 0].mean(dim=(1, 2, 3)).tolist() == pytest.approx(best, abs=1e-5)
    assert [len(series) for series in out.trace.rewards["total"]] == [6, 6]
    out.distribution.save(tmp_path / "found.safetensors")
    again = NoiseDistribution.load(tmp_path / "found.safetensors")
    assert again.mean.shape == (2, 16, 2, 4, 4)
    assert (again.mean.flatten(1).abs().amax(1) > 0).all()
    more = wan(PROMPTS, seed=SEEDS, latents=again.sample(SEEDS), output_type="pt", **ROW.call).images
    assert more.shape == out.images.shape
    assert not torch.equal(more, out.images)


def test_a_search_returns_what_the_stock_call_returns(wan):
    search = [diffalign.BestOfN(Brightness(), budget=1)]
    for output_type in ("np", "pt", "pil"):
        ours = wan(PROMPTS, seed=SEEDS, plugins=search, output_type=output_type, **ROW.call).images
        theirs = wan(PROMPTS, seed=SEEDS, output_type=output_type, **ROW.call).images
        assert type(ours) is type(theirs)
        if output_type == "pil":
            assert len(ours) == len(theirs) == 2
            assert len(ours[0]) == len(theirs[0]) == 5
            assert isinstance(ours[0][0], Image.Image)
        else:
            np.testing.assert_allclose(values(ours), values(theirs), rtol=0, atol=1e-5)
    latents = wan(PROMPTS, seed=SEEDS, plugins=search, output_type="latent", **ROW.call).images
    assert latents.shape == (2, 16, 2, 4, 4)
    assert len(wan(PROMPTS[0], seed=3, num_videos_per_prompt=2, **ROW.call).images) == 2


# ---- prompts -------------------------------------------------------------------------------------------------------------------


def test_prompts_are_cleaned_and_what_is_behind_their_end_is_zero(wan):
    conditioning = wan.encode(["red &amp;amp;  circle\n", "red & circle"])
    words = conditioning.tensors["prompt_embeds"]
    assert torch.equal(words[0], words[1])
    count = len(wan.tokenizer("red & circle").input_ids)
    assert words.shape == (2, 512, tiny_wan.UMT5_WIDTH)
    assert words[0, :count].any(dim=-1).all()
    assert not words[0, count:].any()
    assert wan.encode(PROMPTS, max_sequence_length=16).tensors["negative_prompt_embeds"].shape == (2, 16, tiny_wan.UMT5_WIDTH)


# ---- Wan 2.2 -------------------------------------------------------------------------------------------------------------------


def two_stages(cls: type, dtype: torch.dtype = torch.float32):
    """Wan 2.2's large models: another transformer below a noise level."""
    tokenizer, networks = tiny_wan.parts()
    networks["transformer_2"] = wake(tiny_wan.transformer())
    return cls(**finish(networks, dtype), tokenizer=tokenizer, scheduler=tiny_wan.scheduler(), boundary_ratio=0.875)


def small(cls: type, dtype: torch.dtype = torch.float32):
    """Wan 2.2's small model: a time for every token, and an autoencoder of 16 pixels to a latent."""
    tokenizer, networks = tiny_wan.parts()
    networks["transformer"] = wake(tiny_wan.transformer(in_channels=48, out_channels=48))
    networks["vae"] = tiny_wan.autoencoder(
        z_dim=48, is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16,
        latents_mean=[0.1] * 48, latents_std=[1.5] * 48,
    )  # fmt: skip
    return cls(**finish(networks, dtype), tokenizer=tokenizer, scheduler=tiny_wan.scheduler(5.0), expand_timesteps=True)


def made(build, cls, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = build(cls, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("build", "height"), [(two_stages, 32), (small, 64)], ids=["two stages", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_wan_2_2_is_the_stock_pipeline_in_call_and_loop(build, height, dtype):
    call = {**ROW.call, "height": height, "width": height + 32, "num_inference_steps": 4}
    ours, theirs = (made(build, cls, dtype) for cls in (AlignedWanPipeline, WanPipeline))
    expected = theirs(PROMPTS, generator=generators(), output_type="np", **call).frames
    assert np.array_equal(ours(PROMPTS, seed=SEEDS, **call).images, expected)
    size = ours.size_of(call)
    conditioning, noise = ours.encode(PROMPTS, size=size), ours.draw_noise(generators(), size)
    assert noise.shape == (2, *ours.noise_shape(size))
    if dtype == torch.float32:
        with torch.no_grad():
            stock = ours.noise_to_images(noise, conditioning, call)
            loop = rollout(ours, noise, conditioning, ours.schedule(4, repeats=True), ours.stock_sampler(ours.timed_scheduler(4)),
                           guidance_scale=5.0)  # fmt: skip
        assert np.array_equal(np.moveaxis(stock.numpy(), 2, -1), expected)
        assert torch.equal(ours.decode(loop.latents), stock)
        assert ours.encode_images(stock).shape == noise.shape


def test_the_second_transformer_takes_over_below_the_boundary_and_is_checkpointed_too():
    pipe = made(two_stages, AlignedWanPipeline)
    conditioning, noise = pipe.encode(PROMPTS), pipe.draw_noise(generators(), Size(32, 32, 5))
    seen = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda module, args, name=name: seen.append(name))
    with torch.no_grad():
        for timestep in (1000.0, 875.0, 874.0):
            pipe.predict(noise, timestep, conditioning.conditional(), conditioning)
    assert seen == ["transformer", "transformer", "transformer_2"]
    pipe.enable_gradient_checkpointing()
    assert pipe.transformer_2.is_gradient_checkpointing
    pipe.disable_gradient_checkpointing()
    assert not pipe.transformer_2.is_gradient_checkpointing
    with pytest.raises(ValueError, match="guidance_scale_2 cannot be used with the search"):
        pipe(PROMPTS, seed=SEEDS, plugins=[diffalign.BestOfN(Brightness(), budget=1)], guidance_scale_2=3.0, **ROW.call)
