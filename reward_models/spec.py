"""What is known of a reward without loading it: one row of the table in reward_models/table.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spec:
    """A reward's static facts.

    target: "module:Class" that implements it. paper: where the idea comes from. licence: of weights and code. range: what scores usually
    are, in the reward's own unit. unit: that unit. differentiable: whether gradients reach the images. needs_prompt: False where the prompt
    changes nothing.
    checkpoint: part -> where its weights lie by default, the main part first; see sources.py for what a place may be. Empty: no weights.
    memory: gigabytes (1e9 bytes) of weights in `dtype`. dtype: of the backbone, where the caller names none; heads and scores are float32.
    options: settings by which one class serves several names.
    """

    name: str
    target: str
    paper: str
    licence: str
    range: tuple[float, float]
    unit: str
    differentiable: bool = True
    needs_prompt: bool = True
    checkpoint: Mapping[str, str] = field(default_factory=dict)
    memory: float = 0.0
    dtype: str = "float32"
    options: tuple[tuple[str, str | int | float], ...] = ()
