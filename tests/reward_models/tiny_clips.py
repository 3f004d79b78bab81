"""Tiny random checkpoints of the CLIP family, in exactly the layout each was published in.

`WRITERS[name](folder)` writes one; rewards of several parts have one folder for each part. Layouts that bring no configuration say in their
row of the table which architecture they hold: here it is `tiny-h`, registered with open_clip under that name.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign import reward_models
from diffalign.shapes.train.rewards_convert import convert_weights

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SIZE, WIDTH = 28, 24  # of the images, and of the embeddings
ARCHITECTURE = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
HF_CONFIG = {
    "model_type": "clip",
    "projection_dim": WIDTH,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 14,
        "projection_dim": WIDTH,
    },
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
        "eos_token_id": 2,  # as in all configurations of their time
    },
}
PROCESSOR = {"crop_size": SIZE, "size": SIZE, "resample": 3, "image_mean": MEAN, "image_std": STD}
HEAD_WIDTHS = (1024, 128, 64, 16, 1)


def disturbed(model: torch.nn.Module, seed: int, scale: float = 0.05) -> dict[str, Tensor]:
    """The state dict with biases and norms away from their initial zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("logit_"):
                p.add_(scale * torch.randn(p.shape, generator=generator))
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


@functools.cache
def clip_weights(seed: int = 0, quick_gelu: bool = False, mlp_ratio: float = 4.0) -> dict[str, Tensor]:
    """A state dict under open_clip's names."""
    torch.manual_seed(seed)
    return disturbed(open_clip.CLIP(**architecture(quick_gelu, mlp_ratio)), seed)


def architecture(quick_gelu: bool = False, mlp_ratio: float = 4.0) -> dict:
    config = copy.deepcopy(ARCHITECTURE) | ({"quick_gelu": True} if quick_gelu else {})
    config["vision_cfg"]["mlp_ratio"] = mlp_ratio
    return config


def hf_weights(seed: int = 0, quick_gelu: bool = False) -> dict[str, Tensor]:
    """The same weights under transformers' names, with the buffers that versions of that time saved."""
    converted = {name: tensor.contiguous() for name, tensor in convert_weights(clip_weights(seed, quick_gelu)).items()}
    return converted | {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange((SIZE // 14) ** 2 + 1)[None],
    }


def hf_config(quick_gelu: bool = False) -> dict:
    config = copy.deepcopy(HF_CONFIG)
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "quick_gelu" if quick_gelu else "gelu"
    return config


def write_json(path: Path, content: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# ---- one writer for each published layout ---------------------------------------------------------------------------------------


def write_open_clip(folder: Path, seed: int = 0, quick_gelu: bool = False, mlp_ratio: float = 4.0) -> None:
    """A repository of timm's or LAION's; theirs give mean and std alone."""
    config = {"model_cfg": architecture(quick_gelu, mlp_ratio), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    write_json(folder / "open_clip_config.json", config)
    save_file(clip_weights(seed, quick_gelu, mlp_ratio), folder / "open_clip_model.safetensors")


def write_open_clip_bin(folder: Path) -> None:
    write_open_clip(folder, seed=2, mlp_ratio=4.9231)  # bigG/14's
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(clip_weights(2, mlp_ratio=4.9231), folder / "open_clip_pytorch_model.bin")


def write_transformers(folder: Path, seed: int = 0, quick_gelu: bool = False) -> None:
    write_json(folder / "config.json", hf_config(quick_gelu))
    write_json(folder / "preprocessor_config.json", PROCESSOR)
    save_file(hf_weights(seed, quick_gelu), folder / "model.safetensors")


def write_pickscore(folder: Path) -> None:
    write_transformers(folder, seed=3)
    (folder / "preprocessor_config.json").unlink()


def write_hps(folder: Path, name: str, seed: int) -> None:
    folder.mkdir(parents=True)
    half = {key: tensor.half() for key, tensor in clip_weights(seed).items()}
    torch.save({"state_dict": half}, folder / str(reward_models.SPECS[name].options["file"]))


def write_laion(folder: Path) -> None:
    write_transformers(folder / "encoder", seed=6, quick_gelu=True)
    layers = zip((0, 2, 4, 6, 7), linear_layers(WIDTH, 6), strict=True)
    head = {f"layers.{place}.{kind}": tensor for place, layer in layers for kind, tensor in layer.items()}
    (folder / "head").mkdir()
    torch.save(head, folder / "head" / "sac+logos+ava1-l14-linearMSE.pth")


def write_siglip(folder: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tower | {"model_type": "siglip_vision_model", "image_size": SIZE, "patch_size": 14}
    text = tower | {"model_type": "siglip_text_model", "vocab_size": 64, "projection_size": 32}
    write_json(folder / "encoder" / "config.json", {"model_type": "siglip", "text_config": text, "vision_config": vision})
    torch.manual_seed(7)
    save_file(disturbed(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), 7), folder / "encoder" / "model.safetensors")
    layers = zip((0, 2, 4, 6, 8), linear_layers(32, 7), strict=True)
    head = {f"scoring_head.{place}.{kind}": tensor.bfloat16() for place, layer in layers for kind, tensor in layer.items()}
    (folder / "head").mkdir()
    torch.save(head, folder / "head" / "aesthetic_predictor_v2_5.pth")


def linear_layers(width: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (width, *HEAD_WIDTHS)
    return [
        {"weight": torch.randn(b, a, generator=generator) * (2 / a) ** 0.5, "bias": 0.1 * torch.randn(b, generator=generator)}
        for a, b in itertools.pairwise(sizes)
    ]


def write_mps(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(mps_weights(), folder / "model.safetensors")
    write_json(folder / "config.json", {})  # what the Hub's mixin leaves of a model without settings


@functools.cache
def mps_weights() -> dict[str, Tensor]:
    """The port's names and shapes, with 16 heads of 64 and the feed-forward four times as wide."""
    generator = torch.Generator().manual_seed(8)
    shapes = {
        "0.fn.to_q.weight": (1024, WIDTH),
        "0.fn.to_kv.weight": (128, WIDTH),
        "0.fn.to_out.weight": (WIDTH, 1024),
        "0.fn.ff.0.weight": (8 * WIDTH, WIDTH),
        "0.fn.ff.2.weight": (WIDTH, 4 * WIDTH),
        "1.fn.fused_attn_ff_proj.weight": (1024 + 64 + 64 + 8 * WIDTH, WIDTH),
        "1.fn.attn_out.weight": (WIDTH, 1024),
        "1.fn.ff_out.1.weight": (WIDTH, 4 * WIDTH),
    }
    tensors = {f"mps.model.{name}": tensor for name, tensor in hf_weights(8).items()}
    for layer in range(4):
        prefix = f"mps.cross_model.layers.{layer}."
        tensors |= {prefix + name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}
        for part in ("0", "1"):
            tensors[f"{prefix}{part}.fn.norm.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
            tensors[f"{prefix}{part}.fn.norm.bias"] = torch.zeros(WIDTH)
        tensors[f"{prefix}1.fn.rotary_emb.inv_freq"] = 10_000.0 ** -(torch.arange(0, 64, 2) / 64)
    return tensors


WRITERS = {
    "clip-l14": functools.partial(write_open_clip, seed=1, quick_gelu=True),
    "clip-h14": functools.partial(write_open_clip, seed=0),
    "clip-bigg14": write_open_clip_bin,
    "pickscore": write_pickscore,
    "hpsv2": functools.partial(write_hps, name="hpsv2", seed=4),
    "hpsv2.1": functools.partial(write_hps, name="hpsv2.1", seed=5),
    "laion-aesthetic-v2": write_laion,
    "aesthetic-v2.5": write_siglip,
    "mps": write_mps,
}


def write_all(root: Path) -> None:
    """Every checkpoint of this family under its name, and the architecture of those that bring no configuration."""
    write_json(root / "architectures" / "tiny-h.json", ARCHITECTURE)
    open_clip.add_model_config(root / "architectures")
    for name, write in WRITERS.items():
        write(root / name)


def tiny_spec(spec: reward_models.Spec) -> reward_models.Spec:
    """The row with `tiny-h` for the architecture, where it names one."""
    options = {key: "tiny-h" if key == "architecture" else value for key, value in spec.options.items()}
    return dataclasses.replace(spec, options=options)
