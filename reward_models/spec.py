"""What is known of a reward without loading it: one row of the table in reward_models/table.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spec:
    """A reward's static facts."""

    name: str
    """What `load` calls it."""
    target: str
    """"module:Class" that implements it."""
    paper: str
    """Where the idea comes from."""
    licence: str
    """Of weights and code."""
    range: tuple[float, float]
    """What scores usually are, in the reward's own unit."""
    unit: str
    """That unit, in words."""
    differentiable: bool = True
    """Whether gradients reach the images."""
    needs_prompt: bool = True
    """False where the prompt changes nothing."""
    checkpoint: Mapping[str, str] = field(default_factory=dict)
    """Part -> where its weights lie by default, the main part first; sources.py says what a place may be. Empty: no weights."""
    memory: float = 0.0
    """Gigabytes (1e9 bytes) of weights in `dtype`."""
    dtype: str = "float32"
    """Of the backbone, where the caller names none; heads and scores are float32."""
    options: Mapping[str, str | int | float] = field(default_factory=dict)
    """Settings by which one class serves several names."""
