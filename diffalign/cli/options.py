"""Groups of options that several commands share, one class each, and what they mean together. Nothing heavy is imported here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffalign import hub
from diffalign.cli import values
from diffalign.methods.table import NOISE, find_method
from diffalign.options import option
from diffalign.reward_models import Spec, sources_of
from diffalign.rewards.names import GRADIENT_RULES, RULES, forms

DEFAULT_PIPELINE = "shapes-turbo"
DEFAULT_REWARD: Mapping[str, float] = {"shapes-reward": 1.0}
"""For the shapes pipelines; the others must be told, since this reward knows shapes alone."""
MEMORY = ("checkpointing", "sliced-decoder", "offload-text", "offload-all")
POLICY_FILE = "noise_policy.json"
FROM_FILE = {"linear": "linear_guidance.json", "searched": "searched_guidance.json"}
"""What makes a folder one of these kinds of guidance."""
MAKERS = {"linear": "linear-ag", "searched": "guidance-search"}


def is_shapes(pipeline: str | None) -> bool:
    return pipeline in ("shapes", "shapes-turbo")


@dataclass(frozen=True)
class Model:
    """The generator."""

    pipeline: str | None = option(DEFAULT_PIPELINE, "a preset, a local folder, or a hub id", parse=values.pipeline_name)
    lora: Path | None = option(None, "tuned weights: a .safetensors file or its folder", parse=values.lora, metavar="PATH")
    steps: int | None = option(None, "denoising steps (default: the pipeline's)", parse=values.count, metavar="N")
    guidance_scale: float | None = option(None, "strength of guidance (default: the pipeline's)", parse=values.scale, metavar="X")
    batch_size: int | None = option(None, "images at once; speed and memory only", parse=values.count, metavar="N")
    device: str | None = option(None, "cpu, cuda:1, ... (default: the best there is)")
    dtype: str | None = option(None, "number type (default: the pipeline's own for the device)", choices=values.DTYPES, advanced=True)
    memory: tuple[str, ...] = option((), f"spend less of it: {', '.join(MEMORY)}", choices=MEMORY, many=True, metavar="WAY", advanced=True)
    attention: str = option("sdpa", "torch's own, or that of the extra xformers", choices=("sdpa", "xformers"), advanced=True)

    def check(self) -> None:
        if {"offload-text", "offload-all"} <= set(self.memory):
            raise ValueError("--memory takes offload-text or offload-all, not both: the latter includes the text encoders")

    def batch(self, for_shapes: int) -> int:
        """The given --batch-size; else one image at a time, or `for_shapes` for the embedded models, which are tiny."""
        return self.batch_size or (for_shapes if is_shapes(self.pipeline) else 1)

    def arguments(self) -> dict[str, int | float]:
        """The diffusers arguments that were given; what is absent is left to the preset."""
        given = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Rewards:
    """What is optimised, and what only watches."""

    reward: tuple[tuple[str, float], ...] = option(
        (),
        f"a weighted sum to optimise (default with shapes: {' '.join(DEFAULT_REWARD)})",
        parse=values.reward_weight,
        many=True,
        metavar="NAME=WEIGHT",
    )
    watch: tuple[str, ...] = option((), "rewards to report without optimising them", parse=values.reward_name, many=True, metavar="NAME")
    source: tuple[tuple[str, str | None, str], ...] = option(
        (),
        "where a reward's weights lie: a folder, a file, a hub id; NAME:PART=PLACE for one part of several",
        parse=values.source,
        many=True,
        metavar="NAME=PLACE",
        advanced=True,
    )
    reward_rule: str = option(
        "weighted", f"how several rewards become one: {forms(RULES)}", parse=values.reward_rule, metavar="NAME", advanced=True
    )
    reward_gradient: str | None = option(
        None,
        f"how their gradients become one, for reno: {forms(GRADIENT_RULES)} (default: as the rule has it)",
        parse=values.gradient_rule,
        metavar="NAME",
        advanced=True,
    )
    calibration: Path | None = option(
        None,
        "common units of the rewards, which every rule but weighted needs; `diffalign calibrate` makes one",
        parse=Path,
        metavar="FILE.json",
        advanced=True,
    )

    def check(self) -> None:
        """Raises ValueError where a reward is given twice, or the rule lacks its calibration. Before anything is loaded."""
        names = [*(name for name, _ in self.reward), *self.watch]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"reward {', '.join(sorted(twice))} is given more than once; name each in --reward or --watch, once")
        rule = self.reward_rule.partition("=")[0]
        if RULES[rule].calibrated and not self.calibration:
            raise ValueError(f"--reward-rule {rule} compares rewards, so it needs --calibration FILE.json; `diffalign calibrate` makes one")
        if self.calibration and not self.calibration.is_file():
            raise ValueError(f"--calibration {self.calibration} does not exist; `diffalign calibrate` makes one")

    def mix(self, pipeline: str | None) -> dict[str, float]:
        """The rewards to optimise, in the order given. Raises ValueError where none is given and no default fits."""
        self.check()
        if self.reward:
            return dict(self.reward)
        if is_shapes(pipeline):
            # the default weights are of native units; calibrated rewards count alike
            return dict.fromkeys(DEFAULT_REWARD, 1.0) if self.calibration else dict(DEFAULT_REWARD)
        raise ValueError(f"--reward is needed with --pipeline {pipeline}: the default reward knows shapes only")

    def places(self, mix: Mapping[str, float]) -> dict[str, dict[str, str]]:
        """Reward -> part -> where its weights lie, of those in the mix and of those that watch."""
        known = hub.reward_specs()
        return sources(self.source, {name: known[name] for name in (*mix, *self.watch)}) if self.source else {}

    def settings(self) -> dict[str, str]:
        """What the rule adds to a run's settings: nothing where nothing was asked for. A calibration counts by its content."""
        settings = {}
        if self.reward_rule != "weighted":
            settings["reward_rule"] = self.reward_rule
        if self.reward_gradient:
            settings["reward_gradient"] = self.reward_gradient
        if self.calibration:
            settings["calibration"] = hashlib.sha256(self.calibration.read_bytes()).hexdigest()[:16]
        if self.source:
            settings["source"] = " ".join(f"{name}:{part}={place}" if part else f"{name}={place}" for name, part, place in self.source)
        return settings


def sources(given: Iterable[tuple[str, str | None, str]], specs: Mapping[str, Spec]) -> dict[str, dict[str, str]]:
    """Reward -> part -> where its weights lie. Raises ValueError for a reward that is not used, a part it lacks, or two places for one."""
    found: dict[str, dict[str, str]] = {}
    for name, part, place in given:
        if name not in specs:
            raise ValueError(f"--source names {name}, which is not among the rewards to score ({', '.join(specs)})")
        if not specs[name].checkpoint:
            raise ValueError(f"--source names {name}, which has no weights to load")
        part = part or next(iter(specs[name].checkpoint))
        if part in found.get(name, {}):
            raise ValueError(f"--source gives {name} two places for its {part}; give one")
        found.setdefault(name, {})[part] = place
    for name, places in found.items():
        if name not in hub.DETECTOR_REWARDS:
            sources_of(specs[name], places)
    return found


def require_gradient(methods: Iterable[str], mix: Mapping[str, float]) -> None:
    """Raises ValueError where a method needs a gradient that a reward does not have, as the table of rewards says."""
    specs = hub.reward_specs()
    flat = [name for name in mix if not specs[name].differentiable]
    climbing = [name for name in methods if name != "none" and find_method(name, NOISE).needs_gradient]
    if flat and climbing:
        raise ValueError(f"reward {flat[0]!r} has no gradient, which {climbing[0]} climbs; --watch it, or use --method best-of-n")


@dataclass(frozen=True)
class Search:
    """What else bounds a search, and what one uses that was trained beforehand."""

    seconds: float | None = option(None, "in place of --budget: of the search, each image", parse=values.seconds, metavar="S")
    policy: Path | None = option(None, "amortised: the folder that `diffalign train find` wrote", parse=Path, metavar="DIR", advanced=True)

    def check(self, methods: Iterable[str], pipeline: str | None) -> None:
        """Raises ValueError for options that do not fit the methods. Nothing is loaded."""
        rows = [find_method(name, NOISE) for name in methods if name != "none"]
        for row in rows:
            if self.seconds is not None and not row.by_seconds:
                raise ValueError(f"--seconds cannot stop {row.name}, which makes what its budget says in one go; give --budget instead")
            if row.needs_policy and self.policy is None and pipeline != DEFAULT_PIPELINE:
                made = f"make it with `diffalign train find --pipeline {pipeline} --out DIR`"
                raise ValueError(f"--method {row.name} needs --policy DIR with --pipeline {pipeline}; {made}")
        if self.policy is not None and not any(row.needs_policy for row in rows):
            raise ValueError("--policy belongs to --method amortised; leave it out")
        if self.policy is not None and not (self.policy / POLICY_FILE).is_file():
            raise ValueError(f"--policy {self.policy} has no {POLICY_FILE}; make it with `diffalign train find --out DIR`")
        if self.seconds is not None and not rows:
            raise ValueError("--seconds bounds a search, and --method none makes none; leave it out")


@dataclass(frozen=True)
class Guidance:
    """Where the second evaluation of classifier-free guidance is spent."""

    guidance: str = option("full", f"where to spend it: {', '.join(values.GUIDANCE)}", parse=values.guidance_name)
    guidance_from: Path | None = option(
        None,
        "linear, searched: the folder that `diffalign train linear-ag` or `guidance-search` wrote",
        parse=Path,
        metavar="DIR",
        advanced=True,
    )
    guidance_threshold: float | None = option(
        None,
        "adaptive: the cosine at which a sample is guided no further (default: the pipeline's calibrated one)",
        parse=values.cosine,
        metavar="X",
        advanced=True,
    )
    guidance_refresh: int | None = option(
        None,
        "adaptive: then keep a sample's last guidance and evaluate it anew every N-th step (default: no guidance)",
        parse=values.refresh,
        metavar="N",
        advanced=True,
    )

    def settings(self, pipeline: str | None) -> dict[str, str | float | None] | None:
        """What an image depends on; None for full guidance. Raises ValueError for options that do not fit together."""
        name, place = self.guidance, self.guidance_from
        if name in FROM_FILE:
            made = f"make it with `diffalign train {MAKERS[name]} --pipeline {pipeline} --out DIR`"
            if place is None:
                raise ValueError(f"--guidance {name} needs --guidance-from DIR; {made}")
            if not (place / FROM_FILE[name]).is_file():
                raise ValueError(f"--guidance-from {place} has no {FROM_FILE[name]}; {made}")
        elif place is not None:
            raise ValueError(f"--guidance-from belongs to --guidance {' and '.join(FROM_FILE)}; leave it out with {name}")
        for typed, value in (("--guidance-threshold", self.guidance_threshold), ("--guidance-refresh", self.guidance_refresh)):
            if value is not None and name != "adaptive":
                raise ValueError(f"{typed} belongs to --guidance adaptive; leave it out with {name}")
        if name == "full":
            return None
        return {
            "method": name,
            "from": None if place is None else str(place),
            "threshold": self.guidance_threshold,
            "refresh": self.guidance_refresh,
        }
