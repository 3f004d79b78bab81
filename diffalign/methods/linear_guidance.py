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
4. A fifth of the samples is held out. A step of the guided part whose residual there exceeds `limit` of |d| is evaluated instead. A step
   that prediction would harm (residual above 1) is not guided, so that a tail never costs more than planned.
5. `budget`: the steps that are evaluated may be chosen by the fit instead, for the least error within a number of evaluations. Where
   guidance matters to the end, as in the shapes world, the paper's plan spends nothing where it is needed.
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
from diffalign.guidance import Branch, GuidanceRun
from diffalign.methods.checks import check_integer, check_number
from diffalign.methods.guidance import Guidance, PlannedPolicy, require_same_identity, require_scale

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
    budget: float | None = None
    """In (0.5, 1], of full guidance's 2T evaluations: the fit chooses the plan, and the three above do not count. Paper: None."""
    window: int = 2
    """>= 1: evaluated steps that enter a prediction. Paper: all."""
    ridge: float = 1e-5
    """lambda >= 0, on columns of unit RMS. Paper: 0."""
    limit: float = 0.25
    """Above 0: the greatest residual, as a share of |d|, at which a step of the leading part is predicted; without budget. Paper: none."""

    def __post_init__(self) -> None:
        check_number("share", self.share, 0.0, 1.0)
        check_integer("period", self.period, 2)
        check_integer("window", self.window, 1)
        check_number("ridge", self.ridge, 0.0)
        check_number("limit", self.limit, 0.0, above=True)
        if self.budget is not None:
            check_number("budget", self.budget, 0.5, 1.0, above=True)
        if self.tail not in ("conditional", "estimate"):
            raise ValueError(f"tail must be 'conditional' or 'estimate', got {self.tail!r}.")


def features(c: Tensor, past: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "m ..."]:
    """The columns of the regression: past d's, latest first; the steps between successive c's, the same; and c itself.

    past: (c, d) of the evaluated steps that count, latest first.
    """
    chain = [c, *(each for each, _ in past)]
    return torch.stack([*(d for _, d in past), *(later - earlier for later, earlier in pairwise(chain)), c])


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

    def begin(self, run: GuidanceRun) -> LinearPolicy:
        require_scale(run, "LinearAG")
        known = {"timesteps": list(run.timesteps), "guidance_scale": run.guidance_scale}
        made_for = {name: self.coefficients.identity[name] for name in known if name in self.coefficients.identity}
        require_same_identity("the LinearAG fit", made_for, {name: known[name] for name in made_for})
        return LinearPolicy(run, self.coefficients)

    def settings(self) -> dict[str, Any]:
        return asdict(self.coefficients.settings)


class LinearPolicy(PlannedPolicy):
    """One trajectory with predicted guidance."""

    def __init__(self, run: GuidanceRun, coefficients: LinearCoefficients) -> None:
        super().__init__(run, coefficients.branches)
        self.coefficients = coefficients
        self.past: list[tuple[Tensor, Tensor]] = []

    def observe(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> None:
        if step == 0:
            require_same_identity("the LinearAG fit", self.coefficients.identity, self.run.identity())
        self.past = [(c.detach().float(), (c - u).detach().float()), *self.past][: self.coefficients.settings.window]

    def estimate(self, step: int, x: Tensor, c: Tensor) -> Tensor:
        weights = self.coefficients.by_step.get(step)
        if weights is None:
            return c
        columns = features(c.float(), self.past)
        return c - torch.tensordot(weights.to(columns.device, columns.dtype), columns, dims=1).to(c.dtype)

    def network_changed(self) -> None:
        raise ValueError("LinearAG coefficients belong to one network, and this pipeline changes its network during a run; use 'adaptive'.")
