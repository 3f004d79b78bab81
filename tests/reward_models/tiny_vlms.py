"""Tiny random checkpoints of the rewards whose prompt and image share layers, in exactly the published layouts, tokenizers included.

`WRITERS[name](folder)` writes one, a folder for each part where there are several. The same call always makes the same weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from tests.reward_models import tiny_clips
from tests.reward_models.plain_blip import PlainImageReward
from tests.reward_models.tiny_tokenizers import bert_tokenizer, save_tokenizer, t5_tokenizer, write_qwen_tokenizer

Module = TypeVar("Module", bound=nn.Module)

OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def shake(build: Callable[[], Module], seed: int, scale: float = 0.1) -> Module:
    """A module with seeded weights, all moved by noise, layer norms and biases too: no wrong wiring can hide behind zeros and ones."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = build()
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))
    return module.eval()


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# ---- ImageReward -----------------------------------------------------------------------------------------------------------------


def tiny_image_reward(words: int) -> PlainImageReward:
    sizes = {"width": 128, "inner": 96, "depth": 2, "size": 32, "patch": 8, "text_width": 64, "text_inner": 80, "text_depth": 2}
    return shake(lambda: PlainImageReward(words=words, **sizes), 11)


def write_image_reward(folder: Path) -> None:
    """ImageReward.pt, a plain state dict, and the folder of a BERT tokenizer."""
    tokenizer = bert_tokenizer()
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "model").mkdir()
    torch.save(tiny_image_reward(tokenizer.get_vocab_size() + 2).state_dict(), folder / "model" / "ImageReward.pt")  # BLIP adds two tokens


# ---- Qwen-VL and HPSv3 -----------------------------------------------------------------------------------------------------------


def qwen2_vl_config(tokenizer: Tokenizer, patch: int = 14) -> dict:
    """config.json as the Hub's Qwen2-VL folders have it: flat, with rope_scaling, and more rows than the tokenizer has tokens."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size() + 20,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_chans": 3,
            "hidden_size": 32,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "spatial_patch_size": patch,
            "temporal_patch_size": 2,
        },
    }


def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names transformers had for a Qwen2-VL until 4.51, which the published files keep."""
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor.contiguous()
        for name, tensor in tensors.items()
    }


def hpsv3_head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Dropout(0.05), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))


def write_hpsv3(folder: Path) -> None:
    """HPSv3.safetensors in bfloat16 but for its head, and the folder of the backbone: configuration and tokenizer, no weights."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from diffalign.reward_models.hpsv3 import read_instruction

    tokenizer = write_qwen_tokenizer(folder / "backbone", [read_instruction()])
    config = qwen2_vl_config(tokenizer, patch=28)  # larger than the real one, so that a tile of the real size has few patches
    write_json(folder / "backbone" / "config.json", config)
    rows = tokenizer.get_vocab_size() + 1
    model = shake(lambda: Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(config | {"vocab_size": rows})), 12)
    tensors = {name: tensor.bfloat16() for name, tensor in old_names(model.state_dict()).items()}
    head = shake(hpsv3_head, 13, 0.5)
    tensors |= {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    (folder / "model").mkdir()
    save_file(tensors, folder / "model" / "HPSv3.safetensors", metadata={"format": "pt"})


def write_hpsv3_plus(folder: Path) -> None:
    """hpsv3++.pth in bfloat16 but for head and conditions, and the folder of the backbone without weights, in Qwen3-VL's layout."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from diffalign.reward_models.hpsv3 import read_instruction

    tokenizer = write_qwen_tokenizer(folder / "backbone", [read_instruction()])
    config = judge_config(tokenizer, "qwen3_vl")
    config["vision_config"]["patch_size"] = 32  # larger than the real one, so that a tile of the real size has few patches
    write_json(folder / "backbone" / "config.json", config)
    size = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 32}
    write_json(folder / "backbone" / "preprocessor_config.json", judge_preprocessor("qwen3_vl") | size)
    rows = tokenizer.get_vocab_size() + 1
    text = config["text_config"] | {"vocab_size": rows}
    model = shake(lambda: Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config | {"text_config": text})), 21)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    parts = {"rm_head": shake(hpsv3_head, 22, 0.5)} | {name: shake(make, seed) for seed, (name, make) in enumerate(CONDITIONS.items(), 23)}
    tensors |= {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    (folder / "model").mkdir()
    torch.save(tensors, folder / "model" / "hpsv3++.pth")


CONDITIONS: dict[str, Callable[[], nn.Module]] = {
    "cond_encoder": lambda: nn.Sequential(nn.Linear(2, 12), nn.GELU(), nn.Linear(12, 12)),
    "film_gen": lambda: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 64)),
    "cap_encoder": lambda: nn.ModuleDict({"proj": nn.Linear(32, 12), "pool_attn": nn.Linear(12, 1), "out_proj": nn.Linear(12, 1)}),
}


# ---- CLIP-FlanT5 -----------------------------------------------------------------------------------------------------------------


def t5_config(rows: int) -> dict:
    """config.json of a CLIP-FlanT5, T5 1.1's fields and LLaVA's."""
    return {
        "_name_or_path": "google/flan-t5-xxl",
        "architectures": ["CLIPT5ForConditionalGeneration"],
        "model_type": "clip_t5",
        "d_ff": 48,
        "d_kv": 8,
        "d_model": 32,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_layers": 2,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": rows + 28,  # as published: rows were cut afterwards
    }


LIKELY = 2610  # of many, a seed of the output layer under which "Yes" is neither certain nor as likely as any other token


def tiny_clip_t5(rows: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """T5 (its output layer not tied to its embedding), CLIP tower and projector."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    ignored = ("model_type", "architectures", "_name_or_path")
    config = {key: value for key, value in t5_config(rows).items() if key not in ignored and not key.startswith("mm_")}

    def untied() -> T5ForConditionalGeneration:
        t5 = T5ForConditionalGeneration(T5Config(**(config | {"vocab_size": rows})))
        t5.lm_head.weight = nn.Parameter(torch.zeros_like(t5.lm_head.weight))  # transformers 5 ties it, whatever the configuration says
        return t5

    tower = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=42,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    projector = shake(lambda: nn.Sequential(nn.Linear(128, 40), nn.GELU(), nn.Linear(40, 32)), 16)
    t5 = shake(untied, 14)
    t5.lm_head.weight.data = shake(lambda: nn.Linear(32, rows, bias=False), LIKELY, 0.8).weight.data
    return t5, shake(lambda: CLIPVisionModel(tower), 15), projector


def write_vqascore(folder: Path) -> None:
    """A CLIP-FlanT5 in two shards of torch's format with an index, and the folder of a T5 tokenizer."""
    tokenizer, model = t5_tokenizer(), folder / "model"
    save_tokenizer(tokenizer, folder / "tokenizer")
    rows = tokenizer.get_vocab_size() + 4
    write_json(model / "config.json", t5_config(rows))
    t5, vision, projector = tiny_clip_t5(rows)
    tensors = dict(t5.state_dict()) | {"embed_tokens.weight": t5.shared.weight.data}
    tower = vision.state_dict() | {"embeddings.position_ids": torch.arange(10).unsqueeze(0)}
    rest = {f"vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in tower.items()}
    rest |= {f"mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    shards = {"pytorch_model-00001-of-00002.bin": tensors, "pytorch_model-00002-of-00002.bin": rest}
    for name, content in shards.items():
        torch.save(content, model / name)
    index = {name: shard for shard, content in shards.items() for name in content}
    write_json(model / "pytorch_model.bin.index.json", {"metadata": {"total_size": 0}, "weight_map": index})


# ---- judges ----------------------------------------------------------------------------------------------------------------------


def write_judge(folder: Path, family: str = "qwen3_vl") -> None:
    """A Qwen-VL folder of one of three families, as the Hub has them: the first two under their older names, in shards."""
    tokenizer = write_qwen_tokenizer(folder, ["Yes yes No no Does this image show? Please answer yes or no."] * 3)
    write_json(folder / "config.json", judge_config(tokenizer, family))
    write_json(folder / "preprocessor_config.json", judge_preprocessor(family))
    model = judge_model(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors = tensors if family == "qwen3_vl" else old_names(tensors)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, content in shards.items():
        save_file({name: tensors[name] for name in content}, folder / shard, metadata={"format": "pt"})
    index = {name: shard for shard, content in shards.items() for name in content}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": index})


def judge_model(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageTextToText

    return shake(lambda: AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)), 17, 0.2)


def judge_config(tokenizer: Tokenizer, family: str) -> dict:
    flat = qwen2_vl_config(tokenizer, patch=8) | {"torch_dtype": "float32"}
    if family == "qwen2_vl":
        return flat
    ids = {key: value for key, value in flat.items() if key.endswith("_token_id")}
    if family == "qwen2_5_vl":
        vision = {
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": 32,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "spatial_patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        }
        return flat | {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": family, "vision_config": vision}
    text = {
        key: flat[key]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    }
    rope = {"mrope_interleaved": True, "mrope_section": [1, 1, 2], "rope_type": "default"}
    text |= {"model_type": "qwen3_vl_text", "head_dim": 8, "max_position_embeddings": 4096, "rope_scaling": rope, "rope_theta": 5000000}
    text |= {"bos_token_id": ids["bos_token_id"], "eos_token_id": ids["eos_token_id"], "dtype": "float32"}
    vision = {
        "deepstack_visual_indexes": [0],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "intermediate_size": 48,
        "model_type": family,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": 32,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    own = {key: value for key, value in ids.items() if key not in ("bos_token_id", "eos_token_id")}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": family,
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": vision,
    } | own


def judge_preprocessor(family: str) -> dict:
    """preprocessor_config.json as each family has it."""
    common = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
    if family == "qwen3_vl":
        half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        return common | half | {"size": {"longest_edge": 9216, "shortest_edge": 1024}, "image_processor_type": "Qwen2VLImageProcessorFast"}
    return common | OPENAI | {"min_pixels": 1024, "max_pixels": 9216}


WRITERS: dict[str, Callable[[Path], None]] = {
    "image-reward": write_image_reward,
    "hpsv3": write_hpsv3,
    "hpsv3++": write_hpsv3_plus,
    "vqascore": write_vqascore,
    "vlm-judge": write_judge,
    "image-sentiment": functools.partial(tiny_clips.write_open_clip, seed=1, quick_gelu=True),
}


def write_all(root: Path) -> None:
    """One folder for each reward, by name."""
    for name, write in WRITERS.items():
        write(root / name)
