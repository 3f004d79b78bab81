"""diffalign.train: names become objects, data become batches, and the result an ordinary LoRA with its card.

    diffalign.train("dpo", pipeline="shapes", data="my-pairs", out="outputs/dpo")
    diffalign.train("d3po", pipeline="sd15", data=prompts, reward="image-reward", out="outputs/d3po")
    pipe.load_lora_weights("outputs/dpo")

The loop and the objectives know nothing of pipelines and names of rewards; here they meet.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffalign.files import require_writable, whole_folder

if TYPE_CHECKING:
    from diffalign.training.contract import Objective
    from diffalign.training.loop import Evaluate, LoopSettings, Trained
    from diffalign.training.policy import Adaptation, Policy
    from diffalign.training.sources import Source
    from diffalign.training.table import Rewards, Row

LATENTS = "latents"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Tuned:
    """What a training run left."""

    folder: Path
    """With the LoRA (or `pipeline/`, where all weights learned), the card, metrics.jsonl and the checkpoint."""
    trained: Trained
    pipeline: Any
    """As it was loaded, with the tuned weights in force."""


def train(
    method: str | Objective = "dpo",
    *,
    data: str | Path | Sequence[str],
    out: str | Path,
    pipeline: Any = "shapes",
    reward: str | Mapping[str, float] | Rewards | None = None,
    watch: Sequence[str] = (),
    held_out_prompts: Sequence[str] = (),
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    settings: LoopSettings | None = None,
    adaptation: Adaptation | None = None,
    objective_settings: Mapping[str, Any] = NOTHING,
    paper: bool = False,
    drop_prompts: float = 0.1,
    flip: bool = False,
    held_out: float = 0.1,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    track: bool = False,
    cache: str | Path | None = None,
    device: Any = None,
    dtype: Any = None,
    command: str | None = None,
) -> Tuned:
    """Tunes a pipeline and leaves a LoRA in `out`, with a card that says how.

    method: a name from training/table.py, or an objective. data: a folder with pairs.jsonl or votes.jsonl (training/data.py and votes.py
    say how they look), or a list of prompts for objectives that make their own images. pipeline: a name for load_pipeline, or a
    pipeline, which then carries the adapter. reward: names and weights for load_reward, of objectives that learn from rewards, or
    `training.table.Rewards` with functions of your own.
    steps, lr, batch_size, seed: fields of `settings` that differ from it. adaptation: rank, targets, or all weights. objective_settings:
    fields of the objective, "rollouts.images" those of a field. paper: the published settings instead of ours.

    drop_prompts: share of samples that learn under the empty prompt, for guidance. flip: mirror both images of every other pair.

    Every `settings.evaluate_every` steps the policy is evaluated; "score" decides about the weights that are kept and about early stop.
    watch: rewards that are not optimised; the score is how far they have risen on images of `held_out_prompts` (of a share `held_out` of
    the data's prompts, where none are given). Without them it is the objective's loss on that share of pairs or votes. evaluate: a
    function of your own instead. Nothing is held out where evaluate_every is 0.
    resume: go on from `out`'s checkpoint. track: TensorBoard too. cache: where encoded images are kept; out/latents without one.

    Under `accelerate launch` the processes share out each step's micro-batches; the result is that of one process.
    Raises what load_pipeline, load_reward, read_pairs, Policy and the loop raise; each names the argument.
    """
    from accelerate import PartialState

    from diffalign.training import card, loop
    from diffalign.training.loop import LoopSettings
    from diffalign.training.policy import Adaptation, Policy
    from diffalign.training.table import build_objective, find_row

    given = {"steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed}
    settings = replace(settings or LoopSettings(), **{name: value for name, value in given.items() if value is not None})
    adaptation = replace(adaptation or Adaptation(), seed=settings.seed)
    row = find_row(method) if isinstance(method, str) else None
    if row is None and (objective_settings or paper):
        raise ValueError("objective_settings and paper are for a method that is named; this objective has its own settings, change those")
    _check(row, reward, watch, held_out_prompts, settings.evaluate_every, evaluate)
    objective = method if row is None else None
    if row is not None and row.rewards == "none":  # what is amiss is named before anything is loaded
        objective = build_objective(row, objective_settings, paper=paper)
    out = Path(out)
    require_writable(out)
    named = str(pipeline) if isinstance(pipeline, (str, Path)) else pipeline.config.get("_name_or_path") or type(pipeline).__name__
    pipe = _load(pipeline, device, dtype)
    rewards = _rewards(reward, watch, pipe.device)
    kept_back = held_out if settings.evaluate_every and evaluate is None and not held_out_prompts else 0.0
    source = _source(row, pipe, data, settings.seed, drop_prompts, flip, kept_back, Path(cache or out / LATENTS))
    policy = Policy(pipe, pipe.denoiser, adaptation)
    if objective is None:
        objective = build_objective(row, objective_settings, rewards, paper=paper, weight_distance=policy.weight_distance)
    if settings.evaluate_every and evaluate is None:
        evaluate = _evaluate(objective, source, rewards, held_out_prompts, settings, pipe)
    whole = {"pipeline": named, "adaptation": asdict(adaptation), "data": source.facts, **_reward_facts(rewards)}
    trained = loop.train(policy, objective, source.data, settings, out, evaluate=evaluate, resume=resume, track=track, facts=whole)
    if PartialState().is_main_process:
        _save(policy, out)
        card.write(out, card.describe(
            trained, title=f"{named} tuned by {objective.name}", base=named, usage=_usage(pipe, named, out, adaptation.rank is None),
            command=command or f"diffalign.train({objective.name!r}, pipeline={named!r}, data=..., out={str(out)!r})", device=pipe.device,
            settings={**asdict(settings), "adaptation": asdict(adaptation), "objective": {"name": objective.name, **objective.settings()},
                      **_reward_facts(rewards)},
            data=source.facts,
        ))  # fmt: skip
    PartialState().wait_for_everyone()
    return Tuned(out, trained, pipe)


def _check(row: Row | None, reward: Any, watch: Sequence[str], prompts: Sequence[str], every: int, evaluate: Any) -> None:
    """ValueError for arguments that do not go together, before anything is loaded."""
    if isinstance(watch, str):
        raise TypeError(f"watch must be a list of reward names, got the string {watch!r}; write watch=[{watch!r}]")
    if watch and not every:
        raise ValueError("watch needs settings.evaluate_every: how many steps lie between two looks")
    if watch and evaluate is not None:
        raise ValueError("watch and evaluate= both say what is evaluated; give one of them")
    if prompts and not (watch or getattr(reward, "watched", ())):
        raise ValueError("held_out_prompts are drawn for watched rewards; give watch=[...] too")
    if row is not None and row.rewards != "none" and reward is None:
        raise ValueError(f"{row.name} learns from rewards; give reward=, as in reward={{'shapes-reward': 1.0}}")
    if reward is not None and (row is None or row.rewards == "none"):
        raise ValueError("reward is given to an objective that takes none by name; watch it instead")


def _load(pipeline: Any, device: Any, dtype: Any) -> Any:
    from accelerate import PartialState

    from diffalign.loading import load_pipeline

    if not isinstance(pipeline, (str, Path)):
        if device is not None or dtype is not None:
            raise ValueError("device and dtype are for a pipeline that is loaded by name; move this one with pipe.to(...)")
        return pipeline
    if device is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = PartialState().device
    return load_pipeline(pipeline, device=device, dtype=dtype)


def _rewards(reward: Any, watch: Sequence[str], device: Any) -> Rewards:
    """Loaded where they are named; frozen models, each by itself."""
    from diffalign.hub import load_reward
    from diffalign.training.table import Rewards

    own = reward if isinstance(reward, Rewards) else Rewards({}, {}, {})
    if reward is not None and own is not reward:
        mix = load_reward(reward, watch=watch, device=device)
        return Rewards({name: model for name, (model, _) in mix.members.items()}, mix.weights, mix.watched)
    if watch:
        mix = load_reward(dict.fromkeys(watch, 1.0), device=device)
        own = replace(own, watched={**own.watched, **{name: model for name, (model, _) in mix.members.items()}})
    return own


def _reward_facts(rewards: Rewards) -> dict[str, Any]:
    return {"rewards": dict(rewards.weights), "watched": sorted(rewards.watched)}


def _source(row: Row | None, pipe: Any, data: Any, seed: int, drop_prompts: float, flip: bool, held_out: float, cache: Path) -> Source:
    from diffalign.training import sources

    folder = isinstance(data, (str, Path))
    if row is not None and folder == (row.data == "prompts"):
        wanted = "a list of prompts" if row.data == "prompts" else f"a folder of {row.data}"
        raise ValueError(f"data: {row.name} learns from {wanted}; got {type(data).__name__}")
    if not folder:
        return sources.of_prompts(pipe, list(data), seed)
    kind = "votes" if row is not None and row.data == "votes" else "pairs"
    return sources.of_folder(pipe, data, kind, cache, seed=seed, drop_prompts=drop_prompts, flip=flip, held_out=held_out)


def _evaluate(
    objective: Objective, source: Source, rewards: Rewards, prompts: Sequence[str], settings: LoopSettings, pipe: Any
) -> Evaluate:
    """By watched rewards where there are any, else by the loss on what is held out."""
    from diffalign.training.sources import held_out_loss
    from diffalign.training.watching import Watch

    if rewards.watched:
        prompts = tuple(prompts) or source.held_out_prompts
        if not prompts:
            raise ValueError("watch needs held_out_prompts=, prompts that are not learned from; give some")
        steps, scale = _sampling(objective, pipe)
        at_once = settings.micro_batch or settings.batch_size
        return Watch(prompts, rewards.watched, rewards.scores, steps, scale, pipe.default_size(), settings.seed, at_once).evaluator()
    if source.held_out is None:
        raise ValueError("evaluate_every needs watch=, rewards to judge by, held_out pairs, or evaluate=, a function; give one of them")
    return held_out_loss(objective, source.held_out, settings.micro_batch or settings.batch_size, settings.seed)


def _sampling(objective: Objective, pipe: Any) -> tuple[int, float]:
    """(steps, guidance scale) of held-out images: those of the objective where it makes images itself, else the pipeline's own."""
    made = getattr(objective, "rollouts", None) or getattr(objective, "sampling", None) or objective
    called = inspect.signature(pipe.stock_class.__call__).parameters
    own = {name: pipe.defaults.get(name, called[name].default) for name in ("num_inference_steps", "guidance_scale")}
    scale = getattr(made, "guidance_scale", None)
    if scale is None:
        return own["num_inference_steps"], own["guidance_scale"]
    return made.steps or own["num_inference_steps"], scale


# ---- results -----------------------------------------------------------------------------------------------------------------


def _save(policy: Policy, out: Path) -> None:
    """Into place whole: the LoRA's file, or the folder of a pipeline."""
    if policy.adaptation.rank is None:
        with whole_folder(out / "pipeline") as temporary:
            policy.save(temporary)
        return
    with TemporaryDirectory(dir=out, prefix=".partial-") as temporary:
        policy.save(Path(temporary))
        for file in Path(temporary).iterdir():
            shutil.move(file, out / file.name)  # on one file system, so a rename


def _usage(pipe: Any, base: str, out: Path, whole: bool) -> str:
    name = pipe.stock_class.__name__
    source = f'"{out / "pipeline"}"' if whole else f'"{base}"'
    lines = [f"pipe = diffalign.load_pipeline({source})  # or {name}.from_pretrained"]
    return "\n".join(["import diffalign", "", *lines, *([] if whole else [f'pipe.load_lora_weights("{out}")'])])
