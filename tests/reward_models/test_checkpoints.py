"""Damaged and missing files are named; unknown rewards get a suggestion."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import reward_models

FILES = {
    "shapes-clip": ("open_clip_config.json", "model.safetensors", "tokenizer.json"),
    "shapes-preference": ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"),
    "shapes-aesthetic": ("config.json", "head.safetensors"),
    "shapes-reward": ("config.json", "model.safetensors", "tokenizer.json"),
    "shapes-watch": ("config.json", "model.safetensors", "tokenizer.json"),
}
TRAINED = list(FILES)  # the other models have such tests of their own
MAIN = dict.fromkeys(FILES, "model.safetensors") | {"shapes-aesthetic": "head.safetensors"}


@pytest.fixture
def root(weights, tmp_path):
    """A copy of the checkpoints, to be damaged."""
    for name in TRAINED:
        shutil.copytree(weights / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("name", "near"), [("shape-clip", "shapes-clip"), ("shapes-preferences", "shapes-preference"), ("bright", "brightness")]
)
def test_unknown_names_get_a_suggestion(name, near):
    with pytest.raises(ValueError, match=f"unknown reward '{name}'; did you mean '{near}'"):
        reward_models.load(name)


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(ValueError, match="unknown reward 'qqqq'; rewards are shapes-clip, "):
        reward_models.load("qqqq")


def test_a_folder_for_a_reward_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'brightness' has no weights to load; leave source away"):
        reward_models.load("brightness", source=tmp_path)


@pytest.mark.parametrize("name", TRAINED)
def test_a_missing_folder_is_named(load, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}.* is missing; say where the model lies with source="):
        load(name, tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_missing_file_is_named(load, root, name, file):
    (root / name / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}/{file} is missing"):
        load(name, root)


def test_the_head_says_when_its_features_are_missing(load, root):
    shutil.rmtree(root / "shapes-clip")
    with pytest.raises(FileNotFoundError, match=r"shapes-clip/open_clip_config\.json is missing"):
        load("shapes-aesthetic", root)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("size", [0, 5, 200, -10])
def test_a_truncated_file_is_named(load, root, name, size):
    path = root / name / MAIN[name]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{name}/{MAIN[name]} is truncated or no safetensors file"):
        load(name, root)


def change(path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(load, root, name, value):
    path = root / name / MAIN[name]
    key = sorted(load_file(path))[0]
    change(path, lambda tensors: tensors[key].view(-1)[:1].fill_(value))
    with pytest.raises(ValueError, match=f"{name}/{MAIN[name]}: tensor '{key}' has values that are not finite"):
        load(name, root)


@pytest.mark.parametrize("name", TRAINED)
def test_every_tensor_is_accounted_for(load, root, name):
    path = root / name / MAIN[name]
    key = sorted(load_file(path))[0]
    change(path, lambda tensors: tensors.update({"stray": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"does not fit the model .* unexpected: stray"):
        load(name, root)
    change(path, lambda tensors: (tensors.pop("stray"), tensors.update({key: torch.zeros(1, 2, 3)})))
    with pytest.raises(ValueError, match=f"of another shape: {key}"):
        load(name, root)
    change(path, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"missing: {key}"):
        load(name, root)


@pytest.mark.parametrize("name", TRAINED)
def test_configurations_are_checked(load, root, name):
    path = root / name / FILES[name][0]
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=f"{path.name} is not valid JSON"):
        load(name, root)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=f"{path.name} must be a JSON object with the keys"):
        load(name, root)
    lacking = {key: value for key, value in whole.items() if key not in ("preprocess_cfg", "text_config", "width", "channels")}
    path.write_text(json.dumps(lacking))
    with pytest.raises(ValueError, match=r"with the keys .*(preprocess_cfg|text_config|width|channels)"):
        load(name, root)


def test_a_setting_open_clip_does_not_know_is_named(load, root):
    path = root / "shapes-clip" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["wdith"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"open_clip_config\.json does not describe an open_clip model .*wdith"):
        load("shapes-clip", root)


def test_a_head_of_another_width_is_refused(load, root):
    path = root / "shapes-aesthetic" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"width": 31}))
    with pytest.raises(ValueError, match="asks for 16 patches of width 31, but the features are 16 of 32"):
        load("shapes-aesthetic", root)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("resample", 2), ("size", {"height": 64, "width": 32}), ("size", {"shortest_edge": 64}), ("image_mean", None)],
)
def test_preprocessing_we_lack_is_refused(load, root, setting, value):
    path = root / "shapes-preference" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json describes a preprocessing we do not have"):
        load("shapes-preference", root)


def test_a_broken_tokenizer_is_named(load, root):
    (root / "shapes-clip" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer in .*shapes-clip cannot be read"):
        load("shapes-clip", root)


def test_the_packages_own_weights_say_how_to_train_them():
    from diffalign.reward_models.sources import Source

    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors is missing; train it with"):
        Source("shapes-clip", "model", "package:shapes/weights/shapes-clip").file("nothing.safetensors")


def test_parts_are_named(weights):
    with pytest.raises(ValueError, match="'shapes-clip' has no part 'head'; its parts are model"):
        reward_models.load("shapes-clip", source={"head": weights})
    with pytest.raises(TypeError, match="source must be a path"):
        reward_models.load("shapes-clip", source=3)
    reward = reward_models.load("shapes-clip", source={"model": weights / "shapes-clip"})
    assert reward.name == "shapes-clip"


def test_a_place_that_is_one_file_is_that_file(weights, tmp_path):
    from diffalign.reward_models.sources import Source

    file = shutil.copy(weights / "shapes-clip" / "model.safetensors", tmp_path / "other name.safetensors")
    assert Source("r", "model", file).file("model.safetensors", "model.bin") == tmp_path / "other name.safetensors"


def test_the_first_file_that_is_there_is_taken(weights):
    from diffalign.reward_models.sources import Source

    source = Source("r", "model", weights / "shapes-clip")
    assert source.file("absent.bin", "model.safetensors").name == "model.safetensors"
    assert source.find("absent.bin") is None


@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"state_dict": tensors, "epoch": 3}])
def test_torch_checkpoints_are_read_as_tensors_alone(tmp_path, wrap):
    from diffalign.reward_models.checkpoints import read_weights

    tensors = {"a": torch.ones(2, dtype=torch.float16), "b": torch.arange(3)}
    torch.save(wrap(tensors), tmp_path / "w.pt")
    read = read_weights(tmp_path / "w.pt")
    assert read["a"].dtype == torch.float32
    assert read["b"].dtype == torch.int64
    assert read_weights(tmp_path / "w.pt", None)["a"].dtype == torch.float16
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.pt is truncated"):
        read_weights(tmp_path / "cut.pt")
    torch.save({"a": print}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt is truncated or no checkpoint of tensors alone"):
        read_weights(tmp_path / "code.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "none.pt")


def test_sharded_checkpoints_are_read_whole(tmp_path):
    from diffalign.reward_models.checkpoints import read_weights

    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert set(read_weights(index)) == {"a", "b"}
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.safetensors, which model\.safetensors\.index\.json lists, is missing"):
        read_weights(index)


def test_what_a_model_does_not_need_must_be_named(tmp_path):
    from diffalign.reward_models.checkpoints import load_strict

    layer = torch.nn.Linear(2, 1)
    tensors = {name: torch.full_like(tensor, 3.0) for name, tensor in layer.state_dict().items()} | {"extra.scale": torch.ones(1)}
    with pytest.raises(ValueError, match=r"unexpected: extra\.scale"):
        load_strict(layer, tensors, tmp_path)
    load_strict(layer, tensors, tmp_path, unused=("extra.",))
    assert layer.weight.tolist() == [[3.0, 3.0]]


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    from diffalign.reward_models.sources import Source

    def fail(*args):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match=r"could not download w\.pt of org/name .no connection.; check the connection"):
        Source("r", "model", "org/name:w.pt").file("anything")
