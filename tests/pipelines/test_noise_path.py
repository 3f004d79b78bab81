"""The differentiable way from noise to images: equal to the plain call, batch-independent, and with true gradients."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from diffalign.backbone import Size
from tests.tiny import ancestral_scheduler, tiny_scheduler, tiny_stable_diffusion

PROMPTS = ["a red circle", "two blue squares"]
SETTINGS = {
    "one step": (tiny_scheduler(prediction_type="sample"), {"num_inference_steps": 1, "guidance_scale": 0.0}),
    "guided": (tiny_scheduler(), {"num_inference_steps": 3, "guidance_scale": 4.0}),
    "velocity": (tiny_scheduler(prediction_type="v_prediction"), {"num_inference_steps": 2, "guidance_scale": 4.0}),
    "ancestral": (ancestral_scheduler(), {"num_inference_steps": 3, "guidance_scale": 0.0}),
}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(params=SETTINGS)
def setting(request, pipe):
    pipe.scheduler, arguments = SETTINGS[request.param]
    return pipe, arguments


def test_equals_the_plain_call_and_differentiates(setting):
    pipe, arguments = setting
    plain = pipe(PROMPTS, seed=[3, 8], output_type="pt", **arguments).images
    own = generators(3, 8)
    noise = pipe.draw_noise(own).requires_grad_()
    images = pipe.noise_to_images(noise, pipe.encode(PROMPTS), arguments, own)
    assert torch.equal(images.detach(), plain)
    (gradient,) = torch.autograd.grad(images.square().sum(), noise)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_a_batch_equals_its_singles(setting):
    pipe, arguments = setting
    conditioning = pipe.encode(PROMPTS, ["dark", ""])
    noise = pipe.draw_noise(generators(3, 8))
    together = pipe.noise_to_images(noise, conditioning, arguments, generators(1, 2))
    for i in range(2):
        alone = pipe.noise_to_images(noise[i : i + 1], conditioning.rows([i]), arguments, generators(1 + i))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)
    assert not torch.allclose(together[0], together[1])


def test_the_gradient_is_the_derivative(pipe):
    """Directional derivative by central differences, in double precision but for the final cast of the images."""
    pipe = tiny_stable_diffusion(dtype=torch.float64)
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0}
    conditioning = pipe.encode(PROMPTS[:1])
    noise = pipe.draw_noise(generators(0)).double().requires_grad_()
    weights = torch.randn(pipe.noise_to_images(noise, conditioning, arguments).shape, generator=torch.Generator().manual_seed(1))

    def value(at):
        return (pipe.noise_to_images(at, conditioning, arguments) * weights).double().sum()

    (gradient,) = torch.autograd.grad(value(noise), noise)
    direction = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-3
    with torch.no_grad():
        difference = (value(noise + step * direction) - value(noise - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-2, atol=1e-2)


def test_bfloat16_gradient_is_finite_and_points_the_same_way():
    single, half = tiny_stable_diffusion(), tiny_stable_diffusion(dtype=torch.bfloat16)
    gradients = []
    for pipe in (single, half):
        noise = pipe.draw_noise(generators(0, 1)).requires_grad_()
        images = pipe.noise_to_images(noise, pipe.encode(PROMPTS), {"num_inference_steps": 2})
        assert images.dtype == torch.float32
        (gradient,) = torch.autograd.grad(images.sum(), noise)
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()
        gradients.append(gradient.flatten(1))
    assert (torch.cosine_similarity(*gradients) > 0.9).all()


def test_images_stay_in_range_and_saturated_pixels_pass_no_gradient(pipe):
    latents = 100 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = pipe.decode(latents)
    assert images.min() >= 0
    assert images.max() <= 1
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(9.0)  # every pixel far above 1
    latents.requires_grad_()
    (gradient,) = torch.autograd.grad(pipe.decode(latents).sum(), latents)
    assert gradient.abs().max() == 0


def test_encode(pipe):
    conditioning = pipe.encode(PROMPTS)
    assert len(conditioning) == 2
    assert not any(tensor.requires_grad for tensor in conditioning.tensors.values())
    twice = conditioning.rows([1, 1, 0])
    assert twice.prompts == (PROMPTS[1], PROMPTS[1], PROMPTS[0])
    assert torch.equal(twice.tensors["prompt_embeds"][2], conditioning.tensors["prompt_embeds"][0])
    one = pipe.encode(PROMPTS, "dark").tensors["negative_prompt_embeds"]
    assert torch.equal(one, pipe.encode(PROMPTS, ["dark", "dark"]).tensors["negative_prompt_embeds"])
    with pytest.raises(IndexError, match=r"rows must lie in 0\.\.1"):
        conditioning.rows([2])
    with pytest.raises(ValueError, match="negative_prompt has 1 entries for 2 samples"):
        pipe.encode(PROMPTS, ["dark"])
    with pytest.raises(ValueError, match="clip_skip=1"):
        pipe.encode(PROMPTS, clip_skip=1)


def test_noise_shape(pipe):
    assert pipe.noise_shape() == (4, 16, 16)
    assert pipe.noise_shape(Size(64, 32)) == (4, 32, 16)
    with pytest.raises(ValueError, match="divisible by 8, got 30 and 32"):
        pipe.size_of({"height": 30, "width": 32})


def test_bad_arguments_are_named(pipe):
    conditioning = pipe.encode(PROMPTS)
    noise = pipe.draw_noise(generators(0, 1))
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 4, 16, 16\).*got \(1, 4, 16, 16\)"):
        pipe.noise_to_images(noise[:1], conditioning)
    with pytest.raises(ValueError, match="callback_on_step_end cannot be used with noise_to_images"):
        pipe.noise_to_images(noise, conditioning, {"callback_on_step_end": print})


def test_offloaded_weights_refuse_a_gradient(pipe):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.unet, ModelHook())
    conditioning, noise = pipe.encode(PROMPTS[:1]), pipe.draw_noise(generators(0))
    pipe.noise_to_images(noise, conditioning, {"num_inference_steps": 1})
    with pytest.raises(RuntimeError, match="CPU offloading"):
        pipe.noise_to_images(noise.requires_grad_(), conditioning, {"num_inference_steps": 1})


def test_annotated_shapes_are_checked_while_testing(pipe):
    with pytest.raises(jaxtyping.TypeCheckError, match="latents"):
        pipe.decode(torch.zeros(4, 16, 16))
