"""The training loop: one for every objective.

Step k takes the samples k B ... k B + B - 1 of an endless stream and cuts them into micro-batches of m samples. Micro-batch j has random
numbers of its own, from (seed, k, j), and is the unit that everything is counted in: one process runs all B / m of them and adds the
gradients up, n processes run every n-th and sum over processes. So accumulation and the number of processes change nothing but
the order in which numbers are added, groups of samples stay together, and a run that was stopped and resumed equals one that was not.

Gradients are summed over processes here, in one message, rather than by a wrapper around the network: the objectives call the network as
they like (reference, rollouts, several levels), and an adapter's gradient is small.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm import tqdm

from diffalign.files import appending, differing_settings, read_lines, write_text
from diffalign.training import checkpoint
from diffalign.training.contract import Objective
from diffalign.training.data import Data, seeded
from diffalign.training.policy import Policy

METRICS, STATE = "metrics.jsonl", Path("checkpoint") / "state.safetensors"
SCHEDULES, PRECISIONS = ("constant", "cosine"), ("no", "bf16")
NOTHING: Mapping[str, Any] = MappingProxyType({})

Evaluate = Callable[[Policy, int], Mapping[str, float]]
"""evaluate(policy, step): figures on what is held out; the weights to be judged are in force. "score" is what early stop maximises."""


@dataclass(frozen=True)
class LoopSettings:
    """How a run goes. Learning rates are absolute: they do not grow with the batch or the number of devices."""

    steps: int = 200
    """Batches to learn from, >= 1."""
    lr: float = 1e-4
    """Peak learning rate of AdamW, > 0."""
    warmup: int = 10
    """Steps in which it rises to its peak in a line, >= 0."""
    schedule: str = "constant"
    """After that: "constant", or "cosine" down to zero at the last step."""
    batch_size: int = 16
    """Samples in a step, over all processes, >= 1."""
    micro_batch: int | None = None
    """Samples at once, a divisor of batch_size; None: all. Less memory, and what several processes share out."""
    updates_per_batch: int = 1
    """Optimiser steps on what was collected for a batch, >= 1; 1 for objectives on data."""
    seed: int = 0
    """Everything random comes from it and the step, >= 0."""
    clip: float = 1.0
    """Largest norm of the gradient over all weights, > 0; longer ones are scaled down to it."""
    weight_decay: float = 0.0
    """AdamW's, >= 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the gradient's average and of its square's, in [0, 1)."""
    weight_budget: float | None = None
    """Largest L2 distance of all weights from where they began, > 0: a step that goes further is drawn back to it; None: no limit."""
    average: float | None = None
    """Decay of the moving average of the weights (EMA), in (0, 1), which is then what is evaluated and saved; None: no average."""
    precision: str = "no"
    """"bf16": the network computes in bfloat16, weights and optimiser stay as they are; "no": as the weights are."""
    save_every: int = 50
    """Steps between checkpoints, >= 1; one is also written at the end and when the run is stopped."""
    evaluate_every: int = 0
    """Steps between evaluations, of which the first is before step 1; 0: none."""
    patience: int | None = None
    """Stop after so many evaluations without a better score, >= 1; None: go on. The best weights are returned either way."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("batch_size", 1), ("updates_per_batch", 1), ("seed", 0), ("save_every", 1),
                            ("evaluate_every", 0)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a finite number greater than 0, got {getattr(self, name)!r}")
        if self.schedule not in SCHEDULES or self.precision not in PRECISIONS:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} and precision one of {', '.join(PRECISIONS)}; "
                             f"got {self.schedule!r} and {self.precision!r}")  # fmt: skip
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch_size % self.micro_batch):
            raise ValueError(f"micro_batch must divide batch_size, {self.batch_size}; got {self.micro_batch!r}")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average must lie in (0, 1), got {self.average!r}")
        if self.weight_budget is not None and not self.weight_budget > 0:
            raise ValueError(f"weight_budget must be greater than 0, got {self.weight_budget!r}; leave it out for no limit")
        if self.patience is not None and (self.patience < 1 or not self.evaluate_every):
            raise ValueError(f"patience must be at least 1 and needs evaluate_every; got {self.patience!r} and {self.evaluate_every}")

    @property
    def micro_batches(self) -> int:
        """In a step, over all processes."""
        return self.batch_size // (self.micro_batch or self.batch_size)

    def learning_rate(self, step: int) -> float:
        """At step 0, 1, ..."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)))


@dataclass(frozen=True)
class Trained:
    """How a run ended. The policy holds the weights to keep."""

    step: int
    """Steps that were made."""
    kept_step: int
    """After which of them the policy's weights are those that are kept: the last, or that of the best evaluation."""
    seconds: float
    figures: Mapping[str, float]
    """Of the last step."""
    evaluations: tuple[Mapping[str, float], ...] = ()
    """In order; each names its step."""


def train(
    policy: Policy,
    objective: Objective,
    data: Data,
    settings: LoopSettings,
    folder: Path,
    *,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    track: bool = False,
    facts: Mapping[str, Any] = NOTHING,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Trained:
    """Trains, writing metrics.jsonl and checkpoints into `folder`; the policy ends with the weights to keep.

    resume: go on from the folder's checkpoint, or begin where there is none. track: TensorBoard too. facts: what else, as JSON data, a
    resumed run must agree in (the data, the pipeline). on_step(step, figures) is called after every step.

    SIGTERM and Ctrl-C end the step, save and raise KeyboardInterrupt. Raises FloatingPointError where the loss or the gradient is not
    finite, with the step and the learning rate; ValueError where the folder holds a run that is not to be resumed, or other settings.
    """
    run = _Run(policy, objective, data, settings, folder, evaluate, facts)
    run.begin(resume)
    with run.metrics(track) as log, _stop_on_signals() as stopping:
        figures = run.loop(log, stopping, on_step)
    return run.finish(figures)


class _Run:
    def __init__(
        self, policy: Policy, objective: Objective, data: Data, settings: LoopSettings, folder: Path, evaluate: Evaluate | None, facts: Any
    ) -> None:
        if settings.evaluate_every and evaluate is None:
            raise ValueError("evaluate_every is given without evaluate=, a function that judges the policy; give both or neither")
        self.policy, self.objective, self.data, self.settings, self.folder = policy, objective, data, settings, folder
        self.evaluate = evaluate if settings.evaluate_every else None
        self.learner, self.reference = policy.denoiser(), policy.reference()
        self.parameters = policy.parameters
        self.device = next(iter(self.parameters.values())).device
        self.processes = PartialState(cpu=self.device.type == "cpu")
        if settings.micro_batches % self.processes.num_processes:
            raise ValueError(f"a step has {settings.micro_batches} micro-batches, which {self.processes.num_processes} processes cannot "
                             "share out evenly; choose another micro_batch")  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.state = checkpoint.State(average=policy.weights() if settings.average is not None else {})
        self.described = {**asdict(settings), "objective": {"name": objective.name, **objective.settings()}, **facts}
        self.evaluations: list[Mapping[str, float]] = []

    # ---- beginning and end --------------------------------------------------------------------------------------------------------

    def begin(self, resume: bool) -> None:
        file = self.folder / STATE
        if not file.exists():
            if (self.folder / METRICS).exists() and not resume:
                raise ValueError(f"out: {self.folder} holds another run's {METRICS}; choose another folder, or delete it")
        elif not resume:
            raise ValueError(f"out: {self.folder} holds a run; resume it (--resume), choose another folder, or delete it")
        else:
            changed = differing_settings(checkpoint.settings_of(file), self.described)
            if self.settings.schedule == "constant":
                changed = [change for change in changed if not change.startswith("steps: ")]  # a longer run begins as a shorter one does
            if changed:
                raise ValueError(f"out: the run in {self.folder} has other settings ({'; '.join(changed)}); give those, or another folder")
            self.state = checkpoint.load(file, self.parameters, self.optimizer)
        if self.processes.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_lines(self.folder / METRICS) if line["step"] <= self.state.step]
            self.evaluations = [line for line in kept if "score" in line]
            if kept or (self.folder / METRICS).exists():
                write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self.processes.wait_for_everyone()

    def save(self) -> None:
        if self.processes.is_main_process:
            checkpoint.save(self.folder / STATE, self.state, self.parameters, self.optimizer, self.described)

    def finish(self, figures: Mapping[str, float]) -> Trained:
        state = self.state
        if state.best:
            self.policy.set_weights({name: tensor.to(self.device) for name, tensor in state.best.items()})
        elif state.average:
            self.policy.set_weights(state.average)
        self.processes.wait_for_everyone()
        kept = state.step if state.best_step is None else state.best_step
        return Trained(state.step, kept, state.seconds, figures, tuple(self.evaluations))

    @contextmanager
    def metrics(self, track: bool) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        if not self.processes.is_main_process:
            yield lambda step, figures: None
            return
        tracker = _tensorboard(self.folder) if track else None
        with appending(self.folder / METRICS) as append:

            def log(step: int, figures: Mapping[str, float]) -> None:
                # JSON has no nan; an undefined figure, such as a share of nothing, is null
                append([{"step": step, **{name: value if math.isfinite(value) else None for name, value in figures.items()}}])
                if tracker is not None:
                    tracker.log(dict(figures), step)

            try:
                yield log
            finally:
                if tracker is not None:
                    tracker.finish()

    # ---- the loop -----------------------------------------------------------------------------------------------------------------

    def loop(self, log: Any, stopping: threading.Event, on_step: Any) -> Mapping[str, float]:
        settings, state = self.settings, self.state
        started, before = time.monotonic(), state.seconds
        figures: Mapping[str, float] = {}
        hidden = None if self.processes.is_main_process else True
        with tqdm(total=settings.steps, initial=state.step, desc=self.objective.name, unit="step", disable=hidden) as bar:
            if state.step == 0:
                self.judge(log)
            while state.step < settings.steps and not self.exhausted():
                figures, stop = self.step(state.step, stopping.is_set())
                state.step += 1
                state.seconds = before + time.monotonic() - started
                log(state.step, {**figures, "lr": settings.learning_rate(state.step - 1), "seconds": state.seconds})
                bar.update()
                bar.set_postfix({name: f"{figures[name]:.4g}" for name in ("loss", "gradient_norm")}, refresh=False)
                if on_step is not None:
                    on_step(state.step, figures)
                if settings.evaluate_every and state.step % settings.evaluate_every == 0:
                    self.judge(log)
                if state.step % settings.save_every == 0 or state.step == settings.steps or stop or self.exhausted():
                    self.save()
                if stop and state.step < settings.steps:
                    raise KeyboardInterrupt(f"stopped at step {state.step}, which is saved in {self.folder}; resume goes on from there")
        return figures

    def exhausted(self) -> bool:
        return self.settings.patience is not None and self.state.evaluations_since_best >= self.settings.patience

    def step(self, step: int, stop: bool) -> tuple[dict[str, float], bool]:
        """One batch: (figures, whether any process was asked to stop)."""
        settings = self.settings
        size = settings.batch_size // settings.micro_batches
        mine = range(self.processes.process_index, settings.micro_batches, self.processes.num_processes)
        collected = []
        for j in mine:
            first = step * settings.batch_size + j * size
            with torch.no_grad(), self.precision():
                collected.append(
                    self.objective.collect(self.learner, self.data.take(range(first, first + size)), self.generator(step, j, 0))
                )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate(step)
        figures: dict[str, float] = {}
        for update in range(settings.updates_per_batch):
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            sums: dict[str, float] = {}
            for j, batch in zip(mine, collected, strict=True):
                with self.precision():
                    loss, found = self.objective.loss(self.learner, self.reference, batch, self.generator(step, j, 1 + update))
                (loss / settings.micro_batches).backward()
                for name, value in {**found, "loss": loss.item()}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) / settings.micro_batches
            figures, stop = self.share(sums, stop)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip).item()
            figures["gradient_norm"] = norm
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(figures[name]):
                    raise FloatingPointError(f"the {name.replace('_', ' ')} is {figures[name]} at step {step + 1}, with a learning rate of "
                                             f"{settings.learning_rate(step):g}; lower it, or look at the data. The weights are as they "
                                             f"were before this update; the last checkpoint is in {self.folder}")  # fmt: skip
            self.optimizer.step()
            if settings.weight_budget is not None:
                figures["weight_distance"] = self.policy.draw_back(settings.weight_budget)
            if settings.average is not None:
                with torch.no_grad():
                    decay = min(settings.average, (1 + step) / (10 + step))  # the start, which is far off, is forgotten sooner
                    averages = [self.state.average[name] for name in self.parameters]
                    torch._foreach_lerp_(averages, [p.detach() for p in self.parameters.values()], 1 - decay)
        return figures, stop

    def share(self, sums: dict[str, float], stop: bool) -> tuple[dict[str, float], bool]:
        """Gradients and figures summed over processes, in one message."""
        if self.processes.num_processes == 1:
            return sums, stop
        names = sorted(sums)
        grads = [p.grad for p in self.parameters.values()]
        told = torch.tensor([*(sums[name] for name in names), float(stop)], device=self.device)
        flat = reduce(torch.cat([*(grad.flatten() for grad in grads), told]), "sum")
        for grad, part in zip(grads, flat[: -len(told)].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        values = flat[-len(told) :].tolist()
        return dict(zip(names, values[:-1], strict=True)), values[-1] > 0

    def judge(self, log: Any) -> None:
        """Evaluates what would be saved now; keeps it where it is the best so far."""
        if self.evaluate is None:
            return
        state, learned = self.state, self.policy.weights()
        if state.average:
            self.policy.set_weights(state.average)
        try:
            with torch.no_grad():
                figures = dict(self.evaluate(self.policy, state.step))
            if not math.isfinite(figures.get("score", math.nan)):
                raise ValueError(f'evaluate must return a finite "score", got {figures.get("score")!r} at step {state.step}')
            if state.best_score is None or figures["score"] > state.best_score:
                state.best = {name: tensor.cpu() for name, tensor in self.policy.weights().items()}
                state.best_step, state.best_score, state.evaluations_since_best = state.step, figures["score"], 0
            else:
                state.evaluations_since_best += 1
        finally:
            self.policy.set_weights(learned)
        self.evaluations.append({"step": state.step, **figures})
        log(state.step, figures)

    def generator(self, step: int, micro: int, use: int) -> torch.Generator:
        return seeded(self.settings.seed, 3, step, micro, use)

    def precision(self) -> Any:
        return nullcontext() if self.settings.precision == "no" else torch.autocast(self.device.type, torch.bfloat16)


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Inside the block, SIGTERM and the first Ctrl-C set the event instead of ending the process; a second Ctrl-C does as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tensorboard(folder: Path) -> Any:
    """Raises ImportError where the extra is missing."""
    from accelerate.tracking import TensorBoardTracker
    from accelerate.utils import is_tensorboard_available

    if not is_tensorboard_available():
        raise ImportError("track needs TensorBoard: pip install 'diffalign[track]'")
    tracker = TensorBoardTracker("tensorboard", folder)
    if hasattr(tracker, "start"):  # newer versions of accelerate open the file there
        tracker.start()
    return tracker
