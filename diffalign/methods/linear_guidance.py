"""LinearAG: predict the unconditional branch from earlier predictions, by a regression fitted to one model and one sampler.

Paper: Castillo et al., "Adaptive Guidance", AAAI 2025 (2312.12487), section on LinearAG:

    u^_t = sum_{i >= t} beta^c_i c_i + sum_{i > t} beta^u_i u_i,      one scalar for each past prediction, other scalars at each step

used in the first half of the steps at every second one, and no guidance in the second half: 25 evaluations instead of 40 at 20 steps.
c, u, d as in guidance.py. Fitted by least squares over every latent entry of trajectories of the user's own model with full guidance.

Differences from the paper, and why:

1. The regression is written in d_i = c_i - u_i and differences of c, which span the same predictions. Neighbouring predictions are nearly
   equal, so the paper's own columns are collinear (condition numbers of 1e7 to 1e15), and plain least squares answers with huge
   coefficients of opposite signs, which amplify the error of whatever they are applied to.
2. What is predicted is d, as g = c + (w - 1) d amplifies its error by w - 1: the residual is reported as a share of |d|.
3. Ridge (lambda = `ridge`) on columns scaled to unit RMS; only the last `window` steps of which both branches were evaluated enter.
4. Only sums of products are kept (m x m for each step), in float64, not the trajectories.
5. A fifth of the samples is held out. A step whose residual there exceeds `limit` of |d| is evaluated rather than predicted.
6. The coefficients carry the identity of what they were fitted to, and a run that differs is refused with the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.files import read_json, whole_folder, write_json
from diffalign.methods.checks import check_integer, check_number
from diffalign.methods.guidance import Guidance, Planned, leading, require_same_identity, require_scale
from diffalign.types import Branch, GuidanceRun

TENSORS, DESCRIPTION = "linear_guidance.safetensors", "linear_guidance.json"


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """Settings of the plan and of the fit."""

    share: float = 0.5
    """In [0, 1], of the steps: the leading part that is guided. Paper: 0.5."""
    period: int = 2
    """>= 2: of that part every period-th step evaluates both branches. Paper: 2."""
    tail: Literal["conditional", "estimate"] = "conditional"
    """After that part: no guidance, or predicted guidance; the cost is the same. Paper: accounts differ."""
    window: int = 2
    """>= 1: evaluated steps that enter a prediction. Paper: all."""
    ridge: float = 1e-5
    """lambda >= 0, on columns of unit RMS. Paper: 0."""
    limit: float = 0.25
    """Above 0: the greatest residual on held-out samples, as a share of |d|, at which a step is predicted. Paper: none."""

    def __post_init__(self) -> None:
        check_number("share", self.share, 0.0, 1.0)
        check_integer("period", self.period, 2)
        check_integer("window", self.window, 1)
        check_number("ridge", self.ridge, 0.0)
        check_number("limit", self.limit, 0.0, above=True)
        if self.tail not in ("conditional", "estimate"):
            raise ValueError(f"tail must be 'conditional' or 'estimate', got {self.tail!r}.")

    def branches(self, steps: int) -> list[Branch]:
        lead = leading(self.share, steps)
        return ["both" if step < lead and step % self.period == 0 else "conditional" for step in range(steps)]

    def predicted(self, steps: int) -> list[int]:
        """The steps whose unconditional branch is to be predicted."""
        end = steps if self.tail == "estimate" else leading(self.share, steps)
        return [step for step, branch in enumerate(self.branches(steps)) if branch == "conditional" and step < end]


def features(c: Tensor, past: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "m b ..."]:
    """The columns of the regression, float32: past d's, latest first; the steps between successive c's, the same; and c itself.

    past: (c, d) of the evaluated steps that count, latest first.
    """
    chain = [c, *(each for each, _ in past)]
    changes = [later - earlier for later, earlier in pairwise(chain)]
    return torch.stack([*(d for _, d in past), *changes, c]).float()


@dataclass
class Sums:
    """Sums of products over samples and entries, for one step: Gram matrix of the columns, their products with d, |d|^2, entries."""

    gram: Tensor
    right: Tensor
    target: float = 0.0
    entries: int = 0

    @classmethod
    def zeros(cls, columns: int) -> Sums:
        return cls(torch.zeros(columns, columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64))

    def add(self, columns: Float[Tensor, "m b ..."], d: Float[Tensor, "b ..."]) -> None:
        matrix, vector = columns.flatten(1).double(), d.flatten().double()
        self.merge(Sums((matrix @ matrix.T).cpu(), (matrix @ vector).cpu(), float(vector @ vector), vector.numel()))

    def merge(self, other: Sums) -> None:
        self.gram, self.right = self.gram + other.gram, self.right + other.right
        self.target, self.entries = self.target + other.target, self.entries + other.entries

    def solve(self, ridge: float) -> Float[Tensor, " m"]:
        """argmin_b |d - sum b_i f_i|^2 / |d|^2 + ridge |b'|^2, b' being the coefficients of columns and d scaled to unit RMS."""
        scale = (self.gram.diagonal() / max(self.entries, 1)).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        gram = self.gram / (scale[:, None] * scale[None, :] * max(self.entries, 1))
        right = self.right / (scale * max(self.entries, 1))
        gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
        # not `solve`: without ridge the matrix may be singular
        return torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution[:, 0] / scale

    def residual(self, coefficients: Float[Tensor, " m"]) -> float:
        """|d - sum b_i f_i| / |d|."""
        squared = self.target - 2 * float(coefficients @ self.right) + float(coefficients @ self.gram @ coefficients)
        return (max(squared, 0.0) / self.target) ** 0.5 if self.target > 0 else 0.0


@dataclass(frozen=True)
class LinearCoefficients:
    """A fit: coefficients and held-out residual of every predicted step, and what it belongs to. `samples` were fitted, `held_out` not."""

    settings: LinearSettings
    branches: tuple[Branch, ...]
    by_step: Mapping[int, Float[Tensor, " m"]]
    residuals: Mapping[int, float]
    identity: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 0
    held_out: int = 0

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        with whole_folder(Path(folder)) as temporary:
            save_file({f"step_{step:04d}": tensor.contiguous() for step, tensor in self.by_step.items()}, temporary / TENSORS)
            description = {
                "settings": asdict(self.settings),
                "branches": list(self.branches),
                "residuals": {str(step): value for step, value in self.residuals.items()},
                "identity": dict(self.identity),
                "samples": self.samples,
                "held_out": self.held_out,
            }
            write_json(temporary / DESCRIPTION, description)

    @classmethod
    def load(cls, folder: Path) -> LinearCoefficients:
        """Raises FileNotFoundError where the folder has no fit, ValueError where it is damaged."""
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file() or not (folder / TENSORS).is_file():
            raise FileNotFoundError(f"{folder} holds no LinearAG coefficients; make them with `diffalign train linear-ag --out {folder}`")
        data = read_json(folder / DESCRIPTION)
        try:
            by_step = {int(name.removeprefix("step_")): tensor for name, tensor in load_file(folder / TENSORS).items()}
            residuals = {int(step): value for step, value in data["residuals"].items()}
            rest = (data["identity"], data["samples"], data["held_out"])
            return cls(LinearSettings(**data["settings"]), tuple(data["branches"]), by_step, residuals, *rest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / DESCRIPTION} is not a whole LinearAG description ({error}); fit again") from error


@dataclass(frozen=True)
class LinearGuidance(Guidance):
    """LinearGuidance(LinearCoefficients.load(folder)). Its first step raises ValueError where the run is not what was fitted."""

    name: ClassVar[str] = "linear"

    coefficients: LinearCoefficients

    def begin(self, run: GuidanceRun) -> Predict:
        require_scale(run, "LinearAG")
        known = {"timesteps": list(run.timesteps), "guidance_scale": run.guidance_scale}
        made_for = {name: self.coefficients.identity[name] for name in known if name in self.coefficients.identity}
        require_same_identity("the LinearAG fit", made_for, {name: known[name] for name in made_for})
        return Predict(run, self.coefficients)

    def settings(self) -> dict[str, Any]:
        return asdict(self.coefficients.settings)


class Predict(Planned):
    """One trajectory with predicted guidance."""

    def __init__(self, run: GuidanceRun, coefficients: LinearCoefficients) -> None:
        super().__init__(run, coefficients.branches)
        self.coefficients = coefficients
        self.remembered = coefficients.settings.branches(run.steps)
        self.past: list[tuple[Tensor, Tensor]] = []

    def observe(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> None:
        if step == 0:
            require_same_identity("the LinearAG fit", self.coefficients.identity, self.run.identity())
        if self.remembered[step] == "both":  # not a step that is evaluated only because it could not be predicted
            self.past = [(c.detach(), (c - u).detach()), *self.past][: self.coefficients.settings.window]

    def estimate(self, step: int, x: Tensor, c: Tensor) -> Tensor:
        weights = self.coefficients.by_step.get(step)
        if weights is None:
            return c
        columns = features(c, self.past)
        return c - torch.tensordot(weights.to(columns.device, columns.dtype), columns, dims=1).to(c.dtype)

    def switch(self) -> None:
        raise ValueError("LinearAG coefficients belong to one network, and this pipeline changes its network during a run; use 'adaptive'.")
