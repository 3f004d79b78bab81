"""What makes two denoising runs the same to coefficients that were fitted to one of them, as plain JSON data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS_PER_PARAMETER = 16
NUMBERS_OF_NEGATIVE = 64
NOT_IDENTITY = ("_class_name", "_diffusers_version", "_use_default_values", "_name_or_path")


def identity_of(
    pipeline: Any,
    network: nn.Module,
    *,
    timesteps: Sequence[float],
    guidance_scale: float | None,
    shape: Sequence[int],
    negative: Tensor | None,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """negative: the unconditional text embeddings, "b ...". arguments: the network's keyword arguments. shape: one sample's latents."""
    return {
        "network": f"{type(_unwrapped(network)).__name__} {weights_digest(network)}",
        "adapters": adapters(network),
        "scheduler": f"{type(pipeline.scheduler).__name__} {config_digest(pipeline.scheduler.config)}",
        "timesteps": [float(t) for t in timesteps],
        "guidance_scale": guidance_scale,
        "guidance_rescale": float(getattr(pipeline, "guidance_rescale", 0.0) or 0.0),
        "latent_shape": list(shape),
        "negative": negative_summary(negative),
        "inputs": used_inputs(arguments),
    }


def weights_digest(network: nn.Module) -> str:
    """12 hexadecimal digits from a few numbers of every parameter. float16 weights have the digest of the same ones kept in float32."""
    names, values = [], []
    for name, parameter in network.named_parameters():
        names.append(f"{name.removeprefix('_orig_mod.')} {tuple(parameter.shape)}")
        if parameter.numel() and not parameter.is_meta:
            places, weights = _places(parameter.numel(), parameter.device), parameter.detach()
            # in the order of a contiguous tensor, without a copy of one that is not
            found = weights.view(-1)[places] if weights.is_contiguous() else weights[torch.unravel_index(places, weights.shape)]
            values.append(found.float())
    digest = hashlib.sha256("\n".join(names).encode())
    if values:
        digest.update(torch.cat(values).cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


@cache
def _places(numbers: int, device: torch.device) -> Tensor:
    return torch.linspace(0, numbers - 1, min(numbers, WEIGHTS_PER_PARAMETER)).long().to(device)


def adapters(network: nn.Module) -> list[str]:
    """The active LoRA adapters with their scales, as "name=scale"; merged ones show in the weights instead."""
    found = set()
    for module in network.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and not getattr(module, "disable_adapters", False):
            found |= {f"{name}={float(scaling[name]):.6g}" for name in getattr(module, "active_adapters", ()) if name in scaling}
    return sorted(found)


def config_digest(config: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in config.items() if name not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def negative_summary(negative: Tensor | None) -> list[float] | str | None:
    """Numbers spread over the embedding, to be compared with tolerance; "several" where samples have different negative prompts."""
    if negative is None:
        return None
    flat = negative.detach().float().flatten(1)
    scale = flat.square().mean().sqrt().clamp_min(1e-6)
    if (flat - flat[:1]).abs().max() > 0.01 * scale:
        return "several"
    places = torch.linspace(0, flat.shape[1] - 1, min(flat.shape[1], NUMBERS_OF_NEGATIVE)).long()
    return [round(value, 4) for value in flat[0, places.to(flat.device)].tolist()]


def used_inputs(arguments: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the arguments that are given, with the value of plain numbers (a LoRA scale, say)."""
    names = []
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            names += used_inputs(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            names.append(f"{prefix}{name}={value:.6g}")
        elif value is not None and not isinstance(value, bool):
            names.append(prefix + name)
    return sorted(names)


def _unwrapped(network: nn.Module) -> nn.Module:
    return getattr(network, "_orig_mod", network)
