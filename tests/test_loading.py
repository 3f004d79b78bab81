"""load_pipeline: parts from elsewhere, schedulers, and what is arranged for memory and attention."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import diffalign
from diffalign.pipelines import memory, presets
from diffalign.pipelines.preset import Component


@pytest.fixture
def preset(tiny_folder, monkeypatch):
    """preset(**changes): adds a preset whose repository is the tiny folder, under the name "tiny"."""

    def add(**changes):
        row = replace(presets.PRESETS["sd-turbo"], name="tiny", source=str(tiny_folder), height=32, width=32, variant=None, **changes)
        monkeypatch.setitem(presets.PRESETS, "tiny", row)

    return add


def other_weights(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    return module


def test_a_part_from_a_folder(preset, tiny_folder, tmp_path):
    other_weights(AutoencoderKL.from_pretrained(tiny_folder, subfolder="vae")).save_pretrained(tmp_path / "fixed" / "vae")
    preset(components={"vae": Component(str(tmp_path / "fixed"), subfolder="vae")})
    pipe = diffalign.load_pipeline("tiny", device="cpu")
    plain = diffalign.load_pipeline(tiny_folder, device="cpu")
    assert torch.equal(pipe.vae.decoder.conv_in.weight, 0.5 * plain.vae.decoder.conv_in.weight)
    assert torch.equal(pipe.unet.conv_in.weight, plain.unet.conv_in.weight)


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_network_from_a_single_file(preset, tiny_folder, tmp_path, safetensors):
    """As Hyper-SD and DMD2 publish theirs: weights alone, for the network that SDXL's repository describes."""
    (weights,) = (tiny_folder / "unet").glob("*.safetensors")
    halved = {name: tensor.half() * 0.5 for name, tensor in load_file(weights).items()}
    name = "one_step.safetensors" if safetensors else "one_step.bin"
    (save_file if safetensors else torch.save)(halved, tmp_path / name)
    preset(components={"unet": Component(str(tmp_path), file=name, safetensors=safetensors)})
    pipe = diffalign.load_pipeline("tiny", device="cpu")
    assert pipe.unet.dtype == torch.float32
    assert not pipe.unet.training
    plain = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    torch.testing.assert_close(pipe.unet.conv_in.weight, 0.5 * plain.conv_in.weight, atol=1e-3, rtol=1e-2)


def test_a_file_for_another_network_is_refused(preset, tmp_path):
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "wrong.safetensors")
    preset(components={"unet": Component(str(tmp_path), file="wrong.safetensors")})
    with pytest.raises(OSError, match="could not load"):
        diffalign.load_pipeline("tiny", device="cpu")


def test_scheduler_settings_and_arguments(preset):
    preset(scheduler_config={"timestep_spacing": "leading"}, arguments={"eta": 0.5})
    pipe = diffalign.load_pipeline("tiny", device="cpu")
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert pipe.scheduler.config.timestep_spacing == "leading"
    assert pipe.defaults["eta"] == 0.5


# ---- memory and attention ----------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_and_a_sliced_decoder(tiny_folder):
    pipe = diffalign.load_pipeline(tiny_folder, device="cpu", gradient_checkpointing=True, sliced_decoder=True)
    assert pipe.unet.is_gradient_checkpointing
    assert pipe.vae.use_slicing
    plain = diffalign.load_pipeline(tiny_folder, device="cpu")
    assert not plain.unet.is_gradient_checkpointing
    call = {"num_inference_steps": 1, "seed": [0, 1], "output_type": "pt"}
    torch.testing.assert_close(pipe(["a", "b"], **call).images, plain(["a", "b"], **call).images)


def test_offloaded_text_encoders_encode_the_same_and_leave_gradients_alone(tiny_folder):
    """On a machine without accelerator the CPU plays both parts; what is tested is that nothing else is touched."""
    pipe, plain = (diffalign.load_pipeline(tiny_folder, device="cpu") for _ in range(2))
    memory.offload_text_encoders(pipe, torch.device("cpu"))
    assert memory.move(pipe, torch.device("cpu")) is pipe
    assert torch.equal(pipe.encode(["a"]).tensors["prompt_embeds"], plain.encode(["a"]).tensors["prompt_embeds"])
    assert next(pipe.text_encoder.parameters()).device.type == "meta"  # the weights wait elsewhere
    noise = pipe.draw_noise([torch.Generator().manual_seed(0)]).requires_grad_()
    images = pipe.noise_to_images(noise, pipe.encode(["a"]), {"num_inference_steps": 1})
    assert torch.autograd.grad(images.sum(), noise)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"attention": "flash"}, ValueError, "attention must be one of sdpa, xformers, got 'flash'"),
        ({"offload": "disk"}, ValueError, "offload must be one of text, all or None, got 'disk'"),
        ({"offload": "text", "device": "cpu"}, ValueError, "leave it out"),
    ],
)
def test_mistakes_are_named(tiny_folder, arguments, error, words):
    with pytest.raises(error, match=words):
        diffalign.load_pipeline(tiny_folder, **{"device": "cpu", **arguments})


def test_xformers_is_diffusers_own_switch_or_a_sentence(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ImportError, match=r"pip install 'diffalign\[xformers\]'"):
        diffalign.load_pipeline(tiny_folder, device="cpu", attention="xformers")
    switched = []
    monkeypatch.setitem(sys.modules, "xformers", sys.modules["math"])
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.enable_xformers_memory_efficient_attention", lambda pipeline: switched.append(pipeline)
    )
    pipe = diffalign.load_pipeline(tiny_folder, device="cpu", attention="xformers")
    assert switched == [pipe]
