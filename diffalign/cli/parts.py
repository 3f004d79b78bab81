"""Where names become objects for the commands: pipelines with their tuned weights, rewards, guidance, and the judges of benchmarks."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from diffalign import hub
from diffalign.benchmarks.base import Models
from diffalign.benchmarks.models.vqa import Judge
from diffalign.cli.options import FROM_FILE, Guidance, Model, Rewards, Search, is_shapes
from diffalign.guidance import GuidanceMethod
from diffalign.methods import build_method
from diffalign.methods.linear_guidance import LinearCoefficients
from diffalign.methods.table import NOISE, STEP, find_method
from diffalign.noise_policy import WEIGHTS as POLICY_WEIGHTS
from diffalign.rewards import RewardMix
from diffalign.shapes.words import warning
from diffalign.types import NoiseMethod

if TYPE_CHECKING:
    from diffalign.pipelines.aligned import AlignedPipeline

T = TypeVar("T")


def warn_of_unknown_words(pipeline: str | None, prompts: Sequence[str]) -> None:
    """Says on stderr, before anything runs, where the embedded models are given words that they have never read."""
    text = warning(prompts) if is_shapes(pipeline) else None
    if text:
        print(f"warning: {text}", file=sys.stderr)


def load_parts(model: Model, rewards: Rewards, mix: Mapping[str, float]) -> tuple[AlignedPipeline, RewardMix | None]:
    """The pipeline, silent, and the reward on its device (None for an empty mix).

    Says at once on stderr what it loads, since that takes seconds, or minutes where it has to be downloaded.
    """
    watched = rewards.watch if mix else ()
    parts = [f"the pipeline {model.pipeline}", *(f"reward {name}" for name in (*mix, *watched))]
    print(f"loading {', '.join(parts)} ...", file=sys.stderr, flush=True)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # loading is over in a second or two; downloads keep their bars
    pipeline = load_pipeline(model)
    if not mix:
        return pipeline, None
    rules = {"rule": rewards.reward_rule, "gradient": rewards.reward_gradient, "calibration": rewards.calibration}
    places = rewards.places(mix)
    return pipeline, hub.load_reward(dict(mix), watch=watched, **rules, sources=places, device=str(pipeline.device))


def load_pipeline(model: Model, videos: bool = False) -> AlignedPipeline:
    """The pipeline with its tuned weights. Raises ValueError for one that makes videos, unless `videos` will do."""
    ways = set(model.memory)
    pipeline = hub.load_pipeline(
        str(model.pipeline),
        device=model.device,
        dtype=model.dtype,
        attention=model.attention,
        gradient_checkpointing="checkpointing" in ways,
        sliced_decoder="sliced-decoder" in ways,
        offload="all" if "offload-all" in ways else "text" if "offload-text" in ways else None,
    )
    if pipeline.output_field != "images" and not videos:
        raise ValueError(
            f"{model.pipeline} makes videos, which the commands cannot write yet; call it from Python, with rewards over frames "
            "(diffalign.rewards.frames.FrameReward)"
        )
    pipeline.set_progress_bar_config(disable=True)  # our own bar counts evaluations; one more per denoising step would bury it
    if model.lora:
        load_lora(pipeline, model.lora)
    return pipeline


def load_lora(pipeline: AlignedPipeline, source: Path) -> None:
    """Tuned weights on top of the pipeline's, at their full strength. Raises ValueError where they do not fit."""
    folder, name = (source, None) if source.is_dir() else (source.parent, source.name)
    try:
        pipeline.load_lora_weights(folder, weight_name=name)
    except Exception as error:  # diffusers and peft raise what they like
        raise ValueError(f"--lora {source} does not fit the pipeline ({' '.join(str(error).split())[:200]})") from error


def lora_identity(source: Path) -> str:
    """The name of its file and the hash of its content: the folder it lies in does not matter."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{files[0].name} {digest[:16]}"


def search_settings(name: str, budget: int, search: Search) -> dict[str, int | float | str | None]:
    """What the bounds and the policy of a search add to the settings of its images; seconds and policy only where they are in force."""
    if name == "none":
        return {"budget": None}
    if search.seconds is not None:
        return {"budget": None, "seconds": search.seconds}
    policy = search.policy if find_method(name, NOISE).needs_policy else None
    return {"budget": budget, **({"policy": lora_identity(policy / POLICY_WEIGHTS)} if policy else {})}


def search_method(name: str, reward: RewardMix | None, budget: int, search: Search) -> NoiseMethod | None:
    """None for "none". Seconds are those of one image here; `of_batch` makes them a batch's."""
    if name == "none":
        return None
    policy = search.policy if find_method(name, NOISE).needs_policy else None
    return build_method(name, reward, budget, search.seconds, policy)


def of_batch(method: NoiseMethod | None, search: Search, images: int) -> NoiseMethod | None:
    """The method for a batch of so many images, which share their seconds."""
    return method if method is None or search.seconds is None else replace(method, seconds=search.seconds * images)


def guidance_method(guidance: Guidance) -> GuidanceMethod | None:
    """None for the pipeline's own, full guidance."""
    if guidance.guidance == "full":
        return None
    cls = find_method(guidance.guidance, STEP).load()
    if guidance.guidance == "linear":
        return cls(LinearCoefficients.load(guidance.guidance_from))
    if guidance.guidance == "searched":
        return cls.load(guidance.guidance_from / FROM_FILE["searched"])
    if guidance.guidance == "adaptive":
        return cls(threshold=guidance.guidance_threshold, refresh=guidance.guidance_refresh or 0)
    return cls()


def score_images(
    reward: RewardMix, images: Sequence[Image.Image], prompts: Sequence[str], device: torch.device
) -> list[dict[str, list[float]]]:
    """Every reward of each finished image, in a trace's form: one evaluation each."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).to(device)
    with torch.no_grad():
        reward.prepare(prompts)
        scores = reward(pixels.permute(0, 3, 1, 2).float() / 255, prompts)
    columns = {name: found.tolist() for name, found in {"total": scores.total, **scores.parts, **scores.watched}.items()}
    return [{name: [found[i]] for name, found in columns.items()} for i in range(len(images))]


def judges(device: str, places: Mapping[str, Mapping[str, str]]) -> Models:
    """What benchmarks ask for: models that are loaded when they are first asked, so that a report of what was judged loads none.

    places: where rewards' weights lie, of those that lie elsewhere than they should.
    """
    specs = hub.reward_specs()

    def reward(name: str) -> _Reward:
        return _Reward(
            lambda: hub.load_reward(name, sources={k: v for k, v in places.items() if k == name}, device=device).members[name][0]
        )

    def vlm(source: str | None) -> _Vlm:
        return _Vlm(lambda: hub.load_judge(source, device=device))

    return Models(device, reward, lambda name: specs[name].unit, vlm, hub.judge_name)


class _Lazy(Generic[T]):
    """A model that is loaded when it is first asked."""

    def __init__(self, load: Callable[[], T]) -> None:
        self.model = cache(load)


class _Reward(_Lazy[Callable[[Tensor, Sequence[str]], Tensor]]):
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.model()(images, prompts)


class _Vlm(_Lazy[Judge]):
    def ask(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        return self.model().ask(images, questions)

    def answer(self, images: Tensor, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> Tensor:
        return self.model().answer(images, questions, answers)
