"""ReNO: climb the reward by gradient ascent on the initial noise of a one-step generator, and keep the best image on the way.

Paper: Eyring et al., "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", NeurIPS 2024 (2406.04312).

    eps* = argmax_eps  sum_i lambda_i R_i(G(eps, p), p) + lambda_reg K(eps),    K(eps) = (d - 1) ln ||eps|| - ||eps||^2 / 2
    g_t = gradient at eps_t, clipped to the L2 norm c;   v_{t+1} = mu v_t + g_t;   eps_{t+1} = eps_t + eta (g_t + mu v_{t+1})

R = sum_i lambda_i R_i -> `reward` (a mix);  G -> `problem.generate`;  p -> `problem.prompts`;  eps_0 -> `problem.noise`;
d -> its entries per sample;  eta -> `lr`;  mu -> `momentum`;  c -> `clip`;  lambda_reg -> `regularizer`;  evaluations of
R(G(.)) -> `budget`. The last evaluation is not followed by an update, and the image returned is the one with the greatest
R, K left out, eps_0 included.

`ReNO.paper(reward)` is that and nothing else. The defaults of `ReNO(reward)` differ from it so:

1. `lr` is a fraction of sqrt(d), the radius of the shell where Gaussian noise lies. The paper's two settings, lr 5 on
   4x64x64 latents and 10 on 4x128x128, are one setting in that unit: 5 * 0.1 / 128 = 10 * 0.1 / 256 = 1/256. So one value
   serves every latent size.
2. `sphere`: the noise keeps the norm that it was drawn with, exactly; gradient and momentum are tangent. K only holds the
   norm near sqrt(d - 1) by a pull that clipping weakens, and its own radial motion spends step length that rotation needs.
3. `starts`: half of the budget draws noises, and the climb begins at the best of them: a climb stays near where it began.
   Its first evaluation makes that image again, for the gradient; that is a pass of the network like any other and counts.
4. Early stop, sample by sample, when the climb's last `patience` evaluations brought less than `plateau` of all that it
   gained. What drawing starts gained is not the climb's and does not count.

And in both, unlike the paper's code: any number of samples at once, each with its own clipping, best and stop, so that a
batch equals its samples alone; noise, velocity and norms in float32 whatever the generator's dtype (its norm overflowed in
float16, issue 4); one host transfer per evaluation; every score and diagnostic in the trace; the best noise returned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.methods.checks import check_flag, check_integer, check_number, formerly, no_gradient
from diffalign.methods.search import try_candidates
from diffalign.methods.tracking import Tracker, evaluation_limit
from diffalign.noise import noise_statistics, norm_log_density, sample_dot, sample_norm, spread, tangent, with_norm
from diffalign.types import NoiseProblem, NoiseResult, Reward, RewardScores

logger = logging.getLogger(__name__)


def clip_gradient(gradient: Float[Tensor, "b ..."], norm: Float[Tensor, " b"], clip: float, always: bool) -> Float[Tensor, "b ..."]:
    """Each sample's gradient scaled to the norm `clip` where it is longer, or `always`. The 1e-6 is torch.nn.utils.clip_grad_norm_'s."""
    factor = clip / (norm + 1e-6)
    return gradient * spread(factor if always else factor.clamp_max(1), gradient)


def ascend(noise: Tensor, velocity: Tensor, gradient: Tensor, lr: float, momentum: float, nesterov: bool) -> tuple[Tensor, Tensor]:
    """One step of torch.optim.SGD (no dampening, no decay) uphill: the new noise and velocity."""
    velocity = momentum * velocity + gradient
    return noise + lr * (gradient + momentum * velocity if nesterov else velocity), velocity


@formerly(iterations="budget", evaluations="budget")
@dataclass(frozen=True, eq=False)
class ReNO:
    """ReNO(reward, budget=50, lr=1/256, ...). Raises TypeError for a reward that has no gradient."""

    name: ClassVar[str] = "reno"

    reward: Reward
    """R, which is climbed."""
    _: KW_ONLY
    budget: int = 50
    """T >= 1, evaluations of the generator for each sample, `starts` included. Paper: 50."""
    seconds: float | None = None
    """> 0: climb for so long instead, or to a plateau; the budget then only says how many starts are drawn. Paper: none."""
    lr: float = 1 / 256
    """eta > 0, in the unit that `lr_unit` says. Paper: 5 absolute (10 for Hyper-SDXL at 1024 pixels), 1/256 of the radius."""
    lr_unit: Literal["radius", "absolute"] = "radius"
    """radius: a clipped gradient moves the noise by lr * sqrt(d), momentum apart; absolute: by lr * clip. Paper: absolute."""
    momentum: float = 0.9
    """mu in [0, 1): a steady gradient ends at steps 1 / (1 - mu) times as long. Paper: 0.9."""
    nesterov: bool = True
    """Look ahead by one momentum step, as torch.optim.SGD does. Paper: yes."""
    clip: float = 0.1
    """c > 0, the greatest L2 norm of one sample's gradient, regulariser included. Paper: 0.1."""
    normalize: bool = False
    """Scale every gradient to norm c, not only longer ones: steps no longer depend on the reward's scale. Paper: no."""
    regularizer: float = 0.01
    """lambda_reg >= 0, weight of K. K pulls along the radius only, so with `sphere` it moves nothing. Paper: 0.01."""
    sphere: bool = True
    """Keep each sample's noise at the norm it started with. Paper: no."""
    starts: int | None = None
    """K >= 1: climb from the best of K noises, the given one and K - 1 drawn as in best-of-N. None: half the budget. Paper: 1."""
    patience: int | None = 15
    """Evaluations >= 1 over which a plateau is judged; None never stops. Paper: none."""
    plateau: float = 0.02
    """In [0, 1]: stop a sample when `patience` evaluations raised its best by no more than this share of the climb's whole
    gain. Paper: none."""
    target: float | None = None
    """Stop a sample once its total reaches this. Paper: none."""
    batch_size: int | None = None
    """Samples evaluated at once, >= 1; None takes all. Memory and speed only. Paper: 1."""
    loss_scale: float = 1.0
    """> 0: the objective is multiplied by this before the backward pass and the gradient divided after it, against underflow in a
    float16 generator (try 1024); without effect in float32 and bfloat16. Paper: 1."""

    def __post_init__(self) -> None:
        if not self.reward.differentiable:
            raise TypeError(f"{no_gradient(self.reward)}, which ReNO climbs; watch it instead, or use BestOfN.")
        check_integer("budget", self.budget, 1)
        if self.seconds is not None:
            check_number("seconds", self.seconds, 0.0, above=True)
        for name in ("starts", "patience", "batch_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.starts is not None and 1 < self.starts >= self.budget:
            raise ValueError(f"starts must be below budget, which counts them: got starts={self.starts}, budget={self.budget}.")
        for name in ("lr", "clip", "loss_scale"):
            check_number(name, getattr(self, name), 0.0, above=True)
        check_number("momentum", self.momentum, 0.0, math.nextafter(1.0, 0.0))
        check_number("regularizer", self.regularizer, 0.0)
        check_number("plateau", self.plateau, 0.0, 1.0)
        if self.target is not None:
            check_number("target", self.target)
        for name in ("nesterov", "normalize", "sphere"):
            check_flag(name, getattr(self, name))
        if self.lr_unit not in ("radius", "absolute"):
            raise ValueError(f"lr_unit must be 'radius' or 'absolute', got {self.lr_unit!r}.")

    @classmethod
    def paper(cls, reward: Reward, *, budget: int = 50, lr: float = 5.0) -> ReNO:
        """The published setting. Give lr=10 for 1024-pixel latents, as the authors do for Hyper-SDXL."""
        return cls(reward, budget=budget, lr=lr, lr_unit="absolute", momentum=0.9, nesterov=True, clip=0.1, normalize=False,
                   regularizer=0.01, sphere=False, starts=1, patience=None, target=None, loss_scale=1.0)  # fmt: skip

    def search(self, problem: NoiseProblem) -> NoiseResult:
        """Optimise every sample's noise. A sample whose reward or gradient is not finite stops with its best so far, named in a warning.

        Raises RuntimeError where `problem.generate` gives no gradient, TypeError where the reward gives none.
        """
        tracker, limit = Tracker(problem, self.seconds), evaluation_limit(self.budget, self.seconds)
        self.reward.prepare(problem.prompts)
        starts = max(self.budget // 2, 1) if self.starts is None else self.starts
        first = starts if starts > 1 else 0  # of the climb; a single start is the climb's own first evaluation
        if first:
            try_candidates(problem, tracker, self.reward, first, self.batch_size, self.name)
        rows = list(range(len(problem.noise)))
        noise, velocity = tracker.noise.clone(), torch.zeros_like(tracker.noise)
        origin, radius = noise, sample_norm(noise)
        eta = self.lr * math.sqrt(noise[0].numel()) / self.clip if self.lr_unit == "radius" else self.lr

        for t in range(first, limit):
            last = t == limit - 1
            images, scores, gradient = self._evaluate(problem, noise, rows, with_gradient=not last)
            measured = {**noise_statistics(noise), "norm_log_density": norm_log_density(noise)}
            measured["cosine_to_start"] = sample_dot(noise, origin) / (sample_norm(noise) * sample_norm(origin))
            if gradient is not None:
                tracker.charge(rows, backward_passes=1)
                if self.sphere:
                    gradient = tangent(gradient, noise)
                measured["gradient_norm"] = sample_norm(gradient)
            host = tracker.record(rows, noise, images, scores, measured)
            going = [j for j, row in enumerate(rows) if not self._stops(tracker, row, {name: host[name][j] for name in host}, first)]
            if gradient is None or not going or tracker.out_of_time:
                break
            if len(going) < len(rows):  # keep the samples that go on
                kept = torch.tensor(going, device=noise.device)
                rows = [rows[j] for j in going]
                noise, velocity, gradient, origin, radius = (x[kept] for x in (noise, velocity, gradient, origin, radius))
            step = clip_gradient(gradient, sample_norm(gradient), self.clip, self.normalize)
            noise, velocity = ascend(noise, velocity, step, eta, self.momentum, self.nesterov)
            if self.sphere:
                noise = with_norm(noise, radius)
                velocity = tangent(velocity, noise)
        return tracker.result(self, starts=starts)

    def _evaluate(
        self, problem: NoiseProblem, noise: Float[Tensor, "k ..."], rows: list[int], with_gradient: bool
    ) -> tuple[Tensor, RewardScores, Tensor | None]:
        """Images, scores and the gradient of R + lambda_reg K. Objectives are summed over samples, so each gradient is its sample's own."""
        size = self.batch_size or len(rows)
        images, scores, gradients = [], [], []
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            x = noise[at : at + size].detach().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                made = problem.generate(x, part)
                if with_gradient and not made.requires_grad:
                    raise RuntimeError("generate returned images without a gradient to the noise; was it called under torch.no_grad()?")
                score = self.reward(made, [problem.prompts[row] for row in part])
                if with_gradient:
                    objective = (score.total.float() + self.regularizer * norm_log_density(x)).sum()
                    _require_gradient(score)
                    gradients.append(torch.autograd.grad(objective * self.loss_scale, x)[0] / self.loss_scale)
            images.append(made.detach())
            scores.append(score)
        return torch.cat(images), _join(scores), torch.cat(gradients) if with_gradient else None

    def _stops(self, tracker: Tracker, row: int, values: dict[str, float], first: int) -> bool:
        """Whether sample `row` is finished, from what it has on the host; `first` is where its climb began."""
        climb = tracker.running[row][first:]
        for name in ("total", "gradient_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                logger.warning(
                    "%s: %s has %s %s at evaluation %d and stops; its image is that of evaluation %d.",
                    self.name, tracker.describe(row), name, values[name], len(tracker.running[row]) - 1, tracker.best[row],
                )  # fmt: skip
                return True
        if self.target is not None and climb[-1] >= self.target:
            return True
        if self.patience is None or len(climb) <= self.patience:
            return False
        return climb[-1] - climb[-1 - self.patience] <= self.plateau * (climb[-1] - climb[0])


def _require_gradient(scores: RewardScores) -> None:
    if not scores.total.requires_grad:
        cut = [name for name, part in scores.parts.items() if not part.requires_grad]
        raise TypeError(f"reward {', '.join(map(repr, cut)) or 'total'} has no gradient, which ReNO climbs; is it computed under no_grad?")


def _join(scores: list[RewardScores]) -> RewardScores:
    """The scores of several chunks as those of one batch, without their graphs."""

    def join(of: Callable[[RewardScores], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([of(chunk)[name].detach() for chunk in scores]) for name in of(scores[0])}

    return RewardScores(total=join(lambda s: {"": s.total})[""], parts=join(lambda s: s.parts), watched=join(lambda s: s.watched))
