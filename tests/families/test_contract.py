"""What every model family owes, over every preset in miniature: see docs/adding_a_family.md."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch

import diffalign
from diffalign.backbone import Size
from diffalign.diffusion import DDIM
from diffalign.sampling import rollout
from diffalign.types import RewardScores
from tests.families.tiny import ROWS

PROMPTS = ["a red circle", "two blue cups"]
SEEDS = [3, 8]
BFLOAT16 = torch.bfloat16


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def values(images) -> np.ndarray:
    """Whatever a pipeline returns, as one array."""
    return np.stack([np.asarray(image.float() if isinstance(image, torch.Tensor) else image, dtype=np.float32) for image in images])


class Brightness:
    """A reward with a gradient: the mean of every image, of every frame."""

    differentiable = True

    def prepare(self, prompts) -> None:
        pass

    def __call__(self, images, prompts) -> RewardScores:
        total = images.flatten(1).mean(1)
        return RewardScores(total, {"brightness": total})


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture(scope="module")
def shared(row):
    """The row's aligned pipeline; tests leave it as they find it."""
    return row.pipeline(row.aligned_class())


def conditioning_of(pipe, row, prompts=PROMPTS, **more):
    size, scale = pipe.size_of({**pipe.defaults, **row.call}), pipe.embedded_scale_of(row.call)
    return pipe.encode(prompts, unconditional=row.guided, size=size, embedded_scale=scale, **row.texts, **more)


def scale_of(pipe, row) -> float:
    return row.call.get(pipe.scale_argument, 1.0) if row.guided else 1.0


def steps_of(row) -> dict:
    return {name: row.call[name] for name in ("timesteps", "sigmas") if name in row.call}


# ---- the call ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_without_plugins_it_is_the_stock_pipeline_to_the_bit(row, dtype):
    cls = row.aligned_class()
    ours = row.pipeline(cls, dtype)(PROMPTS, seed=SEEDS, output_type="np", **row.whole_call())
    theirs = row.pipeline(cls.stock_class, dtype)(PROMPTS, generator=generators(), output_type="np", **row.whole_call())
    assert np.array_equal(values(ours.images), values(getattr(theirs, cls.output_field)))
    assert ours.seeds == SEEDS


def test_another_size_is_the_stock_one_too(row, shared):
    cls, call = row.aligned_class(), {**row.whole_call(1), **row.other_size}
    ours = shared(PROMPTS[0], seed=3, output_type="np", **call).images
    theirs = getattr(row.pipeline(cls.stock_class)(PROMPTS[0], generator=generators([3])[0], output_type="np", **call), cls.output_field)
    assert np.array_equal(values(ours), values(theirs))
    size = shared.size_of(call)
    assert values(ours).shape[-3:-1] == (size.height, size.width)


def test_noise_to_images_is_the_plain_call_and_differentiates(row, shared):
    plain = values(shared(PROMPTS, seed=SEEDS, output_type="np", **row.whole_call()).images)
    own, size = generators(), shared.size_of({**shared.defaults, **row.call})
    noise = shared.draw_noise(own, size).requires_grad_()
    images = shared.noise_to_images(noise, conditioning_of(shared, row), row.call, own)
    assert np.array_equal(np.moveaxis(images.detach().numpy(), -3, -1), plain)
    (gradient,) = torch.autograd.grad(images.square().sum(), noise)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_bfloat16_gradients_are_finite_and_not_zero(row):
    pipe = row.pipeline(row.aligned_class(), BFLOAT16)
    own, size = generators(), pipe.size_of({**pipe.defaults, **row.call})
    noise = pipe.draw_noise(own, size).requires_grad_()
    images = pipe.noise_to_images(noise, conditioning_of(pipe, row), row.call, own)
    assert images.dtype == torch.float32
    (gradient,) = torch.autograd.grad(images.sum(), noise)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_a_batch_is_its_singles(row, shared):
    conditioning, size = conditioning_of(shared, row), shared.size_of({**shared.defaults, **row.call})
    noise = shared.draw_noise(generators(), size)
    together = shared.noise_to_images(noise, conditioning, row.call, generators())
    for i in range(2):
        alone = shared.noise_to_images(noise[i : i + 1], conditioning.rows([i]), row.call, generators()[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=row.atol)
    assert not torch.allclose(together[0], together[1], atol=10 * row.atol)


def test_another_prompt_makes_another_image(row, shared):
    size = shared.size_of({**shared.defaults, **row.call})
    noise = shared.draw_noise(generators([3, 3]), size)
    images = shared.noise_to_images(noise, conditioning_of(shared, row), row.call, generators([3, 3]))
    assert not torch.equal(images[0], images[1])


# ---- the loop ------------------------------------------------------------------------------------------------------------------


def stock_latents(row, shared):
    own, size = generators(), shared.size_of({**shared.defaults, **row.call})
    noise = shared.draw_noise(own, size)
    with torch.no_grad():
        return noise, size, shared.noise_to_images(noise, conditioning_of(shared, row), row.call, own, output_type="latent")


def test_rollout_with_the_stock_scheduler_is_the_stock_loop(row, shared):
    """To the bit: the same arithmetic in another loop."""
    noise, size, expected = stock_latents(row, shared)
    steps = row.call.get("num_inference_steps")
    own = generators()
    shared.draw_noise(own, size)
    scheduler = shared.timed_scheduler(steps, size=size, **steps_of(row))
    schedule = shared.schedule(steps, size=size, repeats=True, **steps_of(row))
    with torch.no_grad():
        out = rollout(
            shared,
            noise,
            conditioning_of(shared, row),
            schedule,
            shared.stock_sampler(scheduler, own),
            guidance_scale=scale_of(shared, row),
        )
    assert torch.equal(out.latents, expected)
    assert out.evaluations == [schedule.steps * (2 if row.guided else 1)] * 2


def test_ddim_is_the_stock_loop_of_first_order_schedulers(row, shared):
    if not row.first_order:
        pytest.skip("this preset's scheduler is of another kind")
    noise, size, expected = stock_latents(row, shared)
    schedule = shared.schedule(row.call.get("num_inference_steps"), size=size, **steps_of(row))
    with torch.no_grad():
        out = rollout(shared, noise, conditioning_of(shared, row), schedule, guidance_scale=scale_of(shared, row))
    torch.testing.assert_close(out.latents, expected, rtol=1e-4, atol=10 * row.atol)


def test_rollout_is_differentiable_and_checkpointing_changes_nothing(row, shared):
    size = shared.size_of({**shared.defaults, **row.call})
    conditioning = conditioning_of(shared, row, PROMPTS[:1])
    schedule = shared.schedule(2, size=size) if not steps_of(row) else shared.schedule(size=size, **steps_of(row))
    found = []
    for checkpoint in (False, True):
        noise = shared.draw_noise(generators([3]), size).requires_grad_()
        out = rollout(shared, noise, conditioning, schedule, DDIM(eta=0.5), guidance_scale=scale_of(shared, row),
                      generators=generators([5]), keep=("log_probs", "x0"), checkpoint=checkpoint)  # fmt: skip
        images = shared.decode(out.latents, size)
        found.append(torch.autograd.grad(images.square().sum(), noise)[0])
        assert torch.isfinite(found[-1]).all()
        assert found[-1].norm() > 0
        assert len(out.x0) == len(out.log_probs) == schedule.steps
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_every_weight_of_the_network_can_be_trained_through_predict(row):
    pipe = row.pipeline(row.aligned_class())
    network = getattr(pipe, pipe.denoiser)
    network.requires_grad_(True)
    size = pipe.size_of({**pipe.defaults, **row.call})
    conditioning, schedule = conditioning_of(pipe, row), pipe.schedule(3, size=size)
    x = pipe.draw_noise(generators(), size)
    pipe.denoise(x, schedule.timesteps[1], conditioning, scale_of(pipe, row)).square().mean().backward()
    reached = [parameter for parameter in network.parameters() if parameter.grad is not None and parameter.grad.any()]
    assert len(reached) > 0.8 * len(list(network.parameters()))


def test_samples_may_have_times_of_their_own(row, shared):
    """Each at its own level equals each alone: what training on a batch of timesteps needs."""
    size = shared.size_of({**shared.defaults, **row.call})
    conditioning, schedule = conditioning_of(shared, row), shared.schedule(3, size=size)
    x, told = shared.draw_noise(generators(), size), torch.tensor([schedule.timesteps[0], schedule.timesteps[-1]])
    with torch.no_grad():
        together = shared.denoise(x, told, conditioning, scale_of(shared, row))
        for i in range(2):
            alone = shared.denoise(x[i : i + 1], schedule.timesteps[-i], conditioning.rows([i]), scale_of(shared, row))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=10 * row.atol)


def test_training_levels_are_those_of_the_schedule(row, shared):
    """At the schedule's own timesteps; draws lie where the model was trained."""
    schedule = shared.schedule(3, size=shared.size_of({**shared.defaults, **row.call}))
    signal, noise = shared.levels(torch.tensor(schedule.timesteps[:-1]))
    torch.testing.assert_close(signal, torch.tensor(schedule.signal[:-2]), rtol=0, atol=2e-3)
    torch.testing.assert_close(noise, torch.tensor(schedule.noise[:-2]), rtol=0, atol=2e-3)
    assert shared.prediction == schedule.prediction
    drawn = shared.draw_timesteps(1000, torch.Generator().manual_seed(0))
    signal, noise = shared.levels(drawn)
    assert torch.isfinite(signal).all()
    assert 0 <= noise.min() < 0.2
    assert 0.9 < noise.max() <= 1


# ---- memory --------------------------------------------------------------------------------------------------------------------


def peak_bytes(run) -> int:
    """The most memory that `run` held at once beyond what was held before, in bytes, as the allocator saw it."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def test_gradient_checkpointing_gives_the_same_gradient_for_less_memory(row):
    pipe = row.pipeline(row.aligned_class())
    for parameter in getattr(pipe, pipe.denoiser).parameters():
        parameter.requires_grad_(False)
    size = pipe.size_of({**pipe.defaults, **row.call})
    conditioning, found, peaks = conditioning_of(pipe, row), [], []

    def run():
        own = generators()
        noise = pipe.draw_noise(own, size).requires_grad_()
        latents = pipe.noise_to_images(noise, conditioning, row.call, own, output_type="latent")
        found.append(torch.autograd.grad(latents.square().sum(), noise)[0])

    run()  # what the first call alone allocates
    for enable in (False, True):
        if enable:
            pipe.enable_gradient_checkpointing()
        peaks.append(peak_bytes(run))
    torch.testing.assert_close(found[1], found[2], rtol=1e-5, atol=1e-7)
    assert peaks[1] < peaks[0]
    pipe.disable_gradient_checkpointing()
    assert peak_bytes(run) > peaks[1]


# ---- methods and files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reno", "best-of-n"])
def test_a_search_runs_and_its_noise_makes_the_same_image_again(row, shared, method):
    reward = Brightness()
    plugin = diffalign.ReNO(reward, budget=3, starts=1) if method == "reno" else diffalign.BestOfN(reward, budget=3)
    out = shared(PROMPTS, seed=SEEDS, plugins=[plugin], output_type="np", **row.whole_call())
    assert [len(series) for series in out.trace.rewards["total"]] == [3, 3]
    assert all(series[best] == max(series) for series, best in zip(out.trace.rewards["total"], out.trace.best, strict=True))
    again = shared(PROMPTS, latents=out.noise, seed=out.seeds, output_type="np", **row.whole_call()).images
    np.testing.assert_allclose(values(again), values(out.images), rtol=0, atol=10 * row.atol)
    plain = shared(PROMPTS, seed=SEEDS, output_type="np", **row.whole_call()).images
    np.testing.assert_allclose(values(out.initial_images), values(plain), rtol=0, atol=10 * row.atol)


def test_adaptive_guidance_runs(row, shared):
    if not row.guided:
        pytest.skip("this preset is used without guidance, so there is nothing to save")
    method = diffalign.AdaptiveGuidance(threshold=-0.999, warm_up=0.0)  # stops as soon as it may
    out = shared(PROMPTS, seed=SEEDS, plugins=[method], output_type="np", **row.whole_call())
    assert out.guidance.method == "adaptive"
    assert out.guidance.evaluations == [out.guidance.steps + 1] * 2


@pytest.mark.parametrize("method", [diffalign.FKSteering, diffalign.SeedPruning, diffalign.Guide], ids=["fk", "prune", "guide"])
def test_particles_run_where_there_are_steps(row, shared, method):
    plugin, call = method(Brightness(), budget=3), {**row.whole_call(), "output_type": "np"}
    if shared.schedule(row.call.get("num_inference_steps"), **steps_of(row)).steps < 2:
        with pytest.raises(ValueError, match="this model takes one"):
            shared(PROMPTS, seed=SEEDS, plugins=[plugin], **call)
        return
    out = shared(PROMPTS, seed=SEEDS, plugins=[plugin], **call)
    assert out.noise is None
    assert all(series[best] == max(series) for series, best in zip(out.trace.rewards["total"], out.trace.best, strict=True))
    again = shared(PROMPTS, seed=SEEDS, plugins=[plugin], **call)
    assert np.array_equal(values(again.images), values(out.images))


def test_guide_switched_off_is_the_plain_call(row, shared):
    """To the bit what the pipeline makes inside a search, and what it makes without one but for the rounding of its output."""
    call = row.whole_call()
    if shared.schedule(row.call.get("num_inference_steps"), **steps_of(row)).steps < 2:
        pytest.skip("a one-step model cannot be steered")
    off = shared(PROMPTS, seed=SEEDS, plugins=[diffalign.Guide(Brightness(), budget=1, strength=0.0)], output_type="np", **call).images
    inside = shared(PROMPTS, seed=SEEDS, plugins=[diffalign.BestOfN(Brightness(), budget=1)], output_type="np", **call).images
    plain = shared(PROMPTS, seed=SEEDS, output_type="np", **call).images
    assert np.array_equal(values(off), values(inside))
    np.testing.assert_allclose(values(off), values(plain), rtol=0, atol=10 * row.atol)


def test_what_is_saved_loads_as_the_stock_pipeline(row, shared, tmp_path):
    shared.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **row.reload)
    loaded.set_progress_bar_config(disable=True)
    cls = row.aligned_class()
    assert type(loaded) is cls.stock_class
    theirs = getattr(loaded(PROMPTS[0], generator=generators([3])[0], output_type="np", **row.whole_call(1)), cls.output_field)
    # not to the bit: weights read from a file lie at other addresses, and vectorised sums follow the alignment
    ours = values(shared(PROMPTS[0], seed=3, output_type="np", **row.whole_call(1)).images)
    np.testing.assert_allclose(values(theirs), ours, rtol=0, atol=row.reload_atol)
    again = diffalign.load_pipeline(tmp_path)
    assert type(again) is cls
    third = values(again(PROMPTS[0], seed=3, output_type="np", **row.whole_call(1)).images)
    np.testing.assert_allclose(third, ours, rtol=0, atol=row.reload_atol)


# ---- images, prompts, mistakes -------------------------------------------------------------------------------------------------


def test_images_become_the_latents_that_decode_inverts(row, shared):
    """encode_images is the stock scaling around the encoder's mean: decoding twice as far off is twice as far off."""
    size = shared.size_of({**shared.defaults, **row.call})
    latents = torch.zeros(1, *shared.noise_shape(size))
    images = shared.decode(latents, size)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert images.shape[-2:] == (size.height, size.width)
    encoded = shared.encode_images(images)
    assert encoded.shape == latents.shape
    assert encoded.dtype == torch.float32
    assert torch.isfinite(encoded).all()


def test_what_no_encoder_reads_is_reported(row, shared, caplog):
    limit = shared.text_limit()
    long = "red " * (4 * limit)
    out = shared([long, PROMPTS[0]], seed=SEEDS, output_type="np", **row.whole_call())
    assert out.truncated[0]
    assert long.endswith(out.truncated[0])
    assert out.truncated[1] is None
    assert "longer than the model's" in caplog.text
    if "max_sequence_length" in shared.encode_arguments:
        fewer = {"max_sequence_length": limit // 2}
        half = shared([long], seed=[3], output_type="np", **{**row.whole_call(1), **fewer})
        assert shared.text_limit(fewer) <= limit
        assert len(half.truncated[0]) >= len(out.truncated[0])


def test_a_size_that_does_not_fit_is_refused(row, shared):
    with pytest.raises(ValueError, match="divisible by"):
        shared.size_of({**row.call, **row.exact, "height": 33, "width": 64})
    with pytest.raises(ValueError, match=r"noise must have shape"):
        shared.noise_to_images(torch.zeros(1, 3), conditioning_of(shared, row, PROMPTS[:1]), row.call)
    assert shared.noise_shape() == shared.noise_shape(shared.default_size())
    assert isinstance(shared.default_size(), Size)
