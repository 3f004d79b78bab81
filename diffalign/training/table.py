"""The objectives that can be trained by name, one row each: what they learn from, which rewards they are handed, where they come from."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from diffalign.training.contract import Objective, ScoreImages


@dataclass(frozen=True)
class Row:
    """One objective."""

    name: str
    """On the command line and in Python."""
    target: str
    """module:Class, or module:Class.classmethod, below diffalign.training.objectives."""
    summary: str
    data: Literal["pairs", "votes", "prompts"]
    """Pairs of images, images that were liked or not, or prompts to make images of."""
    rewards: Literal["none", "one", "several", "climbed"] = "none"
    """None; their weighted sum; each by itself; each by itself and differentiable."""
    paper: str = ""


TABLE: tuple[Row, ...] = (
    Row("sft", "sft:SFT", "tune on the preferred images alone: the baseline", "pairs"),
    Row("dpo", "preference:DPO", "tune on preferences (Diffusion-DPO)", "pairs", paper="2311.12908"),
    Row("inpo", "inpo:InPO", "tune on preferences at the latents that lead to the images (DDIM-InPO)", "pairs", paper="2503.18454"),
    Row("dcpo", "dcpo:DCPO", "tune on preferences with a caption for each image (DCPO)", "pairs", paper="2502.06023"),
    Row("dcpo-inpo", "dcpo:DCPO.of_inpo", "DCPO's captions at InPO's latents", "pairs"),
    Row("mapo", "mapo:MaPO", "tune on preferences without a reference (MaPO)", "pairs", paper="2406.06424"),
    Row("kto", "kto:KTO", "tune on images that were liked or not, each on its own (Diffusion-KTO)", "votes", paper="2404.04465"),
    Row("d3po", "d3po:D3PO", "make the steps to preferred images likelier, compared by rewards (D3PO)", "prompts", "several", "2311.13231"),
    Row("ddpo", "ddpo:DDPO", "policy gradient on a reward (DDPO)", "prompts", "one", "2305.13301"),
    Row("dpok", "ddpo:DDPO.dpok", "DDPO held to the model before tuning (DPOK)", "prompts", "one", "2305.16381"),
    Row("flow-grpo", "ddpo:DDPO.flow_grpo", "policy gradient for flow models (Flow-GRPO)", "prompts", "one", "2505.05470"),
    Row("parrot", "parrot:Parrot", "policy gradient on the Pareto fronts of several rewards (Parrot)", "prompts", "several", "2401.05675"),
    Row("draft", "draft:DRaFT", "climb rewards through the last steps (DRaFT-K)", "prompts", "climbed", "2309.17400"),
    Row("alignprop", "draft:AlignProp", "climb rewards through some of the last steps (AlignProp)", "prompts", "climbed", "2310.03739"),
    Row("refl", "draft:ReFL", "climb rewards of a prediction at a random late step (ReFL)", "prompts", "climbed", "2304.05977"),
    Row("r0", "r0:R0", "make a few-step generator by rewards alone (R0)", "prompts", "climbed", "2503.13070"),
    Row("r0+", "r0:R0Plus", "R0 at a random step of the chain: one step has a gradient", "prompts", "climbed", "2503.13070"),
)
"""In the order of the documents."""


def names() -> tuple[str, ...]:
    return tuple(row.name for row in TABLE)


def find_row(name: str) -> Row:
    """ValueError for an unknown name, with a hint."""
    for row in TABLE:
        if row.name == name:
            return row
    raise ValueError(f"unknown method {name!r}; {_suggestion(name, list(names()))}")


def markdown() -> str:
    """The rows as docs/tuning.md shows them."""
    needs = {"none": "", "one": "their weighted sum", "several": "each by itself", "climbed": "each by itself, with gradient"}
    lines = ["| name | learns from | rewards | what it does | paper |", "|---|---|---|---|---|"]
    for row in TABLE:
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else ""
        lines.append(f"| `{row.name}` | {row.data} | {needs[row.rewards]} | {row.summary} | {paper} |")
    return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Rewards:
    """What a run is rewarded by."""

    scores: Mapping[str, ScoreImages]
    """Name -> reward; none for objectives on data."""
    weights: Mapping[str, float]
    """Name -> weight, of every reward."""
    watched: Mapping[str, ScoreImages]
    """Name -> reward that is only reported."""
    gradient: Any = None
    """A rule of diffalign.rewards that makes one direction of several gradients; None: their weighted sum."""

    def total(self) -> ScoreImages:
        """The weighted sum."""

        def score(images: Any, prompts: list[str]) -> Any:
            return sum(weight * self.scores[name](images, prompts) for name, weight in self.weights.items())

        return score


def build_objective(
    row: Row,
    fields: Mapping[str, Any] | None = None,
    rewards: Rewards | None = None,
    *,
    paper: bool = False,
    weight_distance: Callable[[], Any] | None = None,
) -> Objective:
    """The objective of a row with fields that differ from the default; "rollouts.images" names a field of a field.

    paper: start from the published settings. weight_distance: for objectives with a penalty on it.
    Raises ValueError for an unknown field or value, rewards where none are used or none where they are needed, and where a row has no
    published settings.
    """
    module, path = row.target.split(":")
    cls, *maker = path.split(".")
    make = getattr(importlib.import_module(f"diffalign.training.objectives.{module}"), cls)
    known = {each.name for each in dataclasses.fields(make)}
    if paper and (maker or not hasattr(make, "paper") or "weight_distance" in known):
        raise ValueError(f"{row.name} has no published settings of its own beside its defaults; leave paper out")
    given: dict[str, Any] = {}
    arguments = _reward_arguments(row, rewards)
    if "weight_distance" in known and weight_distance is not None:
        given["weight_distance"] = weight_distance
    for name in maker or (["paper"] if paper else []):
        make = getattr(make, name)
    try:
        objective = make(*arguments, **given)
    except TypeError as error:
        raise ValueError(f"{row.name}: {error}") from error
    weights = {} if rewards is None or "weights" not in known else {"weights": dict(rewards.weights)}
    return with_fields(objective, {**weights, **(fields or {})}, row.name)


def _reward_arguments(row: Row, rewards: Rewards | None) -> tuple[Any, ...]:
    if row.rewards == "none":
        if rewards is not None and rewards.scores:
            raise ValueError(f"{row.name} learns from {row.data} and takes no reward; watch it instead")
        return ()
    if rewards is None or not rewards.scores:
        raise ValueError(f"{row.name} learns from rewards; give reward=, as in reward={{'shapes-reward': 1.0}}")
    if row.rewards == "one":
        return (rewards.total(),)
    if row.rewards == "several":
        return (rewards.scores,)
    from diffalign.training.climbing import Climb

    return (Climb(rewards.scores, rewards.weights, rewards.gradient, rewards.watched),)


def with_fields(settings: Any, fields: Mapping[str, Any], where: str) -> Any:
    """`settings`, a frozen dataclass, with some fields changed. ValueError for a field that it has not, or a value that it refuses."""
    known = {each.name: each for each in dataclasses.fields(settings)}
    changed: dict[str, Any] = {}
    for name in dict.fromkeys(name.partition(".")[0] for name in fields):
        if name not in known:
            raise ValueError(f"{where} has no setting {name!r}; {_suggestion(name, list(known))}")
        inner = {key.partition(".")[2]: value for key, value in fields.items() if key.startswith(f"{name}.")}
        if inner and not dataclasses.is_dataclass(getattr(settings, name)):
            raise ValueError(f"{where}: {name} has no settings of its own, got {', '.join(f'{name}.{key}' for key in inner)}")
        changed[name] = fields[name] if name in fields else with_fields(getattr(settings, name), inner, f"{where}: {name}")
    return dataclasses.replace(settings, **changed)


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
