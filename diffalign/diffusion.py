"""The algebra of diffusion and flow models, once: levels, conversions, noising, Gaussian steps and their log-probabilities.

Every network here is read as a denoiser. Its input at step i is x_i = a_i x0 + s_i eps, where a is the signal, s the noise, x0 the
clean latents and eps ~ N(0, I); variance-preserving models have a^2 + s^2 = 1, flow models a = 1 - s. From x and what the network
predicts, x0 and eps follow:

    epsilon        x0 = (x - s eps) / a
    v_prediction   v = a eps - s x0      x0 = a x - s v       eps = s x + a v       (a^2 + s^2 = 1)
    sample         eps = (x - a x0) / s
    flow           v = eps - x0          x0 = x - s v         eps = x + a v         (a + s = 1)

A step from level (a, s) to (a', s') draws x' ~ N(mean, std^2 I), with s' <= s:

    DDIM        mean = a' x0 + sqrt(s'^2 - std^2) eps,  std = eta s' sqrt(1 - (a s' / a' s)^2)     Song et al. 2010.02502, eqs. 12, 16
    renoise     mean = a' x0,  std = s'                                            multistep consistency, Luo et al. 2310.04378, alg. 3
    flow SDE    mean = x + dt (v + g^2 / 2s (x + (1 - s) v)),  std = g sqrt(-dt),  g = scale sqrt(s / (1 - s))
                dt = s' - s < 0; Flow-GRPO, Liu et al. 2505.05470, eq. 9; at s = 1 its code takes s' under the root

DDIM's std is written with (a, s) instead of the cumulative alphas, so one formula serves both kinds of model; eta = 1 is the posterior
q(x' | x, x0). Everything is float32, whatever comes in: in half precision s'^2 - std^2 cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.noise import spread

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
Level = float | Float[Tensor, " b"]
"""A signal, a noise or a standard deviation: one for all samples, or one for each."""


@dataclass(frozen=True)
class Schedule:
    """The levels that a run visits, from noise to image, and what the network predicts at each."""

    timesteps: tuple[float, ...]
    """What the network is told at step i; n of them."""
    signal: tuple[float, ...]
    """a_i, n + 1 of them: the last is the level that the run ends at."""
    noise: tuple[float, ...]
    """s_i, n + 1 of them, descending; the last is 0 but for schedules that leave a little."""
    prediction: str
    """One of PREDICTIONS."""
    start: float = 1.0
    """The state at step 0 is this times unit-variance noise."""

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        n = len(self.timesteps)
        if n < 1 or not len(self.signal) == len(self.noise) == n + 1:
            raise ValueError(f"a schedule of {n} timesteps needs {n + 1} signals and noises, got {len(self.signal)} and {len(self.noise)}")

    @property
    def steps(self) -> int:
        """Evaluations of the network, guidance apart."""
        return len(self.timesteps)

    def to_x0(self, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The clean latents that the network's output means at step i."""
        return to_x0(x, output, self.signal[i], self.noise[i], self.prediction)

    def to_eps(self, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The noise that the network's output means at step i."""
        return to_eps(x, output, self.signal[i], self.noise[i], self.prediction)

    def add_noise(self, i: int, x0: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The input of the network at step i for clean latents x0 and noise eps."""
        return add_noise(x0, eps, self.signal[i], self.noise[i])


# ---- conversions -------------------------------------------------------------------------------------------------------------


def _level(value: Level, like: Tensor) -> float | Tensor:
    return spread(value.to(like.device, torch.float32), like) if isinstance(value, Tensor) else value


def add_noise(x0: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], signal: Level, noise: Level) -> Float[Tensor, "b ..."]:
    """a x0 + s eps, float32."""
    x0, eps = x0.float(), eps.float()
    return _level(signal, x0) * x0 + _level(noise, x0) * eps


def to_x0(
    x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."], signal: Level, noise: Level, prediction: str
) -> Float[Tensor, "b ..."]:
    """Clean latents from the network's input and output, float32. epsilon divides by the signal, which must not be 0."""
    x, output = x.float(), output.float()
    a, s = _level(signal, x), _level(noise, x)
    if prediction == "epsilon":
        return (x - s * output) / a
    if prediction == "v_prediction":
        return a * x - s * output
    if prediction == "flow":
        return x - s * output
    return output


def to_eps(
    x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."], signal: Level, noise: Level, prediction: str
) -> Float[Tensor, "b ..."]:
    """The noise in the network's input, float32. "sample" divides by the noise level, which must not be 0."""
    x, output = x.float(), output.float()
    a, s = _level(signal, x), _level(noise, x)
    if prediction == "v_prediction":
        return s * x + a * output
    if prediction == "flow":
        return x + a * output
    if prediction == "sample":
        return (x - a * output) / s
    return output


def from_x0(x: Float[Tensor, "b ..."], x0: Float[Tensor, "b ..."], signal: Level, noise: Level, prediction: str) -> Float[Tensor, "b ..."]:
    """The output by which a network of that prediction means x0: the inverse of `to_x0`, float32."""
    x, x0 = x.float(), x0.float()
    a, s = _level(signal, x), _level(noise, x)
    if prediction == "epsilon":
        return (x - a * x0) / s
    if prediction == "v_prediction":
        return (a * x - x0) / s
    if prediction == "flow":
        return (x - x0) / s
    return x0


def from_x0_and_eps(
    x0: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], signal: Level, noise: Level, prediction: str
) -> Float[Tensor, "b ..."]:
    """What a network is trained to predict at (a, s) for the pair (x0, eps): nothing is divided, so every level will do."""
    x0, eps = x0.float(), eps.float()
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        return _level(signal, x0) * eps - _level(noise, x0) * x0
    return eps - x0 if prediction == "flow" else x0


# ---- steps -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Where a step goes: x' ~ N(mean, std^2 I); std 0 is deterministic. `x0` is the prediction that it was made from."""

    mean: Float[Tensor, "b ..."]
    std: float
    x0: Float[Tensor, "b ..."]


class Sampler:
    """A rule for steps. The state that it carries is the network's input a x0 + s eps, unless it says otherwise."""

    def begin(self, schedule: Schedule, noise: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The state before step 0, from unit-variance noise."""
        return schedule.start * noise.float()

    def model_input(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The network's input at step i, from the state."""
        return x

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        """Where step i goes from state x, given the network's output for it."""
        raise NotImplementedError


@dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit steps, for every prediction; on flow models eta = 0 is Euler's method."""

    eta: float = 0.0
    """In [0, 1]: 0 deterministic, 1 the noise of DDPM's posterior."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        x0, eps = schedule.to_x0(i, x, output), schedule.to_eps(i, x, output)
        mean, std = ddim_step(x0, eps, schedule.signal[i], schedule.noise[i], schedule.signal[i + 1], schedule.noise[i + 1], self.eta)
        return Step(mean, std, x0)


@dataclass(frozen=True)
class Renoise(Sampler):
    """Predict x0, then noise it anew: how LCM, Hyper, DMD2 and SANA-Sprint take several steps."""

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        x0 = schedule.to_x0(i, x, output)
        return Step(schedule.signal[i + 1] * x0, schedule.noise[i + 1], x0)


@dataclass(frozen=True)
class FlowSDE(Sampler):
    """Flow-GRPO's stochastic steps with the marginals of the flow; flow models only."""

    scale: float = 0.7
    """a > 0 in g = a sqrt(s / (1 - s)); Flow-GRPO: 0.7."""

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        if schedule.prediction != "flow":
            raise ValueError(f"FlowSDE steps need a model that predicts a flow, and this one predicts {schedule.prediction}; use DDIM(eta)")
        mean, std = flow_sde_step(x, output, schedule.noise[i], schedule.noise[i + 1], self.scale)
        return Step(mean, std, schedule.to_x0(i, x, output))


def ddim_std(signal: float, noise: float, next_signal: float, next_noise: float, eta: float) -> float:
    """The standard deviation of a DDIM step from (a, s) to (a', s'); 0 for the step to a clean image."""
    if eta == 0 or next_noise == 0:
        return 0.0
    return eta * next_noise * math.sqrt(max(0.0, 1 - (signal * next_noise / (next_signal * noise)) ** 2))


def ddim_step(
    x0: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    signal: float,
    noise: float,
    next_signal: float,
    next_noise: float,
    eta: float = 0.0,
) -> tuple[Float[Tensor, "b ..."], float]:
    """(mean, std) of x' given the predictions x0 and eps at level (signal, noise)."""
    std = ddim_std(signal, noise, next_signal, next_noise, eta)
    return next_signal * x0.float() + math.sqrt(max(0.0, next_noise**2 - std**2)) * eps.float(), std


def flow_sde_step(
    x: Float[Tensor, "b ..."], velocity: Float[Tensor, "b ..."], noise: float, next_noise: float, scale: float = 0.7
) -> tuple[Float[Tensor, "b ..."], float]:
    """(mean, std) of x' for a flow model's velocity at noise level s. At s = 1 the root takes s' in its denominator, as the code does."""
    x, velocity = x.float(), velocity.float()
    dt = next_noise - noise
    g = scale * math.sqrt(noise / (1 - (noise if noise < 1 else next_noise)))
    mean = x + dt * (velocity + g**2 / (2 * noise) * (x + (1 - noise) * velocity))
    return mean, g * math.sqrt(-dt)


def log_prob(x: Float[Tensor, "b ..."], mean: Float[Tensor, "b ..."], std: Level) -> Float[Tensor, " b"]:
    """ln N(x; mean, std^2 I) of each sample in nats, summed over its entries.

    ValueError for a std that is not above 0: a deterministic step has no density, and DDIM's last step is deterministic for every eta.
    """
    std = torch.as_tensor(std, dtype=torch.float32, device=x.device)
    if not bool((std > 0).all()):
        raise ValueError(f"a step with std {std.min().item():g} has no log-probability; leave the last step out, and take eta above 0")
    squares = (x.float() - mean.float()).square().flatten(1).sum(1)
    return -squares / (2 * std**2) - x[0].numel() * (std.log() + 0.5 * math.log(2 * math.pi))
