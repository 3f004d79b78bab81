"""The table of methods, one row for each. Python's lazy names, the command line, the app and docs/methods.md read it.

Literal, and read without importing torch: whoever opens it sees everything there is. To register a method, write its
file and add its row.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

NOISE, STEP = "noise", "step"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table."""

    name: str
    """On the command line and in the app."""
    target: str
    """Where its class is, as "module:Class". The class name is public: `diffalign.Class`."""
    kind: Literal["noise", "step"]
    """noise: an outer loop over whole generations (`types.NoiseMethod`). step: an inner hook at every denoising step."""
    needs_gradient: bool = False
    """Whether it differentiates the reward, so that a reward without gradient is refused."""
    needs_steps: bool = False
    """Whether it steers a denoising loop of several steps, so that a one-step model is refused."""
    needs_policy: bool = False
    """Whether it uses what was trained for one model, so that others are refused."""
    by_seconds: bool = False
    """Whether it can be bounded in seconds as well: it stops between evaluations."""
    from_budget: str | None = None
    """What builds it from (reward, budget=N): "" the class itself, else a classmethod of it. None: it has no budget."""
    paper: str
    """Where it comes from, short."""
    summary: str
    """What it does, in one line."""

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def class_name(self) -> str:
        return self.target.partition(":")[2]

    def load(self) -> type:
        """The class. This is where its imports happen."""
        return getattr(import_module(self.module), self.class_name)


METHODS: tuple[Method, ...] = (
    Method(
        name="reno",
        target="diffalign.methods.reno:ReNO",
        kind=NOISE,
        needs_gradient=True,
        by_seconds=True,
        from_budget="",
        paper="Eyring et al. 2024, arXiv 2406.04312",
        summary="climb the reward by its gradient on the noise, from the best of as many noises as half the budget draws",
    ),
    Method(
        name="reno-paper",
        target="diffalign.methods.reno:ReNO",
        kind=NOISE,
        needs_gradient=True,
        by_seconds=True,
        from_budget="paper",
        paper="Eyring et al. 2024, arXiv 2406.04312",
        summary="the same with the published settings: one noise, a step of fixed length, no early stop",
    ),
    Method(
        name="best-of-n",
        target="diffalign.methods.search:BestOfN",
        kind=NOISE,
        by_seconds=True,
        from_budget="",
        paper="Karthik et al. 2023, arXiv 2305.13308",
        summary="spend the whole budget on drawing noises and keep the image that the reward likes best",
    ),
    Method(
        name="zero-order",
        target="diffalign.methods.zero_order:ZeroOrder",
        kind=NOISE,
        by_seconds=True,
        from_budget="",
        paper="Ma et al. 2025, arXiv 2501.09732",
        summary="try noises near the best one, move to those that score better, narrow the search where none does",
    ),
    Method(
        name="random-walk",
        target="diffalign.methods.zero_order:ZeroOrder",
        kind=NOISE,
        by_seconds=True,
        from_budget="random_walk",
        paper="Ma et al. 2025, arXiv 2501.09732",
        summary="its control: the same steps, blind to the reward, the best image kept",
    ),
    Method(
        name="find",
        target="diffalign.methods.find:FIND",
        kind=NOISE,
        by_seconds=True,
        from_budget="",
        paper="Chen et al. 2024, arXiv 2407.19453",
        summary="learn a normal distribution of noises that score well, by policy gradients; it can be drawn from again",
    ),
    Method(
        name="find-paper",
        target="diffalign.methods.find:FIND",
        kind=NOISE,
        by_seconds=True,
        from_budget="paper",
        paper="Chen et al. 2024, arXiv 2407.19453",
        summary="the same as the paper describes: one noise at a time, small steps, a network as baseline",
    ),
    Method(
        name="amortised",
        target="diffalign.methods.amortised:AmortisedNoise",
        kind=NOISE,
        needs_policy=True,
        from_budget="shipped",
        paper="Eyring et al. 2025, arXiv 2508.09968",
        summary="noise that a small network, trained beforehand, has moved towards the reward; best of as many as the budget",
    ),
    Method(
        name="fk",
        target="diffalign.methods.particles:FKSteering",
        kind=NOISE,
        needs_steps=True,
        from_budget="",
        paper="Singhal et al. 2025, arXiv 2501.06848",
        summary="denoise several particles at once and draw them again by what the reward sees on the way; several steps only",
    ),
    Method(
        name="prune",
        target="diffalign.methods.particles:SeedPruning",
        kind=NOISE,
        needs_steps=True,
        from_budget="",
        paper="successive halving, Jamieson and Talwalkar 2016, arXiv 1502.07943",
        summary="start many noises and drop the worse half on the way, twice; several steps only",
    ),
    Method(
        name="guide",
        target="diffalign.methods.guide:Guide",
        kind=NOISE,
        needs_gradient=True,
        needs_steps=True,
        from_budget="",
        paper="Bansal et al. 2023, arXiv 2302.07121 (forward guidance)",
        summary="pull the predicted image along the reward's gradient while it is denoised; several steps only",
    ),
    Method(
        name="adaptive",
        target="diffalign.methods.adaptive_guidance:AdaptiveGuidance",
        kind=STEP,
        paper="Castillo et al. 2025, arXiv 2312.12487",
        summary="guide a sample until its two predictions agree",
    ),
    Method(
        name="linear",
        target="diffalign.methods.linear_guidance:LinearGuidance",
        kind=STEP,
        paper="Castillo et al. 2025, arXiv 2312.12487 (LinearAG)",
        summary="predict the unconditional branch from earlier predictions, by a regression fitted to the model",
    ),
    Method(
        name="searched",
        target="diffalign.methods.guidance_search:SearchedGuidance",
        kind=STEP,
        paper="Castillo et al. 2025, arXiv 2312.12487 (policy search)",
        summary="follow a plan, one choice per step, that was searched for this model",
    ),
    Method(
        name="interval",
        target="diffalign.methods.guidance_rivals:IntervalGuidance",
        kind=STEP,
        paper="Kynkaanniemi et al. 2024, arXiv 2404.07724",
        summary="guide between two noise levels",
    ),
    Method(
        name="fixed",
        target="diffalign.methods.guidance_rivals:FixedFraction",
        kind=STEP,
        paper="Zhang et al. 2025, arXiv 2506.08351 (Step AG)",
        summary="guide the first share of the steps",
    ),
    Method(
        name="reuse",
        target="diffalign.methods.guidance_rivals:DeltaReuse",
        kind=STEP,
        paper="FastVideo, pull request 1372",
        summary="guide the first share of the steps, then keep the last difference between the two predictions",
    ),
)


def names(kind: str) -> tuple[str, ...]:
    """Every name of a kind, in the table's order."""
    return tuple(row.name for row in METHODS if row.kind == kind)


def find_method(name: str, kind: str | None = None) -> Method:
    """The row of a name. Raises ValueError where there is none (of that kind), naming the nearest."""
    known = {row.name: row for row in METHODS if kind in (None, row.kind)}
    if name not in known:
        raise ValueError(f"method {name!r} is unknown; {suggestion(name, known)}")
    return known[name]


def suggestion(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is not among those known."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def markdown(kind: str) -> str:
    """The rows of a kind as docs/methods.md shows them."""
    lines = ["| name | Python | gradient | what it does | source |", "|---|---|---|---|---|"]
    for row in METHODS:
        if row.kind == kind:
            python = ".".join(["diffalign", row.class_name, *([row.from_budget] if row.from_budget else [])])
            needs = "of the reward" if row.needs_gradient else "none"
            lines.append(f"| `{row.name}` | `{python}` | {needs} | {row.summary} | {row.paper} |")
    return "\n".join(lines)
