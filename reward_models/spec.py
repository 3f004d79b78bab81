"""What is known of a reward without loading it: one row of the table in `reward_models`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """A reward's static facts.

    target: "module:Class" that implements it. paper: where the idea comes from. licence: of weights and code. range: what scores usually
    are, in the reward's own unit. unit: that unit. differentiable: whether gradients reach the images. needs_prompt: False where the prompt
    changes nothing. weights: the default folder inside the diffalign package, None where there is nothing to load.
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
    weights: str | None = None
    options: tuple[tuple[str, str | int | float], ...] = ()
