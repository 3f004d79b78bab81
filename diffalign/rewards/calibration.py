"""Common units for rewards: where each one's scores lie on samples of the base model, measured once.

    z         (r - mean) / std                     over all samples                      the default
    within    (r - mean of the prompt's samples) / s_w
              s_w^2 = mean over prompts of the variance within each
    quantile  the share of base samples below r    piecewise linear between stored quantiles, linear
                                                   tails beyond them

CLIP-like scores differ more between prompts than between images of one prompt, so only "within" makes
weights say how much *better an image* a unit is; it needs base samples of the very prompts that it is
used on. A probability (VQAScore, a judge's P(yes)) is taken to log-odds first: transform "logit". All
three are differentiable, except where a quantile's neighbours coincide (slope 0).

Why at all: raw sums (the constants of ReNO, Flow-GRPO) are a calibration made by hand, and under min
or variance a reward's free offset would decide alone; the authors of WCO / UWO standardise each member
too (Coste et al., 2310.02743; issue 12 of their repository).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffalign.files import read_json, write_json
from diffalign.types import Images, RewardModel, Scores

logger = logging.getLogger(__name__)

Unit = Literal["z", "within", "quantile"]
Transform = Literal["none", "logit"]
LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
FEW = 100  # samples, below which a standard deviation is too rough to compare rewards by
LOGIT_EDGE = 1e-5  # probabilities are held this far from 0 and 1, where float32 still tells their log-odds


@dataclass(frozen=True)
class MemberCalibration:
    """Where one reward's scores lie, after `transform`."""

    spec: str
    """The reward model's own name; "" for any."""
    mean: float
    """Over all samples."""
    std: float
    """> 0, over all samples, n - 1 in the denominator."""
    n: int
    """How many base samples there were."""
    between: float | None = None
    """The standard deviation of the prompts' means; None where no prompt had two samples."""
    within: float | None = None
    """s_w, pooled inside prompts; None where no prompt had two samples."""
    quantiles: tuple[float, ...] = ()
    """The values at LEVELS."""
    transform: Transform = "none"
    """What is done to a native score first: "logit" for probabilities."""
    prompt_means: Mapping[str, float] | None = None
    """Prompt -> mean of its samples, kept for unit "within" alone."""


@dataclass(frozen=True)
class Calibration:
    """The common units of a mix's members, as plain JSON beside the run."""

    members: Mapping[str, MemberCalibration]
    """Name in the mix -> its numbers."""
    unit: Unit = "z"
    """What `apply` gives."""
    prompts: str = ""
    """Hash of the set of prompts."""
    source: str = ""
    """What made the images, in words."""

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        for name, member in self.members.items():
            _check(name, member, self.unit)

    @classmethod
    def identity(cls, names: Iterable[str]) -> Calibration:
        """The calibration that changes nothing: the user's word that these rewards share a unit and an offset already."""
        return cls({name: MemberCalibration(spec="", mean=0.0, std=1.0, n=0) for name in names}, source="identity")

    def apply(self, name: str, scores: Scores, prompts: Sequence[str]) -> Scores:
        """Native scores of member `name` in this calibration's unit. Raises ValueError for an unknown name or prompt."""
        member = self._member(name)
        values = scores.float()
        if member.transform == "logit":
            values = torch.logit(values, eps=LOGIT_EDGE)
        if self.unit == "quantile":
            return _quantile(values, member.quantiles)
        if self.unit == "z":
            return (values - member.mean) / member.std
        known = member.prompt_means or {}
        missing = [prompt for prompt in prompts if prompt not in known]
        if missing:
            what = f"the calibration has no base samples of the prompt {missing[0][:80]!r}, which unit 'within' needs"
            raise ValueError(f"{what}; calibrate on the prompts that are used, or take unit 'z'")
        return (values - torch.tensor([known[prompt] for prompt in prompts], device=values.device)) / member.within

    def scale(self, name: str) -> float:
        """One standard deviation of member `name`, after its transform; within prompts where that is the unit."""
        member = self._member(name)
        return member.within if self.unit == "within" and member.within else member.std

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: Any, what: str = "the calibration") -> Calibration:
        """What `to_json` gave. Raises ValueError, beginning with `what`, for anything else."""
        try:
            members = {name: _member_from_json(entry) for name, entry in data["members"].items()}
            return cls(members, **{key: data[key] for key in ("unit", "prompts", "source") if key in data})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{what} is not a calibration of rewards ({error!r}); make one with `diffalign calibrate`") from error

    def save(self, path: str | Path) -> None:
        """JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Raises FileNotFoundError, or ValueError naming the file where it does not hold a calibration."""
        return cls.from_json(read_json(Path(path)), f"the file {path}")

    @property
    def digest(self) -> str:
        """Of everything in it, to tell two calibrations apart."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def _member(self, name: str) -> MemberCalibration:
        if name not in self.members:
            raise ValueError(f"the calibration does not know the reward {name!r}; it knows {', '.join(self.members) or 'none'}")
        return self.members[name]


@torch.no_grad()
def calibrate(
    models: Mapping[str, RewardModel],
    images: Images,
    prompts: Sequence[str],
    *,
    unit: Unit = "z",
    transforms: Mapping[str, Transform] | None = None,
    source: str = "",
    batch_size: int = 32,
) -> Calibration:
    """Scores base-model images "n 3 h w" in [0, 1] of n prompts with every model, and says where the scores lie.

    models: name in the mix -> reward model.
    unit: of the calibration. "within" needs several images of each prompt.
    transforms: name -> "logit" for rewards that are probabilities.
    source: what made the images, in words.
    batch_size: images scored at once. Memory and speed only.

    500 images or more are good. Errors as in `from_scores`.
    """
    if len(images) != len(prompts):
        raise ValueError(f"images and prompts must be equally many, got {len(images)} and {len(prompts)}")
    scores = {}
    for name, model in models.items():
        model.prepare(list(dict.fromkeys(prompts)))
        parts = [model(images[at : at + batch_size], prompts[at : at + batch_size]) for at in range(0, len(prompts), batch_size)]
        scores[name] = torch.cat([part.float().cpu() for part in parts]) if parts else torch.zeros(0)
    specs = {name: model.name for name, model in models.items()}
    return from_scores(scores, prompts, specs=specs, unit=unit, transforms=transforms, source=source)


def from_scores(
    scores: Mapping[str, Tensor | Sequence[float]],
    prompts: Sequence[str],
    *,
    specs: Mapping[str, str] | None = None,
    unit: Unit = "z",
    transforms: Mapping[str, Transform] | None = None,
    source: str = "",
) -> Calibration:
    """A calibration from scores that exist already: scores[name][i] is of an image of prompts[i].

    specs: name -> the reward model's own name; its name in the mix without one.

    Scores that are not finite are left out. Raises ValueError where fewer than two are left, where a
    reward gives every image the same, and for a "logit" of what is no probability.
    """
    specs, transforms = specs or {}, transforms or {}
    members = {}
    for name, values in scores.items():
        values = torch.as_tensor(values, dtype=torch.float64)
        if values.shape != (len(prompts),):
            raise ValueError(f"scores[{name!r}] must hold one number for each of {len(prompts)} prompts, got shape {tuple(values.shape)}")
        transform = transforms.get(name, "none")
        members[name] = _measure(name, values, prompts, specs.get(name, name), transform, unit == "within")
    text = "\n".join(sorted(set(prompts)))
    return Calibration(members, unit, hashlib.sha256(text.encode()).hexdigest()[:16], source)


def _measure(name: str, values: Tensor, prompts: Sequence[str], spec: str, transform: Transform, keep_prompts: bool) -> MemberCalibration:
    finite = values.isfinite()
    kept, texts = values[finite], [prompt for prompt, good in zip(prompts, finite.tolist(), strict=True) if good]
    if len(kept) < 2:
        raise ValueError(f"reward {name!r} has {len(kept)} finite scores of {len(values)}; two are the least from which a spread is known")
    if len(kept) < FEW:
        logger.warning("reward %r is calibrated on %d images; %d or more are good, 500 better", name, len(kept), FEW)
    if transform == "logit":
        if kept.min() < 0 or kept.max() > 1:
            raise ValueError(
                f"reward {name!r} is no probability, so no 'logit': its scores reach from {kept.min():.4g} to {kept.max():.4g}"
            )
        kept = torch.logit(kept, eps=LOGIT_EDGE)
    groups: dict[str, list[float]] = {}
    for prompt, value in zip(texts, kept.tolist(), strict=True):
        groups.setdefault(prompt, []).append(value)
    means = torch.tensor([sum(group) / len(group) for group in groups.values()], dtype=torch.float64)
    several = [torch.tensor(group, dtype=torch.float64) for group in groups.values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in several)
    return MemberCalibration(
        spec=spec,
        mean=float(kept.mean()),
        std=float(kept.std()),
        n=len(kept),
        between=float(means.std()) if several and len(means) > 1 else None,
        within=math.sqrt(squares / freedom) if several else None,
        quantiles=tuple(torch.quantile(kept, torch.tensor(LEVELS, dtype=torch.float64)).tolist()),
        transform=transform,
        prompt_means=dict(zip(groups, means.tolist(), strict=True)) if keep_prompts else None,
    )


def _quantile(values: Scores, quantiles: Sequence[float]) -> Scores:
    """The cumulative distribution through (quantiles, LEVELS); beyond its ends it goes on with the slope of the last piece."""
    x = torch.tensor(quantiles, device=values.device, dtype=torch.float32)
    y = torch.tensor(LEVELS, device=values.device, dtype=torch.float32)
    right = torch.searchsorted(x, values.detach()).clamp(1, len(x) - 1)
    width = x[right] - x[right - 1]
    slope = torch.where(width > 0, (y[right] - y[right - 1]) / width.clamp_min(1e-12), 0.0)
    return y[right - 1] + slope * (values - x[right - 1])


def _check(name: str, member: MemberCalibration, unit: Unit) -> None:
    """Raises ValueError where these numbers cannot make `unit`."""
    if member.transform not in get_args(Transform):
        raise ValueError(f"the transform of reward {name!r} must be one of {', '.join(get_args(Transform))}, got {member.transform!r}")
    if not math.isfinite(member.mean) or not math.isfinite(member.std) or member.std <= 0:
        numbers = f"mean {member.mean}, standard deviation {member.std}"
        raise ValueError(f"reward {name!r} cannot be calibrated: it scores every base image alike ({numbers}); leave it out")
    if unit == "quantile" and len(member.quantiles) != len(LEVELS):
        raise ValueError(
            f"the calibration of reward {name!r} holds {len(member.quantiles)} quantiles, and unit 'quantile' needs {len(LEVELS)}"
        )
    if unit == "within" and (not member.within or member.prompt_means is None):
        raise ValueError(f"the calibration of reward {name!r} has no spread within prompts; calibrate with several images of each prompt "
                         "and unit 'within'")  # fmt: skip


def _member_from_json(entry: Mapping[str, Any]) -> MemberCalibration:
    known = {field.name for field in fields(MemberCalibration)}
    if set(entry) - known:
        raise KeyError(f"unknown fields {', '.join(sorted(set(entry) - known))}")
    return MemberCalibration(**{**entry, "quantiles": tuple(entry.get("quantiles", ()))})
