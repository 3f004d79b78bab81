"""A Mask2Former of random weights that runs in milliseconds, and its weights under the names and in the layout of mmdet 2.x.

`mmdet_layout` is written from mmdet's side, module by module, independently of the table that reads it back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

CLASSES = 6


def tiny_mask2former(seed: int = 0, classes: int = CLASSES) -> Mask2FormerForUniversalSegmentation:
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1, 2, 1, 1],
            num_heads=[1, 2, 2, 4],
            window_size=3,
            mlp_ratio=2.0,
            drop_path_rate=0.0,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=2,
        encoder_feedforward_dim=48,
        decoder_layers=3,
        dim_feedforward=40,
        num_attention_heads=4,
        num_queries=7,
        num_labels=classes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config)
        for parameter in model.parameters():  # nothing stays at 0 or 1, where a wrong place would not show
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def mmdet_layout(model: Mask2FormerForUniversalSegmentation) -> dict[str, Tensor]:
    """The model's weights as mmdet 2.x saves them, with the buffers it saves along."""
    out: dict[str, Tensor] = {}

    def put(name: str, module: nn.Module) -> None:
        out.update({f"{name}.{key}": value for key, value in module.state_dict().items()})

    def fused(parts: list[nn.Linear], kind: str) -> Tensor:
        return torch.cat([getattr(part, kind).detach() for part in parts])

    backbone = model.model.pixel_level_module.encoder
    put("backbone.patch_embed.projection", backbone.swin.embeddings.patch_embeddings.projection)
    put("backbone.patch_embed.norm", backbone.swin.embeddings.norm)
    for s, stage in enumerate(backbone.swin.encoder.layers):
        put(f"backbone.norm{s}", backbone.hidden_states_norms[f"stage{s + 1}"])
        for b, block in enumerate(stage.blocks):
            name = f"backbone.stages.{s}.blocks.{b}"
            put(f"{name}.norm1", block.layernorm_before)
            put(f"{name}.norm2", block.layernorm_after)
            put(f"{name}.attn.w_msa.proj", block.attention.o_proj)
            parts = [block.attention.q_proj, block.attention.k_proj, block.attention.v_proj]
            for kind in ("weight", "bias"):
                out[f"{name}.attn.w_msa.qkv.{kind}"] = fused(parts, kind)
            bias = block.attention.relative_position_bias
            out[f"{name}.attn.w_msa.relative_position_bias_table"] = bias.relative_position_bias_table.detach()
            out[f"{name}.attn.w_msa.relative_position_index"] = bias.relative_position_index.view(bias.window_area, bias.window_area)
            put(f"{name}.ffn.layers.0.0", block.mlp.fc1)
            put(f"{name}.ffn.layers.1", block.mlp.fc2)
        if stage.downsample is not None:
            for part in ("norm", "reduction"):
                for kind, tensor in getattr(stage.downsample, part).state_dict().items():
                    out[f"backbone.stages.{s}.downsample.{part}.{kind}"] = unfold_order(tensor)

    decoder, head = model.model.pixel_level_module.decoder, "panoptic_head.pixel_decoder"
    for i, projection in enumerate(decoder.input_projections):
        put(f"{head}.input_convs.{i}.conv", projection[0])
        put(f"{head}.input_convs.{i}.gn", projection[1])
    for i, layer in enumerate(decoder.encoder.layers):
        name = f"{head}.encoder.layers.{i}"
        put(f"{name}.attentions.0", layer.self_attn)
        put(f"{name}.norms.0", layer.self_attn_layer_norm)
        put(f"{name}.norms.1", layer.final_layer_norm)
        put(f"{name}.ffns.0.layers.0.0", layer.fc1)
        put(f"{name}.ffns.0.layers.1", layer.fc2)
    out[f"{head}.level_encoding.weight"] = decoder.level_embed.detach()
    for theirs, ours in (("lateral_convs", decoder.adapter_1), ("output_convs", decoder.layer_1)):
        put(f"{head}.{theirs}.0.conv", ours[0])
        put(f"{head}.{theirs}.0.gn", ours[1])
    put(f"{head}.mask_feature", decoder.mask_projection)

    queries = model.model.transformer_module
    for i, layer in enumerate(queries.decoder.layers):
        name = f"panoptic_head.transformer_decoder.layers.{i}"
        put(f"{name}.attentions.0.attn", layer.cross_attn)
        put(f"{name}.attentions.1.attn.out_proj", layer.self_attn.out_proj)
        parts = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        for kind in ("weight", "bias"):
            out[f"{name}.attentions.1.attn.in_proj_{kind}"] = fused(parts, kind)
        put(f"{name}.norms.0", layer.cross_attn_layer_norm)
        put(f"{name}.norms.1", layer.self_attn_layer_norm)
        put(f"{name}.norms.2", layer.final_layer_norm)
        put(f"{name}.ffns.0.layers.0.0", layer.fc1)
        put(f"{name}.ffns.0.layers.1", layer.fc2)
    put("panoptic_head.transformer_decoder.post_norm", queries.decoder.layernorm)
    put("panoptic_head.query_embed", queries.queries_embedder)
    put("panoptic_head.query_feat", queries.queries_features)
    put("panoptic_head.level_embed", queries.level_embed)
    put("panoptic_head.cls_embed", model.class_predictor)
    for i, layer in enumerate(queries.decoder.mask_predictor.mask_embedder.children()):
        put(f"panoptic_head.mask_embed.{2 * i}", getattr(layer, "0"))
    return {name: tensor.clone() for name, tensor in out.items()}


def unfold_order(tensor: Tensor) -> Tensor:
    """Columns from neighbours (column by column) x channels to channels x neighbours (row by row), one by one."""
    channels = tensor.shape[-1] // 4
    out = torch.empty_like(tensor)
    for channel in range(channels):
        for row in range(2):
            for column in range(2):
                out[..., 4 * channel + 2 * row + column] = tensor[..., (2 * column + row) * channels + channel]
    return out
