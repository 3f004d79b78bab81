"""The search over guidance policies from which Adaptive Guidance was found, and the policy that it finds.

Paper: Castillo et al., "Adaptive Guidance", AAAI 2025 (2312.12487), section on the search; the relaxation is that of DARTS (1806.09055).

Every step t chooses one option: the unconditional prediction alone (1 evaluation), the conditional one alone (1), or both, at one of
several strengths (2). All are g = u + s (c - u): s = 0, s = 1, or the strength. Relaxed, with weights a:

    p_t = softmax(a_t / tau),   s_t = sum_o p_t,o s_o,   E = sum_t,o p_t,o cost_o
    min_a |x_0(s) - x_0(w, ..., w)|^2 / |x_0(w, ..., w)|^2 + penalty max(0, E / 2T - budget)^2

differentiated through the whole sampler; x_0(s) is the end of the trajectory, from the same noise. Then each step takes its strongest
option, and where that exceeds the budget, the steps that cling least to their second evaluation give it up.

a -> `logits`; tau -> from 1 to `temperature`; w -> the pipeline's scale; s_o -> `strengths`, as multiples of w; T -> `steps`.

Differences from the paper, and why: the mixture of options is linear in c and u, so one guided prediction of strength s_t is the whole
mixture, and memory does not grow with the options. A mixture of "alone" and a great strength equals w at a lower expected cost, which no
single option does; so tau falls during the search until p is nearly one choice. The budget is a bound rather than a price per evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import sample_dot
from diffalign.files import read_json, write_json
from diffalign.methods.checks import check_integer, check_number
from diffalign.methods.guidance import Guidance, Planned, require_same_identity, require_scale
from diffalign.types import Branch, GuidanceRun

UNCONDITIONAL, CONDITIONAL = 0.0, 1.0
PORTABLE = ("negative",)  # a policy evaluates what it uses, so it holds for any negative prompt


def branch_of(strength: float) -> Branch:
    """What a step of this strength must evaluate."""
    return {UNCONDITIONAL: "unconditional", CONDITIONAL: "conditional"}.get(strength, "both")  # type: ignore[return-value]


def at_strength(c: Tensor, u: Tensor, strength: Any, guidance_scale: float) -> Tensor:
    """The u for which a pipeline that guides by w arrives at u + strength (c - u). `strength` may be a tensor with a gradient."""
    return c - (strength - 1) / (guidance_scale - 1) * (c - u)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of the search."""

    budget: float = 0.75
    """In (0.5, 1]: evaluations, as a share of full guidance's 2T. Paper: a price on evaluations instead."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Multiples of w, above 0: the strengths of the guided options. Paper: k of them."""
    iterations: int = 80
    """>= 1, each on a batch of its own. Paper: 10,000 pairs."""
    lr: float = 0.2
    """Above 0: Adam's, of the logits. Paper: not stated."""
    penalty: float = 100.0
    """>= 0: of the squared excess over the budget, which is a share."""
    temperature: float = 0.1
    """In (0, 1]: tau at the end, falling geometrically from 1. Paper: 1."""

    def __post_init__(self) -> None:
        check_number("budget", self.budget, 0.5, 1.0, above=True)
        check_integer("iterations", self.iterations, 1)
        check_number("lr", self.lr, 0.0, above=True)
        check_number("penalty", self.penalty, 0.0)
        check_number("temperature", self.temperature, 0.0, 1.0, above=True)
        if not self.strengths:
            raise ValueError("strengths must hold at least one multiple of the guidance scale, as in (1.0,).")
        for strength in self.strengths:
            check_number("strengths", strength, 0.0, above=True)


@dataclass(frozen=True)
class SearchedGuidance(Guidance):
    """A policy that a search found: one strength s for each step. Refused with reasons in a run that it was not searched for.

    One written by hand has no identity, and runs wherever the number of steps is right.
    """

    name: ClassVar[str] = "searched"

    strengths: tuple[float, ...]
    identity: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def begin(self, run: GuidanceRun) -> Strengths:
        known = {"timesteps": list(run.timesteps), "guidance_scale": run.guidance_scale}
        made_for = {name: self.identity[name] for name in known if name in self.identity}
        require_same_identity("the searched policy", made_for, {name: known[name] for name in made_for})
        return Strengths(run, self)

    def settings(self) -> dict[str, Any]:
        return {"strengths": list(self.strengths)}

    def save(self, file: Path) -> None:
        write_json(Path(file), {"strengths": list(self.strengths), "identity": dict(self.identity), "notes": dict(self.notes)})

    @classmethod
    def load(cls, file: Path) -> SearchedGuidance:
        """Raises FileNotFoundError where there is no such file, ValueError where it holds no policy."""
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"there is no searched policy at {file}; make one with `diffalign train guidance-search --out {file}`")
        data = read_json(file)
        if not isinstance(data, dict) or not isinstance(data.get("strengths"), list):
            raise ValueError(f"{file} holds no searched policy; search again")
        return cls(tuple(data["strengths"]), data.get("identity", {}), data.get("notes", {}))


class Strengths(Planned):
    """One trajectory at given strengths."""

    def __init__(self, run: GuidanceRun, method: SearchedGuidance) -> None:
        super().__init__(run, [branch_of(strength) for strength in method.strengths])
        self.method = method
        self.scale = require_scale(run, "a searched policy")

    def complete(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        if step == 0 and self.method.identity:
            require_same_identity("the searched policy", self.method.identity, self.run.identity(), PORTABLE)
        strength, scale = self.method.strengths[step], self.scale
        if strength == UNCONDITIONAL:
            return u, u
        if strength == CONDITIONAL:
            return c, c
        return c, (u if math.isclose(strength, scale, rel_tol=1e-6) else at_strength(c, u, strength, scale))


class RelaxedGuidance(Guidance):
    """Full evaluation at strengths (a tensor of one per step) through which gradients flow."""

    name: ClassVar[str] = "relaxed"

    def __init__(self, strengths: Float[Tensor, " t"]) -> None:
        self.strengths = strengths
        self.run: GuidanceRun | None = None

    def settings(self) -> dict[str, Any]:
        return {}

    def begin(self, run: GuidanceRun) -> Relaxed:
        self.run = run
        return Relaxed(run, self.strengths)


class Relaxed(Planned):
    def __init__(self, run: GuidanceRun, strengths: Tensor) -> None:
        super().__init__(run, ["both"] * run.steps)
        self.strengths, self.scale = strengths, require_scale(run, "the search")

    def complete(self, step: int, x: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return c, at_strength(c, u, self.strengths[step].to(c.device, c.dtype), self.scale)


def search(
    sample: Callable[[int, Guidance | None], Float[Tensor, "b ..."]],
    steps: int,
    guidance_scale: float,
    settings: SearchSettings | None = None,
    progress: Callable[[int, Mapping[str, float]], None] | None = None,
) -> SearchedGuidance:
    """Finds a policy within the budget.

    sample(i, method): the end of the trajectories of batch i, the same prompts and noises whenever it is asked for, made with full guidance
    where method is None and differentiable otherwise. progress(i, {"loss", "error", "evaluations"}) after every iteration.
    """
    settings = settings or SearchSettings()
    if guidance_scale <= 1:
        raise ValueError(f"guidance_scale must be above 1, got {guidance_scale:g}: one branch is evaluated then, and nothing to search.")
    options = torch.tensor([UNCONDITIONAL, CONDITIONAL, *(guidance_scale * each for each in settings.strengths)])
    costs = torch.tensor([2.0 if branch_of(s) == "both" else 1.0 for s in options.tolist()])
    logits = torch.zeros(steps, len(options), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=settings.lr)
    for i in range(settings.iterations):
        tau = settings.temperature ** (i / max(settings.iterations - 1, 1))
        with torch.no_grad():
            target = sample(i, None).float()
        with torch.enable_grad():
            p = torch.softmax(logits / tau, dim=1)
            relaxed = RelaxedGuidance(p @ options)
            end = sample(i, relaxed).float()
            error = (sample_dot(end - target, end - target) / sample_dot(target, target)).mean()
            share = (p @ costs).sum() / (2 * steps)
            loss = error + settings.penalty * torch.relu(share - settings.budget) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            values = {"loss": loss, "error": error.sqrt(), "evaluations": share * 2 * steps}
            progress(i, {name: float(value.detach()) for name, value in values.items()})
    chosen = choose(logits.detach().tolist(), options.tolist(), settings.budget)
    identity = dict(relaxed.run.identity()) if relaxed.run is not None else {}
    return SearchedGuidance(tuple(chosen), identity, {"settings": asdict(settings)})


def choose(logits: Sequence[Sequence[float]], options: Sequence[float], budget: float) -> list[float]:
    """Each step's strongest option, with as many guided steps as the budget (a share of 2T) allows: those that gain most by it."""

    def best(row: Sequence[float], guided: bool) -> int:
        return max((o for o, s in enumerate(options) if (branch_of(s) == "both") is guided), key=lambda o: row[o])

    pairs = [(best(row, True), best(row, False)) for row in logits]
    margins = [row[guided] - row[alone] for row, (guided, alone) in zip(logits, pairs, strict=True)]
    allowed = int(budget * 2 * len(logits) + 1e-9) - len(logits)
    keep = set(sorted((step for step, margin in enumerate(margins) if margin > 0), key=lambda step: -margins[step])[:allowed])
    return [options[guided if step in keep else alone] for step, (guided, alone) in enumerate(pairs)]
