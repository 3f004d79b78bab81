"""Folders of real T5 and UMT5 encoders, whose tied embeddings are stored once: whole ones pass, and a missing tensor is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, UMT5Config, UMT5EncoderModel

from diffalign.pipelines import integrity

SIZES = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
ENCODERS = {"T5EncoderModel": (T5EncoderModel, T5Config), "UMT5EncoderModel": (UMT5EncoderModel, UMT5Config)}
LAST = "encoder.final_layer_norm.weight"
DEEP = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.fixture(params=ENCODERS)
def encoder(request):
    model, config = ENCODERS[request.param]
    torch.manual_seed(0)
    return model(config(**SIZES))


def pipeline_folder(root: Path, **components: str) -> Path:
    index = {"_class_name": "StableDiffusion3Pipeline", **{name: ["transformers", cls] for name, cls in components.items()}}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def drop(folder: Path, *names: str) -> None:
    """Takes tensors out of the file that holds each of them; an index, where there is one, no longer lists them."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor for name, tensor in tensors.items() if name not in names}, file, {"format": "pt"})
    for path in folder.glob("*.index*.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in names}
        path.write_text(json.dumps(index))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [False, True])
def test_tied_embeddings_stored_once_are_whole_and_a_missing_tensor_is_named(encoder, tmp_path, shards, variant):
    folder = tmp_path / "text_encoder_3"
    kept = encoder.half() if variant else encoder
    kept.save_pretrained(folder, variant=variant, max_shard_size="2KB" if shards else "5GB")
    pipeline_folder(tmp_path, text_encoder_3=type(encoder).__name__)
    files = integrity.check_files(tmp_path)["text_encoder_3"]
    assert (len(files) > 1) == shards
    assert {integrity.variant(file) for file in files} == {variant}

    def load():
        return type(encoder).from_pretrained(folder, variant=variant, local_files_only=True)

    integrity.require_complete(load(), files)
    stored = {name for file in files for name in load_file(file)}
    assert len(stored) == len(encoder.state_dict()) - 1  # which is why counting will not do
    drop(folder, DEEP)
    with pytest.raises(ValueError, match=rf"lacks {DEEP} of {len(stored)}; it is incomplete"):
        integrity.require_complete(load(), files)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_either_name_of_a_tied_tensor_serves_and_none_does_not(encoder, tmp_path, name):
    file = tmp_path / "model.safetensors"
    tensors = {
        key: tensor.clone() for key, tensor in encoder.state_dict().items() if key not in ("shared.weight", "encoder.embed_tokens.weight")
    }
    embedding = encoder.shared.weight.detach().clone()
    save_file({**tensors, name: embedding}, file, {"format": "pt"})
    integrity.require_complete(encoder, [file])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks shared\.weight of"):
        integrity.require_complete(encoder, [file])


def test_both_names_of_a_tied_tensor_do_not_make_up_for_another(encoder, tmp_path):
    """As many tensors as a count would ask for, and yet one is missing."""
    file = tmp_path / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    save_file(tensors, file, {"format": "pt"})
    integrity.require_complete(encoder, [file])
    del tensors[LAST]
    save_file({**tensors, "unused.weight": torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {LAST}"):
        integrity.require_complete(encoder, [file])


def test_the_encoder_of_a_whole_t5_is_whole_and_the_decoder_lends_it_nothing(tmp_path):
    T5ForConditionalGeneration(T5Config(**SIZES)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    integrity.require_complete(T5EncoderModel.from_pretrained(tmp_path), [file])
    drop(tmp_path, DEEP)
    assert DEEP.replace("encoder", "decoder") in load_file(file)
    with pytest.raises(ValueError, match=f"lacks {DEEP}"):
        integrity.require_complete(T5EncoderModel.from_pretrained(tmp_path), [file])


def test_other_names_of_the_same_tensors(tmp_path):
    """A prefix more or less, and diffusers' older names, which sit below the same module."""
    file = tmp_path / "model.safetensors"
    model = nn.ModuleDict({"mid": nn.ModuleDict({"to_q": nn.Linear(3, 3), "to_k": nn.Linear(3, 3)}), "out": nn.Linear(3, 2)})
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({f"text_model.{name}": tensor for name, tensor in own.items()}, file, {"format": "pt"})
    integrity.require_complete(model, [file])
    integrity.require_complete(nn.ModuleDict({"text_model": model}), [file])
    save_file(own, file, {"format": "pt"})
    integrity.require_complete(nn.ModuleDict({"text_model": model}), [file])
    older = {name.replace("to_q", "query").replace("to_k", "key"): tensor for name, tensor in own.items()}
    save_file(older, file, {"format": "pt"})
    integrity.require_complete(model, [file])
    del older["mid.key.bias"]
    save_file(older, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks mid\.to_k\.bias of 6"):
        integrity.require_complete(model, [file])


def test_weights_that_are_not_in_memory(tmp_path):
    """On the meta device every tensor lies at address 0; only those that are one object are tied."""
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**SIZES))
        encoder.encoder.embed_tokens.weight = encoder.shared.weight
    real = T5EncoderModel(T5Config(**SIZES))
    real.save_pretrained(tmp_path)
    integrity.require_complete(encoder, [tmp_path / "model.safetensors"])
    drop(tmp_path, LAST)
    with pytest.raises(ValueError, match=f"lacks {LAST}"):
        integrity.require_complete(encoder, [tmp_path / "model.safetensors"])


def test_of_two_variants_the_whole_one_is_read_and_the_plain_one_first(encoder, tmp_path):
    """Partial downloads bring the index of a variant without its files."""
    folder = tmp_path / "text_encoder"
    encoder.save_pretrained(folder, max_shard_size="2KB")
    encoder.save_pretrained(folder, variant="fp16", max_shard_size="2KB")
    pipeline_folder(tmp_path, text_encoder=type(encoder).__name__)

    def found() -> set[str | None]:
        return {integrity.variant(file) for file in integrity.check_files(tmp_path)["text_encoder"]}

    assert found() == {None}
    half, plain = sorted(folder.glob("*.fp16-*.safetensors")), sorted(folder.glob("model-*.safetensors"))
    moved = half[0].rename(tmp_path / "aside")
    assert found() == {None}
    plain[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-.* is missing; model\.safetensors\.index\.json lists it"):
        found()
    moved.rename(half[0])
    assert found() == {"fp16"}
