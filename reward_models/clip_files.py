"""CLIP from either published layout: a folder of open_clip, or a folder of transformers. Parameters are as the file stores them.

open_clip:     open_clip_config.json ({"model_cfg", "preprocess_cfg"}), open_clip_model.safetensors or open_clip_pytorch_model.bin
transformers:  config.json, preprocessor_config.json, model.safetensors or pytorch_model.bin, or either in shards
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from diffalign.files import read_json
from diffalign.reward_models.checkpoints import load_strict, read_weights, weights_file, without_weights
from diffalign.reward_models.clip_text import LENGTH, VOCABULARY
from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess
from diffalign.reward_models.sources import Source

OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OPEN_CLIP_TEXT = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
TRANSFORMERS_TEXT = ("text_model", "text_projection")
POSITION_IDS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")  # saved by older versions of transformers
GEOMETRY_OF = {"squash": "squash", "shortest": "shortest+crop", "longest": "longest+pad"}  # open_clip's resize_mode -> ours


class TransformersCLIP(nn.Module):
    """transformers' CLIPModel under open_clip's names: `encode_image` and `encode_text` give embeddings, not normalised."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, ids: Int[Tensor, "n l"]) -> Float[Tensor, "n d"]:
        return self.model.get_text_features(input_ids=ids).pooler_output


def load_clip(source: Source, *, text: bool = True, quick_gelu: bool = False) -> tuple[open_clip.CLIP | TransformersCLIP, Preprocess]:
    """The model and its preprocessing, from whichever layout is there; open_clip's where both are.

    text: False leaves the text tower on the disk. quick_gelu: the activation where an open_clip file says nothing of it.
    Raises FileNotFoundError and ValueError, naming the file that is missing or damaged.
    """
    config = source.file("open_clip_config.json", "config.json")
    if config.name == "open_clip_config.json":
        clip, pixels = load_open_clip(source, text=text, quick_gelu=quick_gelu)
        check_vocabulary(clip.vocab_size, clip.context_length, config)
        return clip, pixels
    model = load_transformers_clip(source, text=text)
    check_vocabulary(model.config.text_config.vocab_size, model.config.text_config.max_position_embeddings, config)
    return TransformersCLIP(model), read_preprocess(source.file("preprocessor_config.json"))


def check_vocabulary(size: int, length: int, path: Path) -> None:
    """Raises ValueError unless a model reads what clip_text.py writes."""
    if (size, length) != (VOCABULARY, LENGTH):
        raise ValueError(f"{path}: the model reads {length} tokens out of {size}; CLIP's own {LENGTH} out of {VOCABULARY} are needed")


def text_modules(clip: nn.Module, prefix: str) -> tuple[str, ...]:
    """Dotted names of what serves prompts alone in `clip`, which lies at `prefix`."""
    inside = tuple(f"model.{name}" for name in TRANSFORMERS_TEXT) if isinstance(clip, TransformersCLIP) else OPEN_CLIP_TEXT
    return tuple(f"{prefix}.{name}" for name in inside)


def width_of(clip: open_clip.CLIP | TransformersCLIP) -> int:
    """Of an embedding."""
    return clip.model.config.projection_dim if isinstance(clip, TransformersCLIP) else clip.visual.output_dim


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(module.parameters())
    return parameter.device, parameter.dtype


# ---- open_clip -------------------------------------------------------------------------------------------------------------------


def load_open_clip(
    source: Source, weights: Sequence[str] = OPEN_CLIP_WEIGHTS, *, text: bool = True, quick_gelu: bool = False
) -> tuple[open_clip.CLIP, Preprocess]:
    """As `load_clip`, from open_clip's layout alone. weights: names its file may have."""
    path = source.file("open_clip_config.json")
    config = read_json(path, ("model_cfg", "preprocess_cfg"))
    try:
        model = without_weights(lambda: open_clip.CLIP(**({"quick_gelu": quick_gelu} | config["model_cfg"])))
        pixels = _open_clip_preprocess({"size": config["model_cfg"]["vision_cfg"]["image_size"]} | config["preprocess_cfg"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not describe an open_clip model ({error})") from error
    _fill(model, weights_file(source, *weights), () if text else OPEN_CLIP_TEXT)
    return model, pixels


def _open_clip_preprocess(config: dict[str, Any]) -> Preprocess:
    if config.get("interpolation", "bicubic") != "bicubic":
        raise ValueError(f"interpolation must be bicubic, got {config['interpolation']!r}")
    geometry = GEOMETRY_OF[config.get("resize_mode", "shortest")]
    size, *others = (config["size"],) if isinstance(config["size"], int) else config["size"]
    if any(other != size for other in others):
        raise ValueError(f"size must be square, got {config['size']}")
    mean, std = config.get("mean", OPENAI_MEAN), config.get("std", OPENAI_STD)
    return Preprocess(size, tuple(mean), tuple(std), geometry, round_crop=True)


# ---- transformers ----------------------------------------------------------------------------------------------------------------


def load_transformers_clip(source: Source, weights: Sequence[str] = TRANSFORMERS_WEIGHTS, *, text: bool = True) -> CLIPModel:
    """The model of a transformers folder, strictly: from_pretrained would fill missing tensors with random ones.

    weights: names its file may have. text, and errors: as `load_clip`.
    """
    path = source.file("config.json")
    config = read_json(path, ("text_config", "vision_config"))
    model = built(CLIPModel, lambda: CLIPConfig.from_dict(config), path)
    _fill(model, weights_file(source, *weights), () if text else TRANSFORMERS_TEXT)
    return model


def built(cls: Callable[[Any], nn.Module], config: Callable[[], Any], path: Path | str) -> Any:
    """A model of transformers without weights. Raises ValueError naming `path` where its configuration is none of the class."""
    try:
        return without_weights(lambda: cls(config()))
    except Exception as error:  # transformers validates configurations with exceptions of its own
        raise ValueError(f"{path} does not describe a {cls.__name__} ({error})") from error


def clip_config(architecture: str) -> CLIPConfig:
    """The configuration of one of open_clip's architectures, for checkpoints that bring none. Raises ValueError where it has no such."""
    cfg = open_clip.get_model_config(architecture)
    if cfg is None:
        raise ValueError(f"open_clip has no architecture {architecture!r}")
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    common = {"projection_dim": cfg["embed_dim"], "hidden_act": "quick_gelu" if cfg.get("quick_gelu") else "gelu"}
    return CLIPConfig(
        projection_dim=cfg["embed_dim"],
        vision_config=_tower(vision, vision["width"] // vision.get("head_width", 64))
        | common
        | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
        text_config=_tower(text, text["heads"])
        | common
        | {"max_position_embeddings": text["context_length"], "vocab_size": text["vocab_size"], "eos_token_id": 2},
    )  # 2 is how transformers' older configurations say: pool at the greatest id, which is the end token's


def _tower(cfg: Mapping[str, Any], heads: int) -> dict[str, int]:
    width = cfg["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4.0)),
        "num_hidden_layers": cfg["layers"],
        "num_attention_heads": heads,
    }


def read_preprocess(path: Path) -> Preprocess:
    """The preprocessing a transformers image processor file describes: bicubic, shortest side and centre crop, or squashed."""
    config = read_json(path, ("size", "image_mean", "image_std"))
    try:
        return _preprocess(config)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} describes a preprocessing we do not have ({error!r})") from error


def _preprocess(config: dict[str, Any]) -> Preprocess:
    if config.get("resample", 3) != 3:
        raise ValueError(f"resample must be 3 (bicubic), got {config['resample']}")
    size, mean, std = config["size"], tuple(config["image_mean"]), tuple(config["image_std"])
    if isinstance(size, int) or "shortest_edge" in size:  # older files give numbers
        short = size if isinstance(size, int) else size["shortest_edge"]
        crop = config["crop_size"]
        crop = crop if isinstance(crop, int) else crop["height"]
        if crop != short:
            raise ValueError(f"crop_size {crop} differs from shortest_edge {short}")
        return Preprocess(crop, mean, std, "shortest+crop")
    if size["height"] != size["width"]:
        raise ValueError(f"size must be square, got {size}")
    return Preprocess(size["height"], mean, std, "squash")


def _fill(model: nn.Module, path: Path, left_out: tuple[str, ...]) -> None:
    for name in left_out:
        setattr(model, name, None)
    load_strict(model, read_weights(path, None, skip=left_out), path, unused=POSITION_IDS)
