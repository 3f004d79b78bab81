"""Checkpoint formats of the trained rewards: float16 safetensors, and the map from open_clip's CLIP to the one of transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

_TOP = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # the misspelling is theirs
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWERS = {"transformer.resblocks.": "text_model.encoder.layers.", "visual.transformer.resblocks.": "vision_model.encoder.layers."}


def save_half(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write float16 safetensors, readable by all, replacing the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: t.detach().cpu().half().contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, path)


def convert_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict (ViT and text transformer, class-token pooling) under the names of `transformers.CLIPModel`.

    Raises KeyError for a name it does not know.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in _TOP:
            converted[_TOP[name]] = tensor.T if name in _TRANSPOSED else tensor
            continue
        tower = next((t for t in _TOWERS if name.startswith(t)), None)
        if tower is None:
            raise KeyError(f"convert_weights does not know the open_clip tensor {name!r}")
        layer, rest = name[len(tower) :].split(".", 1)
        prefix = f"{_TOWERS[tower]}{layer}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{prefix}self_attn.{part}_proj.{kind}"] = chunk
        else:
            module, kind = rest.rsplit(".", 1)
            converted[f"{prefix}{_BLOCK[module]}.{kind}"] = tensor
    return converted


def convert_config(layout: Mapping) -> CLIPConfig:
    """The CLIPConfig of an open_clip `model_cfg` whose activation is plain GELU (transformers' default is quick GELU)."""
    vision, text = layout["vision_cfg"], layout["text_cfg"]
    return CLIPConfig(
        projection_dim=layout["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": layout["embed_dim"],
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "projection_dim": layout["embed_dim"],
            "hidden_act": "gelu",
            "bos_token_id": None,  # open_clip does not say, and no computation needs it
            "eos_token_id": text["eos_id"],
            "pad_token_id": text["pad_id"],
        },
    )


def convert(layout: Mapping, weights: Mapping[str, Tensor]) -> CLIPModel:
    """A transformers CLIPModel with the weights of an open_clip model; nothing may be missing or left over."""
    model = CLIPModel(convert_config(layout))
    with torch.no_grad():
        model.load_state_dict(convert_weights(weights), strict=True)
    return model.eval()
