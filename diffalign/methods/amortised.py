"""Amortised noise: a search over the initial noise that was done beforehand, over many prompts, and now costs one small pass.

    eps' = policy(eps, p),   the image is G(eps', p)

The policy (diffalign/noise_policy.py) was trained by `diffalign.train_noise` (diffalign/training/objectives/noise.py) for one model: FIND's
normal distribution as a function of the prompt (Chen et al. 2024, 2407.19453), or a residual as in noise hypernetworks (Eyring et al. 2025,
2508.09968). With a budget above 1 it is best-of-N (methods/search.py) whose candidates the policy has moved; the k-th is the noise that
best-of-N would try as its k-th, moved.

Difference from both papers: the noise keeps its norm, and the policy is a small network of its own, not the generator with an adapter,
whose pass would cost as much again as the image.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.files import packaged_path
from diffalign.methods.checks import check_integer
from diffalign.methods.search import score_noises
from diffalign.methods.tracking import Tracker
from diffalign.noise import seeded_noise
from diffalign.noise_policy import NoisePolicy
from diffalign.types import NoiseProblem, NoiseResult, Reward, Trace

SHIPPED = "package:shapes/weights/shapes-turbo-noise"


@dataclass(frozen=True, eq=False)
class AmortisedNoise:
    """AmortisedNoise(folder, reward=None, budget=1). Raises FileNotFoundError for a folder that holds no policy."""

    name: ClassVar[str] = "amortised"

    folder: str | Path = SHIPPED
    """Where the trained policy lies; without one, the embedded model's."""
    reward: Reward | None = None
    """Chooses among candidates, where there are several, and scores one where it is given. It needs no gradient."""
    _: KW_ONLY
    budget: int = 1
    """Candidates of each sample, >= 1. Papers: 1."""
    batch_size: int | None = None
    """Images made at once, >= 1; None: what the model's preset says is good. Memory and speed only."""

    def __post_init__(self) -> None:
        check_integer("budget", self.budget, 1)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size, 1)
        if self.reward is None and self.budget > 1:
            raise ValueError(f"budget={self.budget} needs reward=, which chooses among the candidates; give one, or budget=1")
        if not self._path.is_dir():
            raise FileNotFoundError(f"there is no folder {self._path}; train a noise policy with diffalign.train_noise")

    @classmethod
    def shipped(cls, reward: Reward, *, budget: int = 1) -> AmortisedNoise:
        """The policy that comes with the embedded one-step model `shapes-turbo`."""
        return cls(SHIPPED, reward, budget=budget)

    @property
    def _path(self) -> Path:
        return packaged_path(str(self.folder)) or Path(self.folder).expanduser()

    @cached_property
    def policy(self) -> NoisePolicy:
        """The network, loaded when first used."""
        return NoisePolicy.load(self._path)

    @torch.no_grad()
    def search(self, problem: NoiseProblem) -> NoiseResult:
        """Moves the noise and makes the image; the noise returned is the moved one, whose image needs no policy.

        `initial_images` are those of the first candidates: the image of the given noise is never made. Raises ValueError where the policy
        was trained for another model, or the problem does not say how the model reads its prompts.
        """
        tracker = Tracker(problem)
        if self.reward is None:
            rows = range(len(problem.noise))
            noise = self.move(problem, tracker.noise, rows)
            images = problem.generate(noise, rows)
            tracker.charge(rows, evaluations=1)
            trace = Trace(self.name, {}, [0] * len(noise), {}, {"budget": 1, "folder": str(self.folder)})
            return NoiseResult(images, noise, images, trace, cost=tracker.costs())
        self.reward.prepare(problem.prompts)
        given = problem.noise.detach().float()
        b = len(given)
        pairs = [(k, i) for k in range(self.budget) for i in range(b)]
        size = self.batch_size or max(problem.batch_size or 0, b)
        for at in range(0, len(pairs), size):
            rows = [i for _, i in pairs[at : at + size]]
            drawn = [given[i] if k == 0 else seeded_noise(given.shape[1:], [problem.seeds[i]], k, given.device)[0]
                     for k, i in pairs[at : at + size]]  # fmt: skip
            score_noises(problem, tracker, self.reward, rows, self.move(problem, torch.stack(drawn), rows), {}, size)
        return tracker.result(self, folder=str(self.folder))

    def move(self, problem: NoiseProblem, noise: Float[Tensor, "k ..."], rows: range | list[int]) -> Float[Tensor, "k ..."]:
        """eps' of noises that belong to samples `rows`."""
        text = None if problem.conditioning is None else problem.conditioning.conditional().get("prompt_embeds")
        if text is None:
            raise ValueError("amortised noise was trained for one model and reads its text embeddings, which this problem does not give; "
                             "call it through the pipeline it was trained for")  # fmt: skip
        policy = self.policy.to(noise.device)
        return policy(noise, text[torch.as_tensor(list(rows), device=text.device)].to(noise.device)).noise
