"""GenEval's own detector weights, an mmdet 2.x checkpoint, in the Mask2Former of transformers.

The checkpoint: mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth of OpenMMLab (Apache-2.0). The file of the same
name that ends in c9d0c4f2 is the conversion for mmdet 3.x and does not fit.

Three things change besides names: fused q, k, v are split; Swin's patch merging orders its 2 x 2 neighbours otherwise (`merge_order`);
and two convolutions have no bias, so one in the file must be zero. A key without a counterpart, on either side, is an error.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

POINTS, LEVELS = 4, 3  # of the deformable attention, the same in all Mask2Formers
SWIN = "model.pixel_level_module.encoder."
PIXEL = "model.pixel_level_module.decoder."
QUERY = "model.transformer_module."

# mmdet 2.x -> transformers 5. {s} is the Swin inside the encoder.
RENAMES: tuple[tuple[str, str], ...] = tuple(
    (re.compile(pattern), target)
    for pattern, target in (
        (r"backbone\.patch_embed\.projection\.(\w+)", r"{s}embeddings.patch_embeddings.projection.\1"),
        (r"backbone\.patch_embed\.norm\.(\w+)", r"{s}embeddings.norm.\1"),
        (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm1\.(\w+)", r"{s}encoder.layers.\1.blocks.\2.layernorm_before.\3"),
        (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm2\.(\w+)", r"{s}encoder.layers.\1.blocks.\2.layernorm_after.\3"),
        (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.proj\.(\w+)", r"{s}encoder.layers.\1.blocks.\2.attention.o_proj.\3"),
        (
            r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.relative_position_bias_table",
            r"{s}encoder.layers.\1.blocks.\2.attention.relative_position_bias.relative_position_bias_table",
        ),
        (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.(\w+)", r"{s}encoder.layers.\1.blocks.\2.mlp.fc1.\3"),
        (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1\.(\w+)", r"{s}encoder.layers.\1.blocks.\2.mlp.fc2.\3"),
        (r"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)\.(\w+)", r"{s}encoder.layers.\1.downsample.\2.\3"),
        (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.(\w+)", PIXEL + r"input_projections.\1.0.\2"),
        (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.(\w+)", PIXEL + r"input_projections.\1.1.\2"),
        (
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0\.(\w+)\.(\w+)",
            PIXEL + r"encoder.layers.\1.self_attn.\2.\3",
        ),
        (
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.(\w+)",
            PIXEL + r"encoder.layers.\1.self_attn_layer_norm.\2",
        ),
        (r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.(\w+)", PIXEL + r"encoder.layers.\1.final_layer_norm.\2"),
        (r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.(\w+)", PIXEL + r"encoder.layers.\1.fc1.\2"),
        (r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.(\w+)", PIXEL + r"encoder.layers.\1.fc2.\2"),
        (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", PIXEL + "level_embed"),
        (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.weight", PIXEL + "adapter_1.0.weight"),
        (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.(\w+)", PIXEL + r"adapter_1.1.\1"),
        (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.weight", PIXEL + "layer_1.0.weight"),
        (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.(\w+)", PIXEL + r"layer_1.1.\1"),
        (r"panoptic_head\.pixel_decoder\.mask_feature\.(\w+)", PIXEL + r"mask_projection.\1"),
        (
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn\.([\w.]+)",
            QUERY + r"decoder.layers.\1.cross_attn.\2",
        ),
        (
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.out_proj\.(\w+)",
            QUERY + r"decoder.layers.\1.self_attn.out_proj.\2",
        ),
        (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.0\.(\w+)", QUERY + r"decoder.layers.\1.cross_attn_layer_norm.\2"),
        (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.1\.(\w+)", QUERY + r"decoder.layers.\1.self_attn_layer_norm.\2"),
        (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.2\.(\w+)", QUERY + r"decoder.layers.\1.final_layer_norm.\2"),
        (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.(\w+)", QUERY + r"decoder.layers.\1.fc1.\2"),
        (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.(\w+)", QUERY + r"decoder.layers.\1.fc2.\2"),
        (r"panoptic_head\.transformer_decoder\.post_norm\.(\w+)", QUERY + r"decoder.layernorm.\1"),
        (r"panoptic_head\.query_embed\.weight", QUERY + "queries_embedder.weight"),
        (r"panoptic_head\.query_feat\.weight", QUERY + "queries_features.weight"),
        (r"panoptic_head\.level_embed\.weight", QUERY + "level_embed.weight"),
        (r"panoptic_head\.cls_embed\.(\w+)", r"class_predictor.\1"),
        (r"panoptic_head\.mask_embed\.0\.(\w+)", QUERY + r"decoder.mask_predictor.mask_embedder.0.0.\1"),
        (r"panoptic_head\.mask_embed\.2\.(\w+)", QUERY + r"decoder.mask_predictor.mask_embedder.1.0.\1"),
        (r"panoptic_head\.mask_embed\.4\.(\w+)", QUERY + r"decoder.mask_predictor.mask_embedder.2.0.\1"),
    )
)
STAGE_NORM = re.compile(r"backbone\.norm(\d+)\.(\w+)")
SWIN_QKV = re.compile(r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.qkv\.(\w+)")
QUERY_QKV = re.compile(r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.in_proj_(\w+)")
MERGE = re.compile(r"backbone\.stages\.\d+\.downsample\.(norm|reduction)\.\w+")
EXTRA_BIAS = re.compile(r"panoptic_head\.pixel_decoder\.(lateral|output)_convs\.0\.conv\.bias")
NOT_WEIGHTS = re.compile(r".*relative_position_index|panoptic_head\.loss_\w+\..*")  # recomputed, or of the training loss
# What transformers' model has and no detection uses.
UNUSED = re.compile(r"criterion\.empty_weight|.*encoder\.swin\.layernorm\.\w+")


def load_mmdet(path: Path) -> tuple[Mask2FormerForUniversalSegmentation, str]:
    """The model of an mmdet 2.x checkpoint file and the first 8 digits of its sha256, which OpenMMLab puts into the name.

    Raises ValueError where the file is damaged, of mmdet 3.x, or no Mask2Former with a Swin.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named and named[1] == "c9d0c4f2":
        raise ValueError(f"{path.name} is the conversion for mmdet 3.x; GenEval's detector is the file that ends in 743b7d99.pth (v2.0)")
    if named and named[1] != digest:
        raise ValueError(f"{path} is damaged: its sha256 begins {digest}, its name says {named[1]}; download it again")
    try:
        # Training left NumPy numbers among the file's notes, which the safe loader does not take by itself.
        scalar = np.float64(0).__reduce__()[0]
        names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # before and since NumPy 2
        numbers = [*names, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
        with torch.serialization.safe_globals(numbers):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors ({str(error).splitlines()[0]})") from error
    return from_mmdet(data.get("state_dict", data)), digest


def from_mmdet(weights: Mapping[str, Tensor]) -> Mask2FormerForUniversalSegmentation:
    """The model with these weights, in eval mode. Raises ValueError naming keys that are missing or have no counterpart."""
    if "panoptic_head.cls_embed.weight" not in weights or "backbone.patch_embed.projection.weight" not in weights:
        raise ValueError("these are not the weights of mmdet 2.x's Mask2Former with a Swin: no panoptic_head.cls_embed or patch_embed")
    model = Mask2FormerForUniversalSegmentation(config_of(weights))
    own = model.state_dict()
    converted = convert(weights, "swin." if any(key.startswith(SWIN + "swin.") for key in own) else "")
    unexpected = sorted(set(converted) - set(own))
    missing = sorted(key for key in set(own) - set(converted) if not UNUSED.fullmatch(key))
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit transformers' Mask2Former: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    model.load_state_dict(converted, strict=False)  # checked above; what is left out is used by no detection
    return model.eval()


def convert(weights: Mapping[str, Tensor], swin: str = "swin.") -> dict[str, Tensor]:
    """Tensors under transformers' names. Raises ValueError for a name that the table does not know."""
    out: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        if NOT_WEIGHTS.fullmatch(name):
            continue
        if EXTRA_BIAS.fullmatch(name):
            if tensor.abs().max() > 0:
                raise ValueError(f"{name} is not zero, and transformers' Mask2Former has no bias there")
            continue
        targets = _targets(name, SWIN + swin)
        if not targets:
            unknown.append(name)
        elif MERGE.fullmatch(name):
            out[targets[0]] = merge_order(tensor)
        else:
            out.update(zip(targets, tensor.chunk(len(targets)), strict=True))
    if unknown:
        raise ValueError(f"{len(unknown)} tensors of the checkpoint have no counterpart: {sorted(unknown)[:5]}")
    return out


def merge_order(tensor: Float[Tensor, "... c4"]) -> Float[Tensor, "... c4"]:
    """Columns of the patch merging: from channels x 2 x 2 neighbours row by row, to neighbours column by column x channels."""
    grouped = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return grouped[..., [0, 2, 1, 3], :].flatten(-2).contiguous()


def _targets(name: str, swin: str) -> list[str]:
    """The name in transformers, or three for fused q, k, v, or none."""
    if match := SWIN_QKV.fullmatch(name):
        stage, block, kind = match.groups()
        return [f"{swin}encoder.layers.{stage}.blocks.{block}.attention.{part}_proj.{kind}" for part in "qkv"]
    if match := QUERY_QKV.fullmatch(name):
        layer, kind = match.groups()
        return [f"{QUERY}decoder.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
    if match := STAGE_NORM.fullmatch(name):
        return [f"{SWIN}hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}"]
    for pattern, target in RENAMES:
        if match := pattern.fullmatch(name):
            return [match.expand(target).replace("{s}", swin)]
    return []


def config_of(weights: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """The architecture that these weights belong to, read off their shapes."""

    def count(pattern: str) -> int:
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    stages = count(r"backbone\.stages\.(\d+)\.")
    tables = [weights[f"backbone.stages.{s}.blocks.0.attn.w_msa.relative_position_bias_table"] for s in range(stages)]
    embed = weights["backbone.patch_embed.projection.weight"]
    pixel, query = "panoptic_head.pixel_decoder.", "panoptic_head.transformer_decoder."
    width = weights["panoptic_head.query_feat.weight"].shape[1]
    return Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=embed.shape[0],
            patch_size=embed.shape[-1],
            depths=[count(rf"backbone\.stages\.{s}\.blocks\.(\d+)\.") for s in range(stages)],
            num_heads=[table.shape[1] for table in tables],
            window_size=(math.isqrt(tables[0].shape[0]) + 1) // 2,
            mlp_ratio=weights["backbone.stages.0.blocks.0.ffn.layers.0.0.weight"].shape[0] / embed.shape[0],
            drop_path_rate=0.0,
            out_features=[f"stage{s + 1}" for s in range(stages)],
        ),
        feature_size=weights[pixel + "level_encoding.weight"].shape[1],
        mask_feature_size=weights[pixel + "mask_feature.weight"].shape[0],
        hidden_dim=width,
        encoder_layers=count(r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\."),
        encoder_feedforward_dim=weights[pixel + "encoder.layers.0.ffns.0.layers.0.0.weight"].shape[0],
        decoder_layers=count(r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.") + 1,  # transformers counts the prediction before them
        dim_feedforward=weights[query + "layers.0.ffns.0.layers.0.0.weight"].shape[0],
        num_attention_heads=weights[pixel + "encoder.layers.0.attentions.0.attention_weights.weight"].shape[0] // (POINTS * LEVELS),
        num_queries=weights["panoptic_head.query_feat.weight"].shape[0],
        num_labels=weights["panoptic_head.cls_embed.weight"].shape[0] - 1,
    )
