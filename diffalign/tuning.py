"""diffalign.train: names become objects, a folder of pairs becomes batches, and the result an ordinary LoRA with its card.

    diffalign.train("dpo", pipeline="shapes", data="my-pairs", out="outputs/dpo")
    pipe.load_lora_weights("outputs/dpo")

The loop and the objectives know nothing of pipelines; here they meet.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffalign.files import require_writable, whole_folder
from diffalign.methods.table import suggestion

if TYPE_CHECKING:
    from diffalign.backbone import Size
    from diffalign.training.contract import Objective
    from diffalign.training.data import Data, LatentStore, PairData
    from diffalign.training.loop import Evaluate, LoopSettings, Trained
    from diffalign.training.policy import Adaptation, Policy

OBJECTIVES: Mapping[str, str] = MappingProxyType(
    {
        "sft": "diffalign.training.objectives.sft:SFT",
        "dpo": "diffalign.training.objectives.preference:DPO",
        "inpo": "diffalign.training.objectives.inpo:InPO",
        "dcpo": "diffalign.training.objectives.dcpo:DCPO",
        "mapo": "diffalign.training.objectives.mapo:MaPO",
    }
)
"""Objectives that learn from pairs and need nothing else, by the name that Python and the command line know them by."""
LATENTS = "latents"
HELD_OUT_BATCHES = 8
"""Batches that an evaluation looks at; few pairs come again, with other noise."""


@dataclass(frozen=True)
class Tuned:
    """What a training run left."""

    folder: Path
    """With the LoRA (or `pipeline/`, where all weights learned), the card, metrics.jsonl and the checkpoint."""
    trained: Trained
    pipeline: Any
    """As it was loaded, with the tuned weights in force."""


def build_objective(method: str | Objective, settings: Mapping[str, Any] | None = None) -> Objective:
    """An objective from its name and fields that differ from the default. ValueError for an unknown name, with a hint."""
    if not isinstance(method, str):
        if settings:
            raise ValueError("objective settings are given beside an objective that has its own; change those")
        return method
    if method not in OBJECTIVES:
        raise ValueError(f"unknown method {method!r}; {suggestion(method, list(OBJECTIVES))}")
    module, name = OBJECTIVES[method].split(":")
    try:
        return getattr(importlib.import_module(module), name)(**(settings or {}))
    except TypeError as error:
        raise ValueError(f"{method}: {error}") from error


def train(
    method: str | Objective = "dpo",
    *,
    data: str | Path | Sequence[str],
    out: str | Path,
    pipeline: Any = "shapes",
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    settings: LoopSettings | None = None,
    adaptation: Adaptation | None = None,
    objective_settings: Mapping[str, Any] | None = None,
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

    method: a name from OBJECTIVES, or an objective. data: a folder with pairs.jsonl (training/data.py says how it looks), or a list of
    prompts for objectives that make their own images. pipeline: a name for load_pipeline, or a pipeline, which then carries the adapter.
    steps, lr, batch_size, seed: fields of `settings` that differ from it. adaptation: rank, targets, or all weights.

    drop_prompts: share of pairs that learn under the empty prompt, for guidance. flip: mirror both images of every other pair.
    evaluate: figures of the policy every `settings.evaluate_every` steps; "score" decides about the best weights and early stop. Without
    one the objective's loss on a share `held_out` of the prompts is evaluated, and nothing is held out where evaluate_every is 0.
    resume: go on from `out`'s checkpoint. track: TensorBoard too. cache: where encoded images are kept; out/latents without one.

    Under `accelerate launch` the processes share out each step's micro-batches; the result is that of one process.
    Raises what load_pipeline, read_pairs, Policy and the loop raise; each names the argument.
    """
    from accelerate import PartialState

    from diffalign.training import card, loop
    from diffalign.training.loop import LoopSettings
    from diffalign.training.policy import Adaptation, Policy

    given = {"steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed}
    settings = replace(settings or LoopSettings(), **{name: value for name, value in given.items() if value is not None})
    adaptation = replace(adaptation or Adaptation(), seed=settings.seed)
    objective = build_objective(method, objective_settings)
    out = Path(out)
    require_writable(out)
    named = str(pipeline) if isinstance(pipeline, (str, Path)) else pipeline.config.get("_name_or_path") or type(pipeline).__name__
    pipe = _load(pipeline, device, dtype)
    samples, judged, facts = _data(
        pipe, data, settings, drop_prompts, flip, held_out if evaluate is None else 0.0, Path(cache or out / LATENTS)
    )
    if settings.evaluate_every and evaluate is None:
        if judged is None:
            raise ValueError("evaluate_every needs held_out pairs or evaluate=, a function that judges the policy; give one of them")
        evaluate = _held_out_loss(objective, judged, settings)
    policy = Policy(pipe, pipe.denoiser, adaptation)
    whole = {"pipeline": named, "adaptation": asdict(adaptation), "data": facts}
    trained = loop.train(policy, objective, samples, settings, out, evaluate=evaluate, resume=resume, track=track, facts=whole)
    if PartialState().is_main_process:
        _save(policy, out)
        card.write(out, card.describe(
            trained, title=f"{named} tuned by {objective.name}", base=named, usage=_usage(pipe, named, out, adaptation.rank is None),
            command=command or f"diffalign.train({objective.name!r}, pipeline={named!r}, data=..., out={str(out)!r})", device=pipe.device,
            settings={**asdict(settings), "adaptation": asdict(adaptation), "objective": {"name": objective.name, **objective.settings()}},
            data=facts,
        ))  # fmt: skip
    PartialState().wait_for_everyone()
    return Tuned(out, trained, pipe)


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


# ---- data --------------------------------------------------------------------------------------------------------------------


def _data(
    pipe: Any, data: Any, settings: LoopSettings, drop_prompts: float, flip: bool, held_out: float, cache: Path
) -> tuple[Data, PairData | None, dict[str, Any]]:
    """(what is learned from, held-out pairs, facts for the card and for resuming)."""
    from accelerate import PartialState
    from tqdm import tqdm

    from diffalign.training.data import PairData, PromptData, read_pairs, split_by_prompt

    size = pipe.default_size()
    if not isinstance(data, (str, Path)):
        prompts = list(data)
        facts = {"prompts": len(prompts), "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]}
        return PromptData(prompts, pipe, device=pipe.device, seed=settings.seed, size=size), None, facts
    if pipe.output_field != "images":
        raise ValueError(f"data: pairs are of images, and {type(pipe).__name__} makes videos; give an image pipeline, or a list of prompts")
    pairs, dropped = read_pairs(data)
    train, held = split_by_prompt(pairs, held_out if settings.evaluate_every else 0.0, settings.seed)
    store = _store(pipe, size, cache)
    with PartialState(cpu=pipe.device.type == "cpu").main_process_first(), tqdm(desc="encode", unit="image", disable=None) as bar:
        learned = PairData(
            train, store, pipe, device=pipe.device, seed=settings.seed, drop_prompts=drop_prompts, flip=flip, progress=bar.update
        )
        judged = (
            PairData(held, store, pipe, device=pipe.device, seed=settings.seed, drop_prompts=0.0, progress=bar.update) if held else None
        )
    text = "\n".join(f"{p.prompt}\t{learned.key(p)}\t{p.weight}\t{p.winner_caption}\t{p.loser_caption}" for p in train)
    facts = {
        "pairs": len(train),
        "prompts": len({pair.prompt for pair in train}),
        "held_out_pairs": len(held),
        "dropped_rows": len(dropped),
        "drop_prompts": drop_prompts,
        "flip": flip,
        "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    return learned, judged, facts


def _store(pipe: Any, size: Size, cache: Path) -> LatentStore:
    """The pipeline's autoencoder tells its latents from another's by its class, its settings and its weights."""
    import torch

    from diffalign.training.data import LatentStore

    digest = hashlib.sha256(f"{type(pipe).__name__} {sorted(pipe.vae.config.items(), key=str)}".encode())
    for name, tensor in sorted(pipe.vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return LatentStore(cache, pipe.encode_images, size, digest.hexdigest())


def _held_out_loss(objective: Objective, held: PairData, settings: LoopSettings) -> Evaluate:
    """The objective's loss and figures on held-out pairs, with the same noise every time; the score is the loss, negative."""
    from diffalign.training.data import seeded

    size = settings.micro_batch or settings.batch_size

    def evaluate(policy: Policy, step: int) -> Mapping[str, float]:
        sums: dict[str, float] = {}
        for i in range(HELD_OUT_BATCHES):
            batch = held.take(range(i * size, (i + 1) * size))
            collected = objective.collect(policy.denoiser(), batch, seeded(settings.seed, 4, i, 0))
            loss, figures = objective.loss(policy.denoiser(), policy.reference(), collected, seeded(settings.seed, 4, i, 1))
            for name, value in {**figures, "loss": loss.item()}.items():
                sums[name] = sums.get(name, 0.0) + value / HELD_OUT_BATCHES
        found = {f"held_out_{name}": total for name, total in sums.items()}
        return {**found, "score": -found["held_out_loss"]}

    return evaluate


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
