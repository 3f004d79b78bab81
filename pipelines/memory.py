"""Where a pipeline's parts live and how they attend: less memory, for a stated price.

Gradient checkpointing is a method of every pipeline (backbone.py); this is what a loader arranges once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def use_xformers(pipeline: Any) -> None:
    """xformers' memory-efficient attention, by diffusers' own switch. ImportError with the remedy where it is not installed."""
    try:
        import xformers  # noqa: F401
    except ImportError as error:
        raise ImportError("attention='xformers' needs that package; install it with: pip install 'diffalign[xformers]'") from error
    pipeline.enable_xformers_memory_efficient_attention()


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The components that read prompts, by name."""
    return {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None}


def offload_text_encoders(pipeline: Any, device: torch.device) -> None:
    """The text encoders stay on the CPU; `device` holds one layer of them at a time, while they encode. Nothing needs their gradient."""
    from accelerate import cpu_offload

    for encoder in text_encoders(pipeline).values():
        cpu_offload(encoder, execution_device=device)


def move(pipeline: Any, device: torch.device) -> Any:
    """The pipeline with every part on `device` but those that are offloaded."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and not hasattr(part, "_hf_hook"):
            part.to(device)
    return pipeline
