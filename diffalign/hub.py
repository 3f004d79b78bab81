"""Where names become objects: a pipeline from a preset, a Hub id or a folder, and a reward from names and weights.

One of the few modules that wire the parts together. Folders and weights are checked by pipelines/integrity.py.
"""

from __future__ import annotations

import importlib
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from diffalign.guidance import GuidanceMethod
    from diffalign.pipelines.aligned import AlignedPipeline
    from diffalign.pipelines.guidance.hook import Guided
    from diffalign.pipelines.presets import Family, Preset
    from diffalign.reward_models import Spec
    from diffalign.rewards import Calibration, RewardMix

VLM_JUDGE = "vlm-judge"
_DETECTOR_FACTS: Mapping[str, Any] = MappingProxyType(
    {
        "target": "diffalign.benchmarks.detector_reward:DetectorReward",
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
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_pipeline(name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> AlignedPipeline:
    """A pipeline ready to call, from a preset ("sd-turbo"), a Hub id ("org/name") or a local folder in diffusers layout.

    device: cuda where there is one, else cpu. dtype: float32 on a CPU, else the preset's own, float16 without one.
    A preset's steps, guidance scale and image size become the call's defaults. No safety checker is loaded.

    Raises: ValueError (unknown name, damaged folder), NotImplementedError (a model family we lack), FileNotFoundError (no such folder or
    weights not trained yet), OSError (the Hub cannot be reached or refuses). Each names the argument or the file.
    """
    from diffalign.pipelines import integrity, presets

    if not isinstance(name, (str, Path)) or not str(name):
        raise TypeError(f"name must be a preset, a Hub id or a folder, got {name!r}")
    text = str(name)
    target = _device(device)
    if text in presets.PRESETS:
        preset = presets.get_preset(text)
        family = presets.FAMILIES[preset.family]
        packaged = _packaged_path(preset)
        if packaged is None:
            return _from_hub(preset.source, family, preset, target, dtype)
        if not (packaged / "model_index.json").exists():
            raise FileNotFoundError(f"the weights of {text!r} are not at {packaged}; make them with `python -m diffalign.shapes.train`")
        return _from_folder(packaged, family, preset, target, dtype)
    folder = Path(text).expanduser()
    if folder.exists():
        family = presets.family_of_stock_class(integrity.stock_class(folder), what=f"the folder {folder}")
        return _from_folder(folder, family, _preset_of_folder(folder), target, dtype)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {folder}; give a folder in diffusers layout, a Hub id 'org/model' or a preset")
    if HUB_ID.fullmatch(text):
        stock_class = _stock_class_on_hub(text)
        return _from_hub(text, presets.family_of_stock_class(stock_class, what=repr(text)), presets.preset_of_source(text), target, dtype)
    presets.get_preset(text)  # raises, with a suggestion
    raise AssertionError(text)


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
    target = str(_device(device))

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
    from diffalign.benchmarks.detector_reward import DetectorReward
    from diffalign.benchmarks.geneval_models import load_colors, load_detector

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

    return reward_models.load(VLM_JUDGE, source=source, device=str(_device(device)), dtype=dtype)


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


def _device(device: Any) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'cpu', 'cuda', 'cuda:1' or the like, got {device!r}") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use device='cpu'")
    return target


def _dtype(dtype: Any, device: torch.device, preset: Preset | None) -> torch.dtype:
    import torch

    if dtype is None:
        dtype = "float32" if device.type == "cpu" else (preset.half if preset else "float16")
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    return chosen


def _packaged_path(preset: Preset) -> Path | None:
    """Where a preset of the package's own has its weights; None for one of the Hub's."""
    from diffalign.pipelines import presets

    if not preset.source.startswith(presets.PACKAGED):
        return None
    return Path(str(importlib.resources.files("diffalign").joinpath(*preset.source.removeprefix(presets.PACKAGED).split("/"))))


def _preset_of_folder(folder: Path) -> Preset | None:
    """The packaged preset that lives in this folder: its path and its name must mean the same model and the same settings."""
    from diffalign.pipelines import presets

    for preset in presets.PRESETS.values():
        packaged = _packaged_path(preset)
        if packaged is not None and packaged.resolve() == folder.resolve():
            return preset
    return None


def _stock_class_on_hub(source: str) -> str:
    from diffusers import DiffusionPipeline

    try:
        return str(DiffusionPipeline.load_config(source)["_class_name"])
    except Exception as error:
        raise _hub_error(source, error) from error


def _hub_error(source: str, error: Exception) -> OSError:
    return OSError(
        f"could not load {source!r} from the Hugging Face Hub ({_first_sentence(error)}); check the name, the connection, and whether the "
        "model asks you to log in and accept its licence, or give a local folder"
    )


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _from_hub(source: str, family: Family, preset: Preset | None, device: torch.device, dtype: Any) -> AlignedPipeline:
    import torch

    from diffalign.pipelines import integrity

    chosen = _dtype(dtype, device, preset)
    variant = preset.variant if preset and chosen != torch.float32 else None
    cls = getattr(importlib.import_module(family.module), family.aligned_class)
    try:
        pipeline = cls.from_pretrained(
            source, dtype=chosen, variant=variant, use_safetensors=True, safety_checker=None, requires_safety_checker=False
        )
    except Exception as error:
        raise _hub_error(source, error) from error
    for name, component in integrity.weighted(pipeline).items():
        integrity.require_finite(component, f"component {name!r} of {source!r}", chosen)
    return _finish(pipeline, preset, device)


def _from_folder(folder: Path, family: Family, preset: Preset | None, device: torch.device, dtype: Any) -> AlignedPipeline:
    from diffalign.pipelines import integrity

    files = integrity.check_files(folder)
    chosen = _dtype(dtype, device, preset)
    variants = {integrity.variant(file) for component in files.values() for file in component}
    cls = getattr(importlib.import_module(family.module), family.aligned_class)
    try:
        pipeline = cls.from_pretrained(
            folder,
            dtype=chosen,
            variant=variants.pop() if len(variants) == 1 else None,
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except Exception as error:
        raise ValueError(f"could not load the pipeline in {folder}: {_first_sentence(error)}") from error
    for name, component in integrity.weighted(pipeline).items():
        integrity.require_complete(component, files.get(name, []))
        integrity.require_finite(component, " and ".join(map(str, files.get(name, []))) or str(folder / name), chosen)
    return _finish(pipeline, preset, device)


def _finish(pipeline: AlignedPipeline, preset: Preset | None, device: torch.device) -> AlignedPipeline:
    if preset is not None and preset.scheduler is not None:
        import diffusers

        pipeline.scheduler = getattr(diffusers, preset.scheduler).from_config(pipeline.scheduler.config)
    if preset is not None:
        pipeline.defaults = preset.defaults()
        pipeline.cosine_threshold = preset.cosine_threshold
    return pipeline.to(device)
