"""The training loop of the shapes models: seeded per step, resumable at any moment, nothing half-written.

Step k draws everything random from seed (seed, k), so a run that was stopped and resumed equals one that was not.
The state (weights, average, Adam moments) is one safetensors file, replaced atomically.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopConfig:
    """steps; peak learning rate, reached after `warmup` steps and brought to zero along a cosine; decay of the weight average."""

    steps: int
    lr: float
    seed: int = 0
    warmup: int = 200
    ema_decay: float = 0.999
    clip_grad_norm: float = 1.0
    weight_decay: float = 0.0
    save_every: int = 250


@dataclass
class Trainee:
    """What a loop trains: the modules by name, their averaged weights, the optimiser, and where its state lives."""

    modules: dict[str, nn.Module]
    config: LoopConfig
    state_path: Path
    step: int = 0
    seconds: float = 0.0
    average: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = {f"{m}.{n}": p for m, module in self.modules.items() for n, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)
        if self.state_path.exists():
            self._load()

    def save(self) -> None:
        tensors = {f"weight/{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"average/{n}": a for n, a in self.average.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"adam.{key}/{name}"] = value
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state_path.with_suffix(".tmp")
        metadata = {"step": str(self.step), "seconds": str(self.seconds), "config": json.dumps(self.config.__dict__)}
        save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, temporary, metadata)
        os.replace(temporary, self.state_path)

    def _load(self) -> None:
        with safe_open(self.state_path, "pt") as file:
            metadata = file.metadata()
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        for name, p in self.parameters.items():
            p.data.copy_(stored[f"weight/{name}"])
            self.average[name].copy_(stored[f"average/{name}"])
            adam = {key: stored[f"adam.{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}/{name}" in stored}
            if adam:
                # Laid out in memory like the weight: the fused optimiser walks both in storage order, whatever their strides.
                where = {k: v.to(p.device) if k == "step" else torch.empty_like(p.detach()).copy_(v) for k, v in adam.items()}
                self.optimizer.state[p] = where
        logger.info("resumed %s at step %d", self.state_path, self.step)

    def use_average(self) -> None:
        """Put the averaged weights into the modules (at the end, before they are saved)."""
        for name, p in self.parameters.items():
            p.data.copy_(self.average[name])


def progress(state_path: Path) -> tuple[int, float]:
    """(steps done, seconds spent) of a stored training state."""
    with safe_open(state_path, "pt") as file:
        metadata = file.metadata()
    return int(metadata["step"]), float(metadata["seconds"])


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


LossOf = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]


def train(trainee: Trainee, loss_of: LossOf, label: str, companions: tuple[Trainee, ...] = (), until: int | None = None) -> None:
    """Run to config.steps, or to `until` of them, at the learning rates of the whole schedule.

    `loss_of(step, generator)` gives the loss and figures for the progress bar.
    Companions are updated by `loss_of` itself and saved together with the trainee. Ctrl-C and errors save, then propagate.
    Raises FloatingPointError when the loss is not finite.
    """
    config = trainee.config
    start, before = time.monotonic(), trainee.seconds

    def save_all() -> None:
        for one in (trainee, *companions):
            one.save()

    end = config.steps if until is None else min(until, config.steps)
    bar = tqdm(range(trainee.step, end), initial=trainee.step, total=end, desc=label, mininterval=5)
    try:
        for step in bar:
            for group in trainee.optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            loss, figures = loss_of(step, torch.Generator().manual_seed(config.seed * 1_000_003 + step))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{label}: the loss is {loss.item()} at step {step}; lower the learning rate (now {config.lr})")
            trainee.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainee.parameters.values(), config.clip_grad_norm)
            trainee.optimizer.step()
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(trainee.average.values()), [p.detach() for p in trainee.parameters.values()], 1 - decay)
            trainee.step = step + 1
            trainee.seconds = before + time.monotonic() - start
            if step % 20 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()})
            if trainee.step % config.save_every == 0:
                save_all()
    finally:
        save_all()
