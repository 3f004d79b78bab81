"""The vocabulary shared by every part: what a reward, a search over noise and a step method are, and what they return.

Shapes: images are "b 3 h w" floats in [0, 1], RGB. Noise is "b ..." float32 with unit variance, whatever the family's latent shape.
A sample is one image to be made; sample i of a batch has its own prompt, noise and seed, and never sees its batch mates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "b 3 h w"]
Scores = Float[Tensor, " b"]


@runtime_checkable
class RewardModel(Protocol):
    """Scores images against prompts; higher is better. `prepare` computes and caches the text side, so that scoring runs images only."""

    name: str
    differentiable: bool

    def prepare(self, prompts: Sequence[str]) -> None: ...

    def __call__(self, images: Images, prompts: Sequence[str]) -> Scores: ...


@dataclass(frozen=True)
class RewardScores:
    """What a mix returns: `total` is what is optimised, `parts` each member's own score, `watched` scores that are only reported."""

    total: Scores
    parts: Mapping[str, Scores]
    watched: Mapping[str, Scores] = field(default_factory=dict)


class Reward(Protocol):
    """A mix of reward models, as the methods see it. `differentiable` is False where any optimised member has no gradient."""

    differentiable: bool

    def prepare(self, prompts: Sequence[str]) -> None: ...

    def __call__(self, images: Images, prompts: Sequence[str]) -> RewardScores: ...


@dataclass(frozen=True)
class NoiseProblem:
    """What a NoiseMethod is given.

    noise: where the search starts. seeds: everything random that a method draws for sample i must come from seeds[i].
    generate(noise, rows): differentiable map from noise "k ..." to images "k 3 h w"; rows[j] says which sample noise[j] belongs to.
    progress(iteration, scores): called after every evaluation, for bars and live plots; raising in it stops the search.
    """

    noise: Float[Tensor, "b ..."]
    prompts: Sequence[str]
    seeds: Sequence[int]
    generate: Callable[[Float[Tensor, "k ..."], Sequence[int]], Float[Tensor, "k 3 h w"]]
    progress: Callable[[int, Mapping[str, Sequence[float]]], None] | None = None


@dataclass
class Trace:
    """What happened, sample by sample. `rewards[name][i]` lists sample i's scores, one per evaluation; "total" is the optimised sum.

    A sample that stopped early has a shorter list. `best[i]` is the index of the evaluation whose image was returned.
    `diagnostics[name][i]` is likewise one list per sample (noise norm, gradient norm, ...), possibly shorter than the rewards.
    """

    method: str
    rewards: dict[str, list[list[float]]]
    best: list[int]
    diagnostics: dict[str, list[list[float]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def sample(self, i: int) -> dict[str, Any]:
        """Sample i's part as plain JSON data."""
        return {
            "method": self.method,
            "settings": self.settings,
            "best": self.best[i],
            "rewards": {name: series[i] for name, series in self.rewards.items()},
            "diagnostics": {name: series[i] for name, series in self.diagnostics.items()},
        }


@dataclass
class NoiseResult:
    """The best image and noise of every sample, the image it started from, and the trace."""

    images: Images
    noise: Float[Tensor, "b ..."]
    initial_images: Images
    trace: Trace


class NoiseMethod(Protocol):
    """An outer loop over whole generations: ReNO, FIND, best-of-N."""

    name: str

    def search(self, problem: NoiseProblem) -> NoiseResult: ...


class StepMethod(Protocol):
    """An inner hook at each denoising step: Adaptive Guidance and its rivals. `attach` undoes everything on exit, also after an error."""

    name: str

    def attach(self, pipeline: Any) -> AbstractContextManager[Any]: ...


# ---- guidance --------------------------------------------------------------------------------------------------------------------

Branch = Literal["both", "conditional", "unconditional"]
"""What is evaluated of one sample at one step; classifier-free guidance evaluates both."""


@dataclass(frozen=True)
class GuidanceRun:
    """One denoising trajectory, as a guidance method sees it before the first step.

    samples: images that are made. timesteps: those ahead, one for each evaluation of the network. prediction: what the network predicts,
    "epsilon", "v_prediction", "sample", "flow" (velocity, noise - x0) or "unknown". signal, noise: a_i and s_i of step i, where the input
    of the network is a_i x0 + s_i epsilon; empty where unknown. guidance_scale: w in u + w (c - u), None where the pipeline does not tell.
    unconditional_alone: whether a step can do without the conditional branch. cosine_threshold: calibrated for this model, if it is.
    identity: what fitted coefficients depend on, as plain JSON data; may be called once the first step has been evaluated.
    """

    samples: int
    timesteps: tuple[float, ...]
    prediction: str
    signal: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    guidance_scale: float | None = None
    unconditional_alone: bool = True
    cosine_threshold: float | None = None
    identity: Callable[[], Mapping[str, Any]] = dict

    @property
    def steps(self) -> int:
        return len(self.timesteps)


class GuidancePolicy(Protocol):
    """The decisions of one trajectory. For every step, first `plan`, then `complete`.

    plan: what to evaluate, for each sample. complete: the conditional and the unconditional prediction of every sample, from `x` (the
    network's input, "b ...") and what was evaluated: `c` has the rows not planned "unconditional", `u` those not planned "conditional",
    in order. To guide a sample no further is to return its c as its u. Returning c and u themselves changes nothing, to the bit.
    switch: the following predictions come from another network. diagnostics: one list per sample each, as in Trace.
    """

    diagnostics: dict[str, list[list[float]]]

    def plan(self, step: int) -> Sequence[Branch]: ...

    def complete(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]: ...

    def switch(self) -> None: ...


class GuidanceMethod(StepMethod, Protocol):
    """A rule for where classifier-free guidance is worth its second evaluation. `begin` is called for every trajectory.

    settings: the method's own, as plain JSON data.
    """

    def begin(self, run: GuidanceRun) -> GuidancePolicy: ...

    def settings(self) -> dict[str, Any]: ...


@dataclass
class GuidanceReport:
    """What one trajectory cost. evaluations[i]: of the network, for sample i; full guidance makes 2 * steps. settings: the method's."""

    method: str
    steps: int
    evaluations: list[int]
    diagnostics: dict[str, list[list[float]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def saved(self) -> float:
        """The share of full guidance's evaluations that were not made, over all samples."""
        return 1 - sum(self.evaluations) / (2 * self.steps * len(self.evaluations))
