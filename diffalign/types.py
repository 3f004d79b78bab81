"""The vocabulary shared by every part: what a reward, a search over noise and a step method are, and what they return.

Shapes: images are "b 3 h w" floats in [0, 1], RGB, and videos "b f 3 h w"; a search makes either, "b *f 3 h w". Noise is "b ..." float32
with unit variance, whatever the family's latent shape.
A sample is one image to be made; sample i of a batch has its own prompt, noise and seed, and never sees its batch mates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Conditioning
from diffalign.loop import DenoisingLoop
from diffalign.noise import NoiseDistribution

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


class RangedReward(Protocol):
    """A reward that judges predicted images by how much noise they were predicted from."""

    name: str

    def at(self, share: float) -> Reward:
        """Who judges predictions made at this share of noise, s / sqrt(a^2 + s^2) in [0, 1] at level (a, s)."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What a search reports each time its generator made images: the event behind progress bars and live pictures.

    A sample that has stopped is in no further event, so the rows of an event are those of one batch that was really made.
    A method that makes few images at once may report one evaluation in several events, of different rows each.
    """

    index: int
    """Which evaluation of these samples it is, from 0: the place of its scores in a Trace."""
    rows: Sequence[int]
    """Which samples it holds, in the order of scores and images."""
    scores: Mapping[str, Sequence[float]]
    """Each reward's score of every row, on the host; "total" is what is optimised."""
    images: Float[Tensor, "k *f 3 h w"]
    """The images of these rows, detached, in [0, 1], on the device that made them."""


Progress = Callable[[Evaluation], None]
"""Called after every evaluation. Raising in it stops the search."""


@dataclass(frozen=True)
class NoiseProblem:
    """What a NoiseMethod is given."""

    noise: Float[Tensor, "b ..."]
    """Where the search starts, unit variance."""
    prompts: Sequence[str]
    """One for each noise."""
    seeds: Sequence[int]
    """Everything random that a method draws for sample i must come from seeds[i]."""
    generate: Callable[[Float[Tensor, "k ..."], Sequence[int]], Float[Tensor, "k *f 3 h w"]]
    """generate(noise, rows): differentiable map from noise to images; rows[j] says which sample noise[j] belongs to."""
    progress: Progress | None = None
    """Hears of every evaluation, where given."""
    batch_size: int | None = None
    """Images that may well be made at once, where the model's preset knows; memory and speed only."""
    loop: DenoisingLoop | None = None
    """The inside of `generate`, for methods that steer it; None where there is no such loop."""
    conditioning: Conditioning | None = None
    """The prompts as the model reads them, one row for each noise, for methods that read them too."""


@dataclass
class Trace:
    """What happened, sample by sample."""

    method: str
    """Its `name`."""
    rewards: dict[str, list[list[float]]]
    """rewards[name][i]: sample i's scores, one per evaluation, fewer where it stopped early. "total" is what was optimised."""
    best: list[int]
    """best[i]: which evaluation's image was returned."""
    diagnostics: dict[str, list[list[float]]] = field(default_factory=dict)
    """Likewise one list per sample (noise norm, gradient norm, ...), possibly shorter than the rewards."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Every setting of the method. `budget`, where it has one: evaluations of the generator allowed for each sample."""

    def sample(self, i: int) -> dict[str, Any]:
        """Sample i's part as plain JSON data."""
        return {
            "method": self.method,
            "settings": self.settings,
            "best": self.best[i],
            "rewards": {name: series[i] for name, series in self.rewards.items()},
            "diagnostics": {name: series[i] for name, series in self.diagnostics.items()},
        }


@dataclass(frozen=True)
class Cost:
    """What a search has spent on one sample. `commands.cost` beside it counts passes of the network, whoever makes them."""

    evaluations: float
    """Whole generations; a trajectory that was dropped on its way counts as far as it went."""
    backward_passes: int
    """Gradients that were taken: through generator and reward, or, where a method steers, through decoder and reward."""
    reward_calls: int
    """Images that the reward saw, predicted ones too."""
    seconds: float
    """Of the wall clock, an equal share of the batch's."""
    peak_memory_mb: int | None
    """In 2**20 bytes, the batch's: of an accelerator since its statistics were reset, on a CPU of the process; None where nobody counts."""


@dataclass
class NoiseResult:
    """The best image and noise of every sample, the image it started from, and the trace."""

    images: Float[Tensor, "b *f 3 h w"]
    noise: Float[Tensor, "b ..."] | None
    """What makes `images` again; None where no initial noise does, because the loop was steered on its way."""
    initial_images: Float[Tensor, "b *f 3 h w"]
    trace: Trace
    distribution: NoiseDistribution | None = None
    """Of noises under which images score well, where the method learns one: more images of the same prompts can be drawn from it."""
    cost: Sequence[Cost] | None = None
    """Of every sample, where the method counts."""


class NoiseMethod(Protocol):
    """An outer loop over whole generations: ReNO, FIND, best-of-N."""

    name: str

    def search(self, problem: NoiseProblem) -> NoiseResult: ...


class StepMethod(Protocol):
    """An inner hook at each denoising step: Adaptive Guidance and its rivals. `attach` undoes everything on exit, also after an error."""

    name: str

    def attach(self, pipeline: Any) -> AbstractContextManager[Any]: ...
