"""Names become pipelines and rewards; whatever is wrong with a name, a folder or a file is said in one sentence that names it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffalign
from diffalign import loading
from diffalign.pipelines import presets
from diffalign.pipelines.families.stable_diffusion import AlignedStableDiffusionPipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def packaged(tiny_folder, monkeypatch):
    """The tiny folder in the place of both shapes models."""
    monkeypatch.setattr(loading, "_packaged_path", lambda preset: tiny_folder)


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def test_a_folder(folder):
    pipe = diffalign.load_pipeline(folder, device="cpu")
    assert type(pipe) is AlignedStableDiffusionPipeline
    assert pipe.dtype == torch.float32
    assert pipe.safety_checker is None
    assert not pipe.unet.training
    assert dict(pipe.defaults) == {}
    expected = AlignedStableDiffusionPipeline.from_pretrained(folder)("a circle", seed=0, num_inference_steps=1, output_type="pt").images
    images = diffalign.load_pipeline(str(folder))("a circle", seed=0, num_inference_steps=1, output_type="pt").images
    assert torch.equal(images.cpu(), expected)


def test_a_preset_brings_its_settings(packaged):
    pipe = diffalign.load_pipeline("shapes-turbo", device="cpu")
    assert dict(pipe.defaults) == {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 64, "width": 64}
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    assert pipe("a circle", seed=0).images[0].size == (64, 64)
    assert len(calls) == 1


def test_the_folder_of_a_preset_is_that_preset(packaged, tiny_folder):
    assert dict(diffalign.load_pipeline(tiny_folder, device="cpu").defaults) == presets.PRESETS["shapes"].defaults()


def test_dtype(folder):
    assert diffalign.load_pipeline(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert diffalign.load_pipeline(folder, device="cpu", dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got 'int8'"):
        diffalign.load_pipeline(folder, device="cpu", dtype="int8")
    assert loading._dtype(None, torch.device("cpu"), None) == torch.float32
    assert loading._dtype(None, torch.device("cuda"), None) == torch.float16
    assert loading._dtype(None, torch.device("cuda"), presets.PRESETS["flux-schnell"]) == torch.bfloat16
    assert loading._dtype(None, torch.device("cuda"), presets.PRESETS["shapes"]) == torch.float32


def test_half_precision_files_load_under_their_variant_name(folder):
    for name in ("unet", "vae", "text_encoder"):
        (file,) = (folder / name).glob("*.safetensors")
        half = {key: tensor.half() for key, tensor in load_file(file).items()}
        save_file(half, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
        file.unlink()
    pipe = diffalign.load_pipeline(folder, device="cpu")
    assert pipe.dtype == torch.float32
    assert torch.isfinite(pipe("a circle", seed=0, num_inference_steps=1, output_type="pt").images).all()


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="there is a device cuda:7 here")
def test_devices():
    for device, message in (("cuda:7", "device 'cuda:7' is not there"), ("gpu", "device must be 'cpu', 'cuda'")):
        with pytest.raises(ValueError, match=message):
            diffalign.load_pipeline("shapes", device=device)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("shapes-trubo", ValueError, r"unknown pipeline 'shapes-trubo'; did you mean 'shapes-turbo'\?"),
        ("./no/such", FileNotFoundError, "there is no folder no/such"),
        ("a/b/c", FileNotFoundError, "there is no folder a/b/c"),
        (Path("nowhere"), FileNotFoundError, "there is no folder nowhere"),
        ("", TypeError, "name must be a preset, a Hub id or a folder, got ''"),
        (None, TypeError, "got None"),
        ("bad name!", ValueError, "unknown pipeline 'bad name!'"),
    ],
)
def test_bad_names(name, error, message):
    with pytest.raises(error, match=message) as caught:
        diffalign.load_pipeline(name, device="cpu")
    one_sentence(caught)


@pytest.mark.parametrize("name", ["someone/no-such-model", "sd-turbo"])
def test_a_hub_that_cannot_be_reached(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_OFFLINE", True, raising=False)
    with pytest.raises(OSError, match=r"could not load '.*' from the Hugging Face Hub") as caught:
        diffalign.load_pipeline(name, device="cpu")
    assert "give a local folder" in one_sentence(caught)


def test_weights_not_trained_yet(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "_packaged_path", lambda preset: tmp_path / preset.name)
    with pytest.raises(
        FileNotFoundError, match=r"the weights of 'shapes' are not at .*; make them with `python -m diffalign.shapes.train`"
    ):
        diffalign.load_pipeline("shapes", device="cpu")


def damage_index(folder):
    (folder / "model_index.json").unlink()


def damage_index_text(folder):
    (folder / "model_index.json").write_text("{")


def damage_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KolorsPipeline"}))


def damage_component(folder):
    shutil.rmtree(folder / "vae")


def damage_missing_weights(folder):
    (folder / UNET).unlink()


def damage_pickle(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")


def damage_truncate(folder):
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[: len(content) // 2])


def damage_empty(folder):
    (folder / UNET).write_bytes(b"")


def damage_lfs(folder):
    (folder / UNET).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def damage_nan(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(tensors, folder / UNET, {"format": "pt"})


def damage_inf(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_out.bias"][0] = -torch.inf
    save_file(tensors, folder / UNET, {"format": "pt"})


def damage_tensor_missing(folder):
    tensors = load_file(folder / UNET)
    del tensors["conv_out.bias"]
    save_file(tensors, folder / UNET, {"format": "pt"})


def damage_shape(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_out.bias"] = torch.zeros(7)
    save_file(tensors, folder / UNET, {"format": "pt"})


def damage_config(folder):
    (folder / "unet" / "config.json").unlink()


def damage_shard(folder):
    (folder / UNET).unlink()
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_index, FileNotFoundError, "model is not a pipeline in diffusers layout: it has no model_index.json"),
        (damage_index_text, ValueError, "model/model_index.json is not valid JSON"),
        (damage_class, ValueError, r"is a KolorsPipeline, which is not supported; supported are StableDiffusionPipeline"),
        (damage_component, FileNotFoundError, "has no folder vae, which its model_index.json lists"),
        (damage_missing_weights, FileNotFoundError, r"model/unet holds no weight file \(\*.safetensors\)$"),
        (damage_pickle, FileNotFoundError, "diffusion_pytorch_model.bin is not read, because it can run code"),
        (damage_truncate, ValueError, f"{UNET} is damaged or cut short"),
        (damage_empty, ValueError, f"{UNET} is damaged or cut short"),
        (damage_lfs, ValueError, f"{UNET} is a git-lfs pointer"),
        (damage_nan, ValueError, f"{UNET} are not finite, first in conv_in.weight, read as float32"),
        (damage_inf, ValueError, f"{UNET} are not finite, first in conv_out.bias"),
        (damage_tensor_missing, ValueError, f"({UNET} lacks conv_out.bias of|could not load the pipeline in)"),
        (damage_shape, ValueError, "could not load the pipeline in .*model"),
        (damage_config, ValueError, "could not load the pipeline in .*model"),
        (damage_shard, FileNotFoundError, "00001-of-00002.safetensors is missing; diffusion_pytorch_model.safetensors.index.json lists it"),
    ],
    ids=lambda value: value.__name__.removeprefix("damage_") if callable(value) and hasattr(value, "__name__") else "",
)
def test_damaged_folders(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        diffalign.load_pipeline(folder, device="cpu")
    assert str(folder) in one_sentence(caught)


@pytest.mark.parametrize("saved", [{}, {"variant": "fp16", "max_shard_size": "20KB"}])  # the rest is test_integrity.py's
def test_a_folder_with_t5_whose_embeddings_are_stored_once(tmp_path, saved):
    """SD3's third text encoder ties `encoder.embed_tokens` to `shared`: whole folders load, and a tensor less is named."""
    from diffusers import StableDiffusion3Pipeline

    from tests.families import tiny_sd3

    dtype = torch.float16 if "variant" in saved else torch.float32
    tiny_sd3.build()(StableDiffusion3Pipeline, dtype).save_pretrained(tmp_path, **saved)
    pipe = diffalign.load_pipeline(tmp_path, device="cpu")
    files = sorted((tmp_path / "text_encoder_3").glob("*.safetensors"))
    assert (len(files) > 1) == ("max_shard_size" in saved)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert "encoder.embed_tokens.weight" not in stored
    assert torch.equal(pipe.text_encoder_3.encoder.embed_tokens.weight, stored["shared.weight"].float())
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    for file in files:
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"text_encoder_3/model.* lacks {name} of"):
        diffalign.load_pipeline(tmp_path, device="cpu")


def test_a_preset_can_replace_the_scheduler(pipe):
    from dataclasses import replace

    preset = replace(presets.PRESETS["sd-turbo"], scheduler="LCMScheduler")
    assert type(loading._finish(pipe, preset).scheduler).__name__ == "LCMScheduler"


def test_rewards():
    reward = diffalign.load_reward({"brightness": 2.0, "jpeg-compressibility": 0.5}, device="cpu")
    images = torch.full((2, 3, 8, 8), 0.25)
    scores = reward(images, ["a", "b"])
    torch.testing.assert_close(scores.total, 2 * scores.parts["brightness"] + 0.5 * scores.parts["jpeg-compressibility"])
    assert not reward.differentiable
    single = diffalign.load_reward("brightness", watch=["jpeg-compressibility"], device="cpu")
    assert single.differentiable
    assert set(single(images, ["a", "b"]).watched) == {"jpeg-compressibility"}


@pytest.mark.parametrize(
    ("spec", "watch", "error", "message"),
    [
        ("brightnes", (), ValueError, r"unknown reward 'brightnes'; did you mean 'brightness'\?"),
        ("brightness", ["jpg-compressibility"], ValueError, "unknown reward 'jpg-compressibility'; did you mean 'jpeg-"),
        ({}, (), ValueError, "spec is empty"),
        (["brightness"], (), TypeError, "spec must be a reward's name or a mapping from names to weights, got list"),
        ({"brightness": 0.0}, (), ValueError, "the weight of reward 'brightness' must be finite and not zero"),
        ({"brightness": float("nan")}, (), ValueError, "the weight of reward 'brightness' must be finite"),
        ({"brightness": "1"}, (), TypeError, "the weight of reward 'brightness' must be a number"),
        ("brightness", "brightness", TypeError, r"watch must be a list of reward names.*write watch=\['brightness'\]"),
        ("brightness", ["brightness"], ValueError, "'brightness', which is a member already"),
    ],
)
def test_bad_rewards(spec, watch, error, message):
    with pytest.raises(error, match=message) as caught:
        diffalign.load_reward(spec, watch=watch, device="cpu")
    one_sentence(caught)


def test_the_public_names_are_lazy():
    heavy = "'torch' in sys.modules"
    code = f"import sys, diffalign; print(diffalign.__version__, {heavy}, diffalign.load_pipeline.__name__, {heavy})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+ False load_pipeline False\n", output)
    assert {"__version__", "load_pipeline", "load_reward", "ReNO", "BestOfN", "RewardMix"} <= set(diffalign.__all__)
    assert set(diffalign.__all__) <= set(dir(diffalign))
    assert diffalign.ReNO.__name__ == "ReNO"
    assert diffalign.BestOfN.__name__ == "BestOfN"
    assert diffalign.RewardMix.__name__ == "RewardMix"
    with pytest.raises(AttributeError, match="module 'diffalign' has no attribute 'Reno'; it has __version__, load_pipeline"):
        diffalign.Reno  # noqa: B018
