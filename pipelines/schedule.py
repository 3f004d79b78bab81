"""What a diffusers scheduler says, in our terms: what the network predicts, and its input as a x0 + s eps at every step."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import Sampler, Schedule, Step


def prediction_of(scheduler: Any) -> str:
    """ "epsilon", "v_prediction", "sample", "flow" or "unknown"."""
    config = scheduler.config
    stated = config.get("prediction_type")
    if type(scheduler).__name__.startswith("FlowMatch") or stated in ("flow_prediction", "flow"):
        return "flow"
    known = stated in ("epsilon", "v_prediction", "sample") and getattr(scheduler, "alphas_cumprod", None) is not None
    return stated if known else "unknown"


def levels(scheduler: Any, timesteps: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Signal a and noise s at each timestep; two empty tuples where unknown.

    For variance-preserving schedulers a^2 + s^2 = 1, whatever they carry between steps: `scale_model_input` gives the network that.
    Fractional timesteps (Karras and the like) are interpolated in log(s / a), which is how those schedulers made them from sigma.
    """
    prediction = prediction_of(scheduler)
    if prediction == "unknown":
        return (), ()
    if prediction == "flow":
        noise = tuple(t / scheduler.config.num_train_timesteps for t in timesteps)
        return tuple(1 - s for s in noise), noise
    squares = scheduler.alphas_cumprod.tolist()
    pairs = [_interpolated(squares, t) for t in timesteps]
    return tuple(a for a, _ in pairs), tuple(s for _, s in pairs)


def _interpolated(squares: Sequence[float], t: float) -> tuple[float, float]:
    t = min(max(t, 0.0), len(squares) - 1.0)
    low = int(t)
    square = squares[low]
    if t > low and 0 < squares[low + 1] < 1 and 0 < square < 1:
        logs = [math.log((1 - each) / each) for each in (square, squares[low + 1])]
        square = 1 / (1 + math.exp(logs[0] + (t - low) * (logs[1] - logs[0])))
    return math.sqrt(square), math.sqrt(1 - square)


def with_timesteps(scheduler: Any, steps: int | None, device: Any = None, **given: Any) -> Any:
    """A copy of the scheduler, set to `steps` or to the timesteps or sigmas in `given` (None: absent), as a stock call sets it.

    `given` may also hold what only some schedulers take (mu). ValueError where this one does not take it.
    """
    scheduler = copy.deepcopy(scheduler)
    given = {name: value for name, value in given.items() if value is not None}
    taken = inspect.signature(scheduler.set_timesteps).parameters
    for name in given:
        if name not in taken:
            raise ValueError(f"{type(scheduler).__name__} takes no {name}; use another scheduler, or give num_inference_steps alone")
    if not {"timesteps", "sigmas"} & set(given):
        given["num_inference_steps"] = steps
    scheduler.set_timesteps(**given, device=device)
    return scheduler


def schedule_of(scheduler: Any, repeats: bool = False) -> Schedule:
    """The levels that a scheduler visits, once its timesteps are set.

    repeats: keep the second visits of schedulers that evaluate a level twice (Heun, PNDM's warm-up), which only StockSampler understands.
    ValueError for a scheduler whose levels are not known: a family that has one overrides `schedule`.
    """
    prediction = prediction_of(scheduler)
    if prediction == "unknown":
        raise ValueError(f"the levels of {type(scheduler).__name__} are not known; use DDIMScheduler, an Euler or a flow-matching one")
    timesteps = [float(t) for t in torch.as_tensor(scheduler.timesteps)]
    order = [i for i, t in enumerate(timesteps) if repeats or i == 0 or t != timesteps[i - 1]]
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        kept = [float(sigmas[i]) for i in order] + [float(sigmas[-1])]
        pairs = [(1 - s, s) if prediction == "flow" else (1 / math.hypot(1, s), s / math.hypot(1, s)) for s in kept]
    else:
        visited = [timesteps[i] for i in order]
        pairs = list(zip(*levels(scheduler, visited), strict=True))
        # LCM returns its last prediction of the clean latents as it is, whatever set_alpha_to_one says of the level behind it
        clean = prediction == "flow" or type(scheduler).__name__ == "LCMScheduler"
        square = 1.0 if clean else float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        pairs.append((math.sqrt(square), math.sqrt(1 - square)))
    return Schedule(
        timesteps=tuple(timesteps[i] for i in order),
        signal=tuple(a for a, _ in pairs),
        noise=tuple(s for _, s in pairs),
        prediction=prediction,
        start=_start(scheduler),
    )


def _start(scheduler: Any) -> float:
    """What unit noise is multiplied by on its way into the network at the first step."""
    scheduler = copy.deepcopy(scheduler)
    one = torch.ones(1, dtype=torch.float64) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    scale = getattr(scheduler, "scale_model_input", None)
    return float(scale(one, scheduler.timesteps[0]) if scale is not None else one)


class StockSampler(Sampler):
    """The arithmetic of a stock scheduler, of any order, inside our loop; equal to the stock loop to the bit.

    It goes with `schedule_of(scheduler, repeats=True)`. One instance serves one rollout whose rows stay where they are, since it keeps
    what the scheduler keeps. `Step.std` is 0: what the
    scheduler draws is in the mean, from `generators`, and has no log-probability.
    """

    def __init__(self, scheduler: Any, generators: Sequence[torch.Generator] | None = None, **arguments: Any) -> None:
        """scheduler: with its timesteps set (`with_timesteps`). arguments: for its `step`, such as eta, where it takes them."""
        self.scheduler = scheduler
        given = {**arguments, "generator": None if generators is None else list(generators)}
        taken = inspect.signature(scheduler.step).parameters
        self.arguments = {name: value for name, value in given.items() if name in taken and value is not None}
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def begin(self, schedule: Schedule, noise: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def model_input(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        scale = getattr(self.scheduler, "scale_model_input", None)
        return x if scale is None else scale(x, self.scheduler.timesteps[i])

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        seen = self.model_input(schedule, i, x)
        after = self.scheduler.step(output, self.scheduler.timesteps[i], x, **self.arguments, return_dict=False)[0]
        return Step(after, 0.0, schedule.to_x0(i, seen, output))
