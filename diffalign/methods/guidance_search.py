"""The search over guidance policies from which Adaptive Guidance was found, and the policy that it finds.

Paper: Castillo et al., "Adaptive Guidance", AAAI 2025 (2312.12487), section on the search; the relaxation is that of DARTS (1806.09055).

Every step t chooses one option: the unconditional prediction alone (1 evaluation), the conditional one alone (1), or both, at one of
several strengths (2). All are g = u + s (c - u): s = 0, s = 1, or the strength. With a budget for K guided steps of T:

    guided: the K steps of greatest a_t, at the strength of greatest b_t,o;   the others: s = 0 or 1, whichever of e_t is greater
    min_(a,b,e) |x_0(s) - x_0(w, ..., w)|^2 / |x_0(w, ..., w)|^2

differentiated through the whole sampler; x_0(s) is the end of the trajectory, from the same noise. Forward runs that choice, backward
puts sigmoid(a), softmax(b) and softmax(e) in its place (straight-through). The search starts at guidance w in the first K steps.

a -> `gate`; b -> `strength`; e -> `alone`; w -> the pipeline's scale; strengths -> `strengths`, as multiples of w; T -> `steps`.

Differences from the paper, and why:

1. The paper runs the mixture of all options, with a price on its expected evaluations. "Alone" and twice the strength, mixed half and half,
   are full guidance at three quarters of its price, which no single option is: on exact predictions that relaxation ended at no guidance at
   all. Here what runs is always a policy within the budget, and the few of least error are compared on the same batches at the end.
2. Steps are scaled by the greatest gradient, not one by one as Adam does, which would raise the gates of steps that hardly matter as fast
   as those of steps that do.
3. A mixture is linear in c and u, so one prediction of strength s_t is all of it: memory does not grow with the options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.files import read_json, write_json
from diffalign.guidance import Branch, GuidanceRun
from diffalign.methods.checks import check_integer, check_number
from diffalign.methods.guidance import Guidance, PlannedPolicy, guided_within, require_same_identity, require_scale
from diffalign.noise import sample_dot

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
    """Multiples of w, above 0, with 1 among them: the strengths of the guided options. Paper: k of them."""
    iterations: int = 80
    """>= 1, each on a batch of its own. Paper: 10,000 pairs."""
    lr: float = 0.3
    """Above 0: the greatest change of a gate or a logit in the first iteration; it falls to zero linearly."""
    finalists: int = 4
    """>= 1: policies of least error that are compared on the same batches, as many as policies."""

    def __post_init__(self) -> None:
        check_number("budget", self.budget, 0.5, 1.0, above=True)
        check_integer("iterations", self.iterations, 1)
        check_integer("finalists", self.finalists, 1)
        check_number("lr", self.lr, 0.0, above=True)
        for strength in self.strengths:
            check_number("strengths", strength, 0.0, above=True)
        if 1.0 not in self.strengths:
            raise ValueError(f"strengths must hold 1.0, the pipeline's own guidance scale, got {self.strengths}.")


@dataclass(frozen=True)
class SearchedGuidance(Guidance):
    """A policy that a search found: one strength s for each step. Refused with reasons in a run that it was not searched for.

    One written by hand has no identity, and runs wherever the number of steps is right.
    """

    name: ClassVar[str] = "searched"

    strengths: tuple[float, ...]
    identity: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def begin(self, run: GuidanceRun) -> StrengthsPolicy:
        known = {"timesteps": list(run.timesteps), "guidance_scale": run.guidance_scale}
        made_for = {name: self.identity[name] for name in known if name in self.identity}
        require_same_identity("the searched policy", made_for, {name: known[name] for name in made_for})
        return StrengthsPolicy(run, self)

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
        strengths = data.get("strengths") if isinstance(data, dict) else None
        if not isinstance(strengths, list) or not all(isinstance(each, int | float) and each >= 0 for each in strengths):
            raise ValueError(f"{file} holds no searched policy; search again")
        return cls(tuple(strengths), data.get("identity", {}), data.get("notes", {}))


class StrengthsPolicy(PlannedPolicy):
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

    def begin(self, run: GuidanceRun) -> RelaxedPolicy:
        self.run = run
        return RelaxedPolicy(run, self.strengths)


class RelaxedPolicy(PlannedPolicy):
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
    where method is None and differentiable otherwise. progress(i, {"error": relative, of what ran, "policies": how many so far}).
    """
    settings = settings or SearchSettings()
    if guidance_scale <= 1:
        raise ValueError(f"guidance_scale must be above 1, got {guidance_scale:g}: one branch is evaluated then, and nothing to search.")
    guided, alone = torch.tensor([guidance_scale * each for each in settings.strengths]), torch.tensor([UNCONDITIONAL, CONDITIONAL])
    logits = Logits.initial(steps, settings.strengths.index(1.0), len(guided))
    allowed = guided_within(settings.budget, steps)
    errors: dict[tuple[float, ...], list[float]] = {}
    for i in range(settings.iterations):
        with torch.no_grad():
            target = sample(i, None).float()
        with torch.enable_grad():
            strengths = logits.strengths(guided, alone, allowed)
            relaxed = RelaxedGuidance(strengths)
            error = relative_square(sample(i, relaxed).float(), target)
            gradients = torch.autograd.grad(error, logits.tensors())
        if not relaxed.run.unconditional_alone:  # no step starts there, so the first iteration may not know
            alone = torch.full_like(alone, CONDITIONAL)
        rate = settings.lr * (1 - i / settings.iterations) / max(1e-12, *(float(each.abs().max()) for each in gradients))
        for tensor, gradient in zip(logits.tensors(), gradients, strict=True):
            tensor.data -= rate * gradient
        errors.setdefault(tuple(strengths.detach().tolist()), []).append(float(error.detach()))
        if progress is not None:
            progress(i, {"error": float(error.detach()) ** 0.5, "policies": float(len(errors))})
    finalists = sorted(errors, key=lambda policy: sum(errors[policy]) / len(errors[policy]))[: settings.finalists]
    scores = {}
    with torch.no_grad():
        targets = [sample(i, None).float() for i in range(settings.finalists)]
        for policy in finalists:
            ends = [sample(i, RelaxedGuidance(torch.tensor(policy))).float() for i in range(settings.finalists)]
            scores[policy] = sum(float(relative_square(end, target)) for end, target in zip(ends, targets, strict=True)) / len(ends)
    chosen = min(finalists, key=scores.__getitem__)
    notes = {"settings": asdict(settings), "error": scores[chosen] ** 0.5, "policies": len(errors)}
    return SearchedGuidance(chosen, dict(relaxed.run.identity()), notes)


def relative_square(end: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """|end - target|^2 / |target|^2, mean over samples."""
    return (sample_dot(end - target, end - target) / sample_dot(target, target)).mean()


@dataclass
class Logits:
    """What is searched: a gate for each step, and logits over its strengths and over what it does alone."""

    gate: Float[Tensor, " t"]
    strength: Float[Tensor, "t k"]
    alone: Float[Tensor, "t 2"]

    @classmethod
    def initial(cls, steps: int, own: int, strengths: int) -> Logits:
        """Guidance at the pipeline's own scale, in the leading steps; c where one branch is evaluated."""
        tensors = torch.zeros(steps), torch.zeros(steps, strengths), torch.zeros(steps, 2)
        tensors[1][:, own], tensors[2][:, 1] = 1.0, 1.0
        return cls(*(each.requires_grad_() for each in tensors))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate, self.strength, self.alone

    def strengths(self, guided: Float[Tensor, " k"], alone: Float[Tensor, " 2"], allowed: int) -> Float[Tensor, " t"]:
        """The strength of every step under the choice that these logits stand for, with gradients as if it were relaxed."""
        keep = torch.zeros_like(self.gate)
        keep[self.gate.detach().argsort(descending=True, stable=True)[:allowed]] = 1.0
        keep = _straight_through(keep, torch.sigmoid(self.gate))
        return keep * (_hard(self.strength) @ guided) + (1 - keep) * (_hard(self.alone) @ alone)


def _hard(logits: Float[Tensor, "t k"]) -> Float[Tensor, "t k"]:
    chosen = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)
    return _straight_through(chosen, torch.softmax(logits, dim=1))


def _straight_through(value: Tensor, relaxed: Tensor) -> Tensor:
    """`value` exactly, with the gradient of `relaxed`."""
    return value + (relaxed - relaxed.detach())
