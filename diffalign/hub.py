"""Where names become objects: rewards from names and weights, judges, guidance on stock pipelines; pipelines are loading.py's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffalign.loading import find_device, load_pipeline

if TYPE_CHECKING:
    import torch

    from diffalign.guidance import GuidanceMethod
    from diffalign.pipelines.guidance.hook import Guided
    from diffalign.reward_models import Spec
    from diffalign.rewards import Calibration, RewardMix

__all__ = ["guided", "judge_name", "load_judge", "load_pipeline", "load_reward", "reward_specs"]

VLM_JUDGE = "vlm-judge"
_DETECTOR_FACTS: Mapping[str, Any] = MappingProxyType(
    {
        "target": "diffalign.benchmarks.geneval.detector_reward:DetectorReward",
        "licence": "detector CC BY-NC 4.0 (the hub's weights) or Apache-2.0 (mmdet's, as a source); CLIP MIT",
        "differentiable": False,
        "checkpoint": {"detector": "hf", "clip": "openai/clip-vit-large-patch14"},
        "memory": 2.0,
    }
)
# GenEval's judge as a reward. Kept here, since reward models may not know the benchmarks; a model tuned on it is in-domain for GenEval.
DETECTOR_REWARDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "detector": {
            **_DETECTOR_FACTS,
            "paper": "Ghosh et al., GenEval (arXiv 2310.11513)",
            "range": (0.0, 1.0),
            "unit": "1 where GenEval's rules call the image correct",
        },
        "detector-partial": {
            **_DETECTOR_FACTS,
            "paper": "Liu et al., Flow-GRPO (arXiv 2505.05470), on GenEval (arXiv 2310.11513)",
            "range": (-3.0, 1.0),
            "unit": "mean of partial credits, 1 where everything asked for is there and no more",
        },
    }
)


def load_reward(
    spec: str | Mapping[str, float],
    *,
    watch: Sequence[str] = (),
    rule: Any = "weighted",
    gradient: Any = None,
    calibration: str | Path | Calibration | None = None,
    sources: Mapping[str, Any] = MappingProxyType({}),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> RewardMix:
    """A mix of reward models: a name, or names with weights ({"shapes-clip": 1.0, "shapes-preference": 0.5}).

    watch: further rewards that are scored and reported but not optimised. rule: how several become one: "weighted", "worst-case",
    "soft-min=0.3", "uncertainty=0.5", "geometric", or a rule of diffalign.rewards. gradient: "equal", "pcgrad" or "mgda", for methods that
    climb. calibration: a file of `diffalign calibrate` or a Calibration; weights are then of calibrated scores. sources: name -> where its
    weights lie, as `source` of reward_models.load. device: cuda where there is one, else cpu. dtype: of every backbone; each reward's own
    without one.

    Raises ValueError for an unknown name (with a hint), an empty spec, a weight that is zero or not finite, a rule without the calibration
    that it needs; TypeError for wrong types.
    """
    from diffalign import reward_models
    from diffalign.rewards import Calibration, RewardMix
    from diffalign.rewards.combine import find_rule
    from diffalign.rewards.gradients import find_gradient_rule
    from diffalign.rewards.mix import check_combination

    rule, gradient = find_rule(rule), find_gradient_rule(gradient)
    if isinstance(calibration, (str, Path)):
        calibration = Calibration.load(calibration)
    weights = {spec: 1.0} if isinstance(spec, str) else spec
    if not isinstance(weights, Mapping):
        raise TypeError(f"spec must be a reward's name or a mapping from names to weights, got {type(spec).__name__}")
    if not weights:
        raise ValueError("spec is empty; name at least one reward, as in {'shapes-clip': 1.0}")
    if isinstance(watch, str):
        raise TypeError(f"watch must be a list of reward names, got the string {watch!r}; write watch=[{watch!r}]")
    for name in (*weights, *watch, *sources):
        if name not in DETECTOR_REWARDS:
            reward_models.spec_of(name)  # every name is known before the first one loads
    for name in sources:
        if name not in (*weights, *watch):
            raise ValueError(f"sources names {name!r}, which is neither in spec nor in watch")
    check_combination(weights, rule, gradient, calibration)  # before anything large loads
    target = str(find_device(device))

    def load(name: str) -> Any:
        if name in DETECTOR_REWARDS:
            return _load_detector_reward(name, sources.get(name), target)
        return reward_models.load(name, source=sources.get(name), device=target, dtype=dtype)

    members = {name: (load(name), weight) for name, weight in weights.items()}
    # a name in both is RewardMix's to refuse, but not worth loading twice
    watched = {name: members[name][0] if name in members else load(name) for name in watch}
    return RewardMix(members, watched, rule, calibration, gradient=gradient)


def reward_specs() -> Mapping[str, Spec]:
    """What is known of every reward that `load_reward` takes, by name: the table of reward_models, and GenEval's detector as a reward."""
    from diffalign.reward_models import SPECS, Spec

    return {**SPECS, **{name: Spec(name=name, **facts) for name, facts in DETECTOR_REWARDS.items()}}


def _load_detector_reward(name: str, source: Any, device: str) -> Any:
    """Raises ValueError for parts that there are not, OSError where weights cannot be had."""
    from diffalign.benchmarks.geneval.detector_reward import DetectorReward
    from diffalign.benchmarks.geneval.weights import load_colors, load_detector

    given = {"detector": source} if isinstance(source, (str, Path)) else dict(source or {})
    places = {**DETECTOR_REWARDS[name]["checkpoint"], **given}
    unknown = sorted(set(places) - {"detector", "clip"})
    if unknown:
        raise ValueError(f"reward {name!r} has the parts detector and clip, not {', '.join(unknown)}")
    return DetectorReward(load_detector(str(places["detector"]), device), load_colors(str(places["clip"]), device), name=name)


def load_judge(source: Any = None, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Any:
    """A vision-language model that answers questions about images (`ask`, `answer`).

    source: a Qwen-VL model's folder or Hub id; Qwen3-VL-8B-Instruct without one. dtype: bfloat16 without one.
    Raises ValueError, FileNotFoundError or OSError as reward_models.load does.
    """
    from diffalign import reward_models

    return reward_models.load(VLM_JUDGE, source=source, device=str(find_device(device)), dtype=dtype)


def judge_name(source: Any = None) -> str:
    """What results call that judge."""
    return f"{VLM_JUDGE} {source or reward_specs()[VLM_JUDGE].checkpoint['model']}"


def guided(pipeline: Any, method: GuidanceMethod, *, guidance_scale: float | None = None) -> AbstractContextManager[Guided]:
    """`with guided(pipeline, AdaptiveGuidance()) as run: pipeline(prompt)`: a guidance method on a stock diffusers pipeline.

    Our own pipelines take the method as a plugin. guidance_scale: what the calls are given, for pipelines that keep it to themselves
    (PixArt; FLUX, whose true_cfg_scale it is) and methods that need it. `run.report` says what the last call cost.
    Raises ValueError for a pipeline that cannot be served, with the reason.
    """
    from diffalign.pipelines.guidance.hook import guide

    return guide(pipeline, method, guidance_scale=guidance_scale, cosine_threshold=getattr(pipeline, "cosine_threshold", None))
