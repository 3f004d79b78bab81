"""Checkpoints of the CLIP family: what is damaged, missing, left over or of another model is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import reward_models
from tests.reward_models import tiny_clips
from tests.reward_models.conftest import PROMPTS

FILES = {  # every file that is read, the weights first
    "clip-l14": ("open_clip_model.safetensors", "open_clip_config.json"),
    "clip-h14": ("open_clip_model.safetensors", "open_clip_config.json"),
    "clip-bigg14": ("open_clip_pytorch_model.bin", "open_clip_config.json"),
    "pickscore": ("model.safetensors", "config.json"),
    "hpsv2": ("HPS_v2_compressed.pt",),
    "hpsv2.1": ("HPS_v2.1_compressed.pt",),
    "laion-aesthetic-v2": (
        "encoder/model.safetensors",
        "encoder/config.json",
        "encoder/preprocessor_config.json",
        "head/sac+logos+ava1-l14-linearMSE.pth",
    ),
    "aesthetic-v2.5": ("encoder/model.safetensors", "encoder/config.json", "head/aesthetic_predictor_v2_5.pth"),
    "mps": ("model.safetensors",),
}
KEYS = {  # a tensor of each kind of layer, under its published name
    "clip-l14": ("visual.conv1.weight", "transformer.resblocks.1.attn.in_proj_weight", "text_projection"),
    "clip-h14": ("visual.proj", "token_embedding.weight", "logit_scale"),
    "clip-bigg14": ("visual.ln_post.bias", "positional_embedding"),
    "pickscore": ("vision_model.pre_layrnorm.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight", "logit_scale"),
    "hpsv2": ("visual.class_embedding", "transformer.resblocks.0.mlp.c_fc.weight"),
    "hpsv2.1": ("visual.transformer.resblocks.1.ln_2.weight", "ln_final.weight"),
    "laion-aesthetic-v2": ("vision_model.embeddings.class_embedding", "visual_projection.weight"),
    "aesthetic-v2.5": ("vision_model.head.probe", "vision_model.encoder.layers.1.mlp.fc2.bias"),
    "mps": (
        "mps.model.visual_projection.weight",
        "mps.cross_model.layers.0.0.fn.to_kv.weight",
        "mps.cross_model.layers.3.1.fn.ff_out.1.weight",
        "mps.cross_model.layers.2.1.fn.norm.bias",
    ),
}


@pytest.fixture
def copy(weights, tmp_path):
    """copy(name): the root that holds a copy of one checkpoint, to be damaged."""

    def made(name: str) -> Path:
        shutil.copytree(weights / name, tmp_path / name)
        return tmp_path

    return made


def change(path: Path, edit) -> None:
    """Apply `edit` to the tensors of a file of any format."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)
        return
    content = torch.load(path, weights_only=True)
    edit(content.get("state_dict", content))
    torch.save(content, path)


def test_every_layout_is_tested():
    assert set(FILES) == set(KEYS) == set(tiny_clips.WRITERS)


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_missing_file_is_named(load, copy, name, file):
    root = copy(name)
    (root / name / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"reward '{name}': .*{Path(file).name.replace('+', '.')}.* is missing; say where"):
        load(name, root)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(load, copy, name):
    root = copy(name)
    path = root / name / FILES[name][0]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{path.name} is truncated"):
        load(name, root)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_every_tensor_is_accounted_for(load, copy, name, key):
    root = copy(name)
    path = root / name / FILES[name][0]
    change(path, lambda tensors: tensors.update({"stray.weight": torch.zeros(1), key: torch.zeros(1, 2, 3)}))
    with pytest.raises(ValueError, match=rf"{path.name} does not fit .* unexpected: stray\.weight; of another shape: {key}$"):
        load(name, root)
    change(path, lambda tensors: (tensors.pop("stray.weight"), tensors.pop(key)))
    with pytest.raises(ValueError, match=f"missing: {key}$"):
        load(name, root)


@pytest.mark.parametrize(("name", "prefix"), [("laion-aesthetic-v2", "layers"), ("aesthetic-v2.5", "scoring_head")])
def test_layers_of_a_head_are_accounted_for(load, copy, name, prefix):
    root = copy(name)
    path = root / name / FILES[name][-1]
    change(path, lambda tensors: tensors.update({f"{prefix}.9.weight": tensors.pop(f"{prefix}.2.weight")}))
    with pytest.raises(ValueError, match=rf"missing: {prefix}\.2\.weight; unexpected: {prefix}\.9\.weight"):
        load(name, root)


def test_the_head_of_another_encoder_is_refused(load, copy, weights):
    """The layers of the ReLU variant lie at other places, those of SigLIP's take features of another width."""
    siglip = torch.load(weights / "aesthetic-v2.5" / "head" / "aesthetic_predictor_v2_5.pth", weights_only=True)
    root = copy("laion-aesthetic-v2")
    path = root / "laion-aesthetic-v2" / FILES["laion-aesthetic-v2"][-1]
    renamed = {key.replace("scoring_head.8", "scoring_head.7").replace("scoring_head", "layers"): t for key, t in siglip.items()}
    torch.save(renamed, path)
    with pytest.raises(ValueError, match=r"of another shape: layers\.0\.weight"):
        load("laion-aesthetic-v2", root)
    torch.save({f"layers.{place}.weight": torch.zeros(1) for place in (0, 3, 6, 9, 11)}, path)
    with pytest.raises(ValueError, match=r"missing: .*layers\.2\.weight.* unexpected: layers\.3\.weight, layers\.9\.weight"):
        load("laion-aesthetic-v2", root)


@pytest.mark.parametrize("name", ["hpsv2", "mps"])
def test_a_checkpoint_of_another_architecture_is_refused(weights, name):
    """Without the tests' own row the table's ViT-H-14 holds, and no smaller model passes for it."""
    with pytest.raises(ValueError, match=r"does not fit the model its configuration describes; missing: .*(resblocks|layers)"):
        reward_models.load(name, source=weights / name)


def test_clips_own_vocabulary_is_needed(weights, tmp_path):
    folder = shutil.copytree(weights / "shapes-clip", tmp_path / "shapes")
    (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"open_clip_config\.json: the model reads 32 tokens out of \d+; CLIP's own 77 out of 49408 are"):
        reward_models.load("clip-l14", source=folder)
    with pytest.raises(ValueError, match=r"config\.json: the model reads 32 tokens"):
        reward_models.load("pickscore", source=weights / "shapes-preference")


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_hps_from_one_file_with_any_name(load, copy, images, name):
    root = copy(name)
    before = load(name)(images, PROMPTS)
    (root / name / FILES[name][0]).rename(root / name / "mine.pt")
    with pytest.raises(FileNotFoundError, match=r"compressed\.pt is missing"):
        load(name, root)
    (root / "single").mkdir()
    (root / name / "mine.pt").rename(root / "single" / name)
    assert torch.equal(load(name, root / "single")(images, PROMPTS), before)


def test_a_transformers_folder_in_shards(tmp_path, load, images):
    """bigG/14's weights are too large for one file in that layout."""
    tiny_clips.write_transformers(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, members in shards.items():
        torch.save({name: tensors[name] for name in members}, tmp_path / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    sharded = reward_models.load("clip-h14", source=tmp_path)
    torch.testing.assert_close(sharded(images, PROMPTS), load("clip-h14")(images, PROMPTS), atol=1e-3, rtol=1e-5)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        reward_models.load("clip-h14", source=tmp_path)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("interpolation", "bilinear", "interpolation must be bicubic"),
        ("size", [28, 56], "size must be square"),
        ("resize_mode", "sideways", "sideways"),
    ],
)
def test_a_preprocessing_of_open_clips_that_we_lack_is_refused(load, copy, setting, value, message):
    root = copy("clip-h14")
    path = root / "clip-h14" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"][setting] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"open_clip_config.json does not describe an open_clip model .*{message}"):
        load("clip-h14", root)


def test_an_architecture_open_clip_does_not_have():
    from diffalign.reward_models.clip_files import clip_config

    with pytest.raises(ValueError, match="open_clip has no architecture 'ViT-Z-1'"):
        clip_config("ViT-Z-1")


@pytest.mark.parametrize(("architecture", "millions"), [("ViT-H-14", 986.1), ("ViT-L-14-quickgelu", 427.6), ("ViT-bigG-14", 2539.6)])
def test_configurations_without_a_file_have_the_published_sizes(architecture, millions):
    """Parameters of the models on the Hub, and the settings that no tensor's shape tells."""
    from transformers import CLIPModel

    from diffalign.reward_models.checkpoints import without_weights
    from diffalign.reward_models.clip_files import clip_config

    config = clip_config(architecture)
    model = without_weights(lambda: CLIPModel(config))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert config.vision_config.num_attention_heads == 16
    assert config.vision_config.hidden_act == ("quick_gelu" if "quickgelu" in architecture else "gelu")


@pytest.mark.parametrize("name", tiny_clips.WRITERS)
def test_memory_in_the_table_is_that_of_the_weights(name):
    """4 bytes for each of the published numbers of parameters."""
    vision = {"clip-l14": 304.0, "laion-aesthetic-v2": 304.0, "clip-bigg14": 1844.9, "aesthetic-v2.5": 428.2}.get(name, 632.1)
    text = {"clip-l14": 123.7, "laion-aesthetic-v2": 0, "clip-bigg14": 694.7, "aesthetic-v2.5": 0}.get(name, 354.0)
    cross = 4 * (2 * (1024 * 1024 + 2 * 64 * 1024 + 1024 * 1024 + 1024 * 8192 + 4096 * 1024)) / 1e6 if name == "mps" else 0
    assert reward_models.SPECS[name].memory == pytest.approx((vision + text + cross) * 4 / 1000, abs=0.01)


# ---- places on the Hub, and addresses --------------------------------------------------------------------------------------------


def kept_from_before(monkeypatch, folder: Path) -> None:
    """A Hub without connection, of which the files of this folder are in the cache."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repository, name):
        if not (folder / name).is_file():
            raise LocalEntryNotFoundError(f"no connection for {repository}")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_a_repository_kept_from_before_needs_no_connection(monkeypatch, tmp_path, load, images):
    """Whether it has files of the other layout cannot be asked then, and need not be."""
    tiny_clips.write_transformers(tmp_path)
    kept_from_before(monkeypatch, tmp_path)
    reward = reward_models.load("clip-h14", source="org/name")
    torch.testing.assert_close(reward(images, PROMPTS), load("clip-h14")(images, PROMPTS), atol=1e-3, rtol=1e-5)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=r"could not download preprocessor_config\.json of org/name .no connection"):
        reward_models.load("clip-h14", source="org/name")


def test_addresses_are_downloaded_once_and_checked(monkeypatch, tmp_path):
    from diffalign.reward_models.sources import Source

    asked = []

    def download(address, target, sha256, progress):
        asked.append((address, sha256))
        Path(target).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    source = Source("r", "head", "https://example.org/a/head+1.pth#sha256=abc")
    assert [source.file("anything") for _ in range(2)] == [tmp_path / "checkpoints" / "head+1.pth"] * 2
    assert asked == [("https://example.org/a/head+1.pth", "abc")]


def test_every_address_in_the_table_is_pinned():
    places = [place for spec in reward_models.SPECS.values() for place in spec.checkpoint.values()]
    addresses = [place for place in places if place.startswith("https://")]
    assert addresses
    assert all(re.search(r"/[0-9a-f]{40}/.*#sha256=[0-9a-f]{64}$", address) for address in addresses)
