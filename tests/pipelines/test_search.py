"""A call with a noise method: what the method is given, what comes back, and that the pipeline is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pipelines.methods import Ascend, Dim, Redraw
from tests.tiny import ancestral_scheduler, tiny_stable_diffusion

PROMPTS = ["a red circle", "two blue squares"]
ONE = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "pt"}


def test_starts_at_the_plain_image_and_improves_it(pipe):
    plain = pipe(PROMPTS, seed=[3, 8], **ONE).images
    method, seen = Ascend(3), []
    out = pipe(PROMPTS, seed=[3, 8], plugins=[method], progress=lambda event: seen.append((event.index, event.scores["total"])), **ONE)
    assert torch.equal(out.initial_images, plain)
    assert (out.images.mean(dim=(1, 2, 3)) > plain.mean(dim=(1, 2, 3))).all()
    assert out.trace.method == "ascend"
    assert [i for i, _ in seen] == [0, 1, 2]
    assert out.seeds == list(method.problem.seeds) == [3, 8]
    assert list(method.problem.prompts) == PROMPTS
    assert out.noise.dtype == torch.float32
    assert not out.noise.requires_grad
    assert not out.images.requires_grad
    assert torch.equal(pipe(PROMPTS, seed=0, latents=out.noise, **ONE).images, out.images)


def test_goes_on_from_given_noise(pipe):
    first = pipe(PROMPTS, seed=0, plugins=[Ascend()], **ONE)
    second = pipe(PROMPTS, seed=0, latents=first.noise, plugins=[Ascend()], **ONE)
    assert torch.equal(second.initial_images, first.images)


def test_images_per_prompt_are_samples_of_their_own(pipe):
    method = Ascend()
    call = {**ONE, "guidance_scale": 2.0, "negative_prompt": ["dark", "pale"], "num_images_per_prompt": 2}
    out = pipe(PROMPTS, seed=5, plugins=[method], **call)
    assert list(method.problem.prompts) == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert list(method.problem.seeds) == [5, 6, 7, 8]
    assert torch.equal(out.initial_images, pipe(PROMPTS, seed=5, **call).images)


def test_batch_mates_do_not_matter(pipe):
    together = pipe(PROMPTS, seed=[3, 8], plugins=[Ascend()], **ONE)
    for i, seed in enumerate([3, 8]):
        alone = pipe(PROMPTS[i], seed=seed, plugins=[Ascend()], **ONE)
        torch.testing.assert_close(together.images[i : i + 1], alone.images, rtol=0, atol=2e-4)


def test_a_sampler_that_draws_noise_draws_the_same_each_time(pipe):
    pipe.scheduler = ancestral_scheduler()
    call = {**ONE, "num_inference_steps": 3}
    plain = pipe(PROMPTS, seed=[3, 8], **call).images
    out = pipe(PROMPTS, seed=[3, 8], plugins=[Ascend(2, lr=0.0)], **call)
    assert torch.equal(out.initial_images, plain)
    assert torch.equal(out.images, plain)


def test_candidates_of_one_sample_share_a_call(pipe):
    out = pipe(PROMPTS, seed=[3, 8], plugins=[Redraw()], **ONE)
    torch.testing.assert_close(out.initial_images, pipe(PROMPTS, seed=[3, 8], **ONE).images, rtol=0, atol=2e-5)
    torch.testing.assert_close(out.images, pipe(PROMPTS, seed=0, latents=out.noise, **ONE).images, rtol=0, atol=2e-5)


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_output_types_are_those_of_the_plain_call(pipe, output_type):
    call = {**ONE, "output_type": output_type}
    plain = pipe(PROMPTS, seed=3, **call).images
    out = pipe(PROMPTS, seed=3, plugins=[Ascend()], **call)
    assert type(out.images) is type(out.initial_images) is type(plain)
    for a, b in zip(out.initial_images, plain, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    images, nothing = pipe(PROMPTS, seed=3, plugins=[Ascend()], return_dict=False, **call)
    assert nothing is None
    assert len(images) == 2


def test_text_is_encoded_once(pipe):
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    pipe(PROMPTS, seed=0, num_images_per_prompt=2, plugins=[Ascend(4)], **ONE)
    assert len(calls) == 1  # without guidance, the prompts alone
    calls.clear()
    pipe(PROMPTS, seed=0, num_images_per_prompt=2, plugins=[Ascend(4)], **{**ONE, "guidance_scale": 2.0})
    assert len(calls) == 2  # the prompts, and the empty ones


def test_parameters_get_no_gradient_and_keep_their_flags(pipe):
    pipe.vae.requires_grad_(False)
    during = []
    method = Ascend()
    pipe(PROMPTS, seed=0, plugins=[method], progress=lambda *_: during.append(any(p.requires_grad for p in pipe.unet.parameters())), **ONE)
    assert during == [False, False]
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert not any(p.requires_grad for p in pipe.vae.parameters())
    assert all(p.grad is None for module in (pipe.unet, pipe.vae, pipe.text_encoder) for p in module.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_search_leaves_the_pipeline_usable(pipe, error):
    pipe.set_progress_bar_config(desc="mine", disable=True)
    scheduler, plain, step = pipe.scheduler, pipe(PROMPTS[0], seed=0, **ONE).images, Dim()

    def stop(*_):
        assert pipe.scheduler is not scheduler
        raise error("stop")

    with pytest.raises(error, match="stop"):
        pipe(PROMPTS[0], seed=0, plugins=[Ascend(), step], progress=stop, **ONE)
    assert pipe.scheduler is scheduler
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert torch.equal(pipe(PROMPTS[0], seed=0, **ONE).images, plain)


def test_inner_calls_draw_no_bars(pipe, capfd):
    pipe.set_progress_bar_config()
    pipe(PROMPTS[0], seed=0, plugins=[Ascend()], **ONE)
    assert "it/s" not in capfd.readouterr().err
    pipe(PROMPTS[0], seed=0, **ONE)
    assert "1/1" in capfd.readouterr().err


def test_works_under_no_grad_and_inference_mode(pipe):
    expected = pipe(PROMPTS[0], seed=0, plugins=[Ascend()], **ONE).images
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(pipe(PROMPTS[0], seed=0, plugins=[Ascend()], **ONE).images, expected)


def test_step_methods_act_inside_a_search(pipe):
    step = Dim()
    out = pipe(PROMPTS[0], seed=0, plugins=[step, Ascend(3)], **ONE)
    assert step.calls == 3
    assert torch.equal(out.initial_images, pipe(PROMPTS[0], seed=0, plugins=[Dim()], **ONE).images)


def test_half_precision():
    pipe = tiny_stable_diffusion(dtype=torch.bfloat16)
    out = pipe(PROMPTS, seed=3, plugins=[Ascend()], **ONE)
    assert torch.equal(out.initial_images, pipe(PROMPTS, seed=3, **ONE).images.float())
    assert out.noise.dtype == torch.float32
    assert torch.equal(pipe(PROMPTS, seed=3, latents=out.noise, **ONE).images.float(), out.images)


def test_what_a_search_cannot_honour_is_refused(pipe):
    with pytest.raises(ValueError, match="callback_on_step_end cannot be used with the search 'ascend'"):
        pipe(PROMPTS, plugins=[Ascend()], callback_on_step_end=lambda *_: {})
    with pytest.raises(ValueError, match="prompt_embeds cannot be used with a search"):
        pipe(plugins=[Ascend()], prompt_embeds=pipe.encode(PROMPTS).tensors["prompt_embeds"])
    with pytest.raises(ValueError, match="pass seed= instead of generator="):
        pipe(PROMPTS, plugins=[Ascend()], generator=torch.Generator())
    with pytest.raises(ValueError, match="output_type must be one of pil, np, pt, latent, got 'jpeg'"):
        pipe(PROMPTS, plugins=[Ascend()], output_type="jpeg")
    with pytest.raises(ValueError, match=r"latents must have shape \(2, 4, 16, 16\)"):
        pipe(PROMPTS, plugins=[Ascend()], latents=torch.zeros(1, 4, 16, 16))
    pipe.safety_checker = torch.nn.Identity()
    with pytest.raises(ValueError, match="safety_checker=None"):
        pipe(PROMPTS, plugins=[Ascend()])
