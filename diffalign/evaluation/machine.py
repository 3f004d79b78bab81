"""What a record says of where it was made, and numbers as JSON can hold them."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in ("diffalign", "torch", "diffusers", "transformers", "open_clip_torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: str | torch.device) -> dict[str, str | dict[str, str]]:
    """What a record says of where it was made."""
    return {"device": device_name(device), "versions": versions()}


def device_name(device: str | torch.device) -> str:
    """A torch device, or its name, in words that mean something on another machine."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def best_device(given: str | None) -> str:
    """The given device; else cuda where there is one, else the CPU."""
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def now() -> str:
    """The date as records have it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def finite_or_none(data: Any) -> Any:
    """The same data with numbers that JSON cannot hold (nan, inf) replaced by None."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: finite_or_none(value) for key, value in data.items()}
    return [finite_or_none(value) for value in data] if isinstance(data, list | tuple) else data
