"""What a scheduler says of its steps, in the terms of guidance methods: what the network predicts, and its input as a x0 + s epsilon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


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
