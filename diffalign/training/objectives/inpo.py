"""DDIM-InPO: preference optimisation at the noisy latents that lead to the two images, found by
inverting the sampler.

Paper: Lu et al., "InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient
Diffusion Model Alignment", CVPR 2025 (2503.18454).

The loss is Diffusion-DPO's (preference.py); x and eps come from elsewhere:

    x_i = a_i x0 + s_i n_i           any state on the way, read as the clean image and some noise n_i
    n_{i+1} = e_i + r (n_i - e_i)    e_i: the network's eps at x_i;  r = (s_i / a_i) / (s_{i+1} / a_{i+1})
    tau = n at t                     in the place of eps: the target is what means (x0, tau)

The second line is a deterministic DDIM step upwards, x_{i+1} = a_{i+1} x0^ + s_{i+1} e_i, written for
n: nothing large cancels near s = 0 and nothing is divided by the last a, so it serves every level of
VP and flow models (for flow it is Euler's step, and the target is (x - x0) / s). From a clean start
tau is the mean of the e_i, weighted by what each step adds to s / a. So at policy = reference the
errors measure how curved the model's path is; they are smaller than with noise, and beta is not on
DPO's scale. The two images have no noise in common. The winner's path is pulled straight, the
loser's bent, from the first step on.

t -> drawn by the backbone;  K -> `steps`;  eta of the code's noise -> `injection`;
p_theta(x_t | x0) -> `invert_with`.

Where we differ from the public code: its inversion ends on a point of a fixed grid and is taken for
the state at t, up to 99 timesteps away, which at small t leaves much of the image in tau; and it
reads the first sample's t for the whole batch. Ours lands on t, each sample on its own, with levels
in float32. `InPO.paper` has the code's landing, samples still each on its own.

SmPO (Lu et al., ICML 2025, 2506.02698) is `InPO(DPO(weights_on="logit"), renoise=True)` on pairs
weighted by `preference.score_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Backbone
from diffalign.diffusion import add_noise, to_eps
from diffalign.noise import spread
from diffalign.training.contract import Denoiser, PairBatch
from diffalign.training.denoising import Samples, draw
from diffalign.training.objectives.preference import DPO

GRID = 100.0
"""Timesteps between two points of the public code's grid -99, 1, 101, ..., 801 and where they lead, 1, 101, ..., 901."""


@dataclass(frozen=True)
class InPO:
    """InPO(DPO(beta=2000), steps=10)."""

    name: ClassVar[str] = "inpo"

    preference: DPO = field(default_factory=DPO)
    """The kernel. Paper: beta 2000 for SD 1.5, 5000 for SDXL."""
    _: KW_ONLY
    steps: int = 10
    """K >= 1, evaluations of the network from the clean image to t. Paper: at most 10."""
    stride: float | None = None
    """Timesteps that a step goes, > 0, the last one what is left; at most K steps. None: K equal steps for every t. Paper: 100."""
    invert_with: Literal["policy", "reference"] = "policy"
    """Whose path it is. The reference's does not change during training, so that it could be kept. Paper: policy."""
    injection: float = 0.0
    """In [0, 1): noise added after every step, in units of the standard deviation of DDPM's way back. Paper's code: 0.1."""
    renoise: bool = False
    """Evaluate again where the step led, and step with the mean of both; twice the cost. Paper: no. SmPO: yes."""
    landing: Literal["exact", "grid"] = "exact"
    """Where the path ends: at t, or on the public code's grid for models of 1000 whole timesteps; then `steps` and `stride` are its own."""

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps!r}")
        if self.stride is not None and not self.stride > 0:
            raise ValueError(f"stride must be above 0, or None, got {self.stride!r}")
        if not 0 <= self.injection < 1:
            raise ValueError(f"injection must lie in [0, 1), got {self.injection!r}")
        for name, known in (("invert_with", ("policy", "reference")), ("landing", ("exact", "grid"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def paper(cls, *, beta: float = 2000.0) -> InPO:
        """As the public code does it for SD 1.5; beta=5000 for SDXL.

        It starts from a model tuned on the winners, and drops every fifth prompt (`PairData`, drop_prompts).
        """
        return cls(DPO(beta=beta, space="epsilon"), stride=GRID, injection=0.1, landing="grid")

    def settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("steps", "stride", "invert_with", "injection", "renoise", "landing")}
        return {"name": self.name, "preference": self.preference.settings(), **own}

    def collect(self, policy: Denoiser, batch: PairBatch, generator: torch.Generator) -> PairBatch:
        return batch

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        return self.preference.compare(policy, reference, batch, generator, self.states)

    @torch.no_grad()
    def states(
        self, policy: Denoiser, reference: Denoiser, samples: Samples, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."]]:
        """(x, tau) of every image by inversion along its own conditioning: a StateProvider."""
        denoiser = policy if self.invert_with == "policy" else reference
        if self.landing == "exact":
            n = self.invert(denoiser, samples, self.path(samples.timesteps), True, generator)
            return add_noise(samples.clean, n, samples.signal, samples.noise), n
        if denoiser.backbone.prediction == "flow":
            raise ValueError("landing='grid' is for models of 1000 whole timesteps, and this is a flow model; use landing='exact'")
        path = grid(samples.timesteps)
        n = self.invert(denoiser, samples, path, False, generator)
        signal, noise = denoiser.backbone.levels(path[-1])
        x = add_noise(samples.clean, n, signal, noise)
        return x, (x - spread(samples.signal.to(x), x) * samples.clean) / spread(samples.noise.to(x), x)

    def path(self, timesteps: Float[Tensor, " n"]) -> Float[Tensor, "k_plus_1 n"]:
        """The times that each sample passes, 0 ... t; one that has arrived stays."""
        if self.stride is None:
            return torch.stack([timesteps * (i / self.steps) for i in range(self.steps + 1)])
        count = max(1, min(self.steps, math.ceil(timesteps.max().item() / self.stride)))
        stops = [torch.full_like(timesteps, i * self.stride).minimum(timesteps) for i in range(count)]
        return torch.stack([*stops, timesteps])

    def invert(
        self, denoiser: Denoiser, samples: Samples, path: Float[Tensor, "k_plus_1 n"], clean: bool, generator: torch.Generator
    ) -> Float[Tensor, "n ..."]:
        """n at the end of each sample's path. clean: the first state has level (1, 0), whatever level the network takes it for.

        A step is evaluated only for samples that it moves, and for all in the first.
        """
        backbone, x0 = denoiser.backbone, samples.clean
        told = _levels(backbone, path[0], x0)
        level = (torch.ones_like(told[0]), torch.zeros_like(told[1])) if clean else told
        # at a level of its own, the clean image is a x0 + s n for this n
        n = torch.zeros_like(x0) if clean else spread((1 - level[0]) / level[1], x0) * x0
        for i in range(len(path) - 1):
            after = _levels(backbone, path[i + 1], x0)
            rows = torch.arange(len(x0), device=x0.device) if i == 0 else (path[i + 1] > path[i]).nonzero().flatten()
            noise = draw(x0, generator) if self.injection else None
            if len(rows):
                part = Samples(x0[rows], samples.conditioning.rows(rows.tolist()), path[i][rows], told[0][rows], told[1][rows])
                here, there = tuple(each[rows] for each in level), tuple(each[rows] for each in after)
                moved = self._step(denoiser, part, n[rows], here, there)
                if noise is not None:
                    moved = moved + self.injection * spread(_way_back(here, there) / there[1], moved) * noise[rows]
                n = n.index_copy(0, rows, moved)
            told = level = after
        return n

    def _step(self, denoiser: Denoiser, at: Samples, n: Tensor, level: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Tensor:
        """n after one step from `level` to `after`; `at` says which level the network takes the state for."""
        ratio = spread(after[0] * level[1] / (level[0] * after[1]), n)
        e = _eps(denoiser, at, add_noise(at.clean, n, *level))
        moved = e + ratio * (n - e)
        if self.renoise:
            e = (e + _eps(denoiser, at, add_noise(at.clean, moved, *after))) / 2
            moved = e + ratio * (n - e)
        return moved


def grid(timesteps: Float[Tensor, " n"]) -> Float[Tensor, "k_plus_1 n"]:
    """The public code's path: all of -99, 1, 101, ..., 801 below t, and where the last of them leads."""
    count = torch.arange(10).mul(GRID).sub(GRID - 1).unsqueeze(1).to(timesteps).lt(timesteps).sum(0)
    return torch.stack(
        [GRID * torch.full_like(timesteps, i).minimum(count.to(timesteps)) - (GRID - 1) for i in range(int(count.max()) + 1)]
    )


def _levels(backbone: Backbone, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    signal, noise = backbone.levels(timesteps)
    return signal.to(like), noise.to(like)


def _eps(denoiser: Denoiser, at: Samples, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """The noise that the network sees in x, without guidance."""
    output = denoiser(x, at.timesteps, at.conditioning)
    return to_eps(x, output, at.signal, at.noise, denoiser.backbone.prediction)


def _way_back(level: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Float[Tensor, " n"]:
    """The standard deviation of DDPM's step from `after` down to `level`, as `diffusion.ddim_std` has it for eta = 1."""
    return level[1] * (1 - (after[0] * level[1] / (level[0] * after[1])).square()).clamp_min(0).sqrt()
