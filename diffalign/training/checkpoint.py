"""The state of a training run, as one safetensors file that is replaced whole: killed at any moment, the last one stands.

One file and not a folder, because a file can be replaced in one step of the file system and a folder cannot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.files import whole_file


@dataclass
class State:
    """Where a run stands after `step` steps, apart from the weights and the optimiser's moments."""

    step: int = 0
    seconds: float = 0.0
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of the weights, if one is kept."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The weights with the best evaluation so far."""
    best_step: int | None = None
    best_score: float | None = None
    evaluations_since_best: int = 0


def save(path: Path, state: State, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, settings: Mapping) -> None:
    """settings: what the run must have been started with to go on from here, as JSON data."""
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in state.average.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in state.best.items()}
    for name, parameter in parameters.items():
        tensors |= {f"moment.{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    facts = {"step": state.step, "seconds": state.seconds, "best_step": state.best_step, "best_score": state.best_score,
             "evaluations_since_best": state.evaluations_since_best}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        metadata = {"state": json.dumps(facts), "settings": json.dumps(settings)}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata)


def settings_of(path: Path) -> dict[str, Any]:
    """What the run was started with. Raises ValueError where the file is no checkpoint."""
    return json.loads(_metadata(path)["settings"])


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}); delete it and train anew") from error
    if not {"state", "settings"} <= metadata.keys():
        raise ValueError(f"{path} is not a checkpoint of a training run; delete it and train anew")
    return metadata


@torch.no_grad()
def load(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    """Puts weights and moments back, to the bit. Raises ValueError where they are not those of `parameters`."""
    state = State(**json.loads(_metadata(path)["state"]))
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for full in file.keys():  # noqa: SIM118  (not a mapping)
            kind, name = full.split("/", 1)
            parts.setdefault(kind, {})[name] = file.get_tensor(full)
    weights = parts["weight"]
    if weights.keys() != parameters.keys():
        raise ValueError(f"{path} holds {len(weights)} weights, other than the {len(parameters)} that learn here; train anew")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
        moments = {kind.removeprefix("moment."): tensors[name] for kind, tensors in parts.items() if kind.startswith("moment.")}
        if moments:
            # moments lie in memory as their weight does, as the optimiser made them
            optimizer.state[parameter] = {
                key: value if key == "step" else torch.empty_like(parameter).copy_(value) for key, value in moments.items()
            }
    device = next(iter(parameters.values())).device
    state.average = {name: tensor.to(device) for name, tensor in parts.get("average", {}).items()}
    state.best = parts.get("best", {})
    return state
