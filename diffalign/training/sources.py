"""From a folder of pairs or votes, or a list of prompts, to what the loop draws batches from, and what is held out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from tqdm import tqdm

from diffalign.backbone import Size
from diffalign.training.data import Data, LatentStore, PairData, PromptData, read_pairs, seeded, split_by_prompt
from diffalign.training.votes import VoteData, read_votes

if TYPE_CHECKING:
    from diffalign.training.contract import Objective
    from diffalign.training.loop import Evaluate
    from diffalign.training.policy import Policy

HELD_OUT_BATCHES = 8
"""Batches that an evaluation of the loss looks at; few pairs come again, with other noise."""


@dataclass(frozen=True)
class Source:
    """What a run learns from."""

    data: Data
    held_out: Data | None
    """Of other prompts; None where nothing is held out."""
    held_out_prompts: tuple[str, ...]
    facts: Mapping[str, Any]
    """For the card, and for a resumed run to agree in."""


def of_prompts(pipe: Any, prompts: Sequence[str], seed: int) -> Source:
    """Prompts to make images of."""
    facts = {"prompts": len(prompts), "sha256": _hash("\n".join(prompts))}
    return Source(PromptData(prompts, pipe, device=pipe.device, seed=seed, size=pipe.default_size()), None, (), facts)


def of_folder(
    pipe: Any,
    folder: str | Path,
    kind: Literal["pairs", "votes"],
    cache: Path,
    *,
    seed: int,
    drop_prompts: float,
    flip: bool,
    held_out: float,
) -> Source:
    """Pairs or votes of a folder, encoded by the pipeline. Raises what read_pairs, read_votes and split_by_prompt do."""
    if pipe.output_field != "images":
        raise ValueError(f"data: {kind} are of images, and {type(pipe).__name__} makes videos; give an image pipeline or prompts")
    if kind == "votes" and flip:
        raise ValueError("flip mirrors both images of a pair, and votes are of single images; leave it out")
    records, dropped = read_pairs(folder) if kind == "pairs" else read_votes(folder)
    train, held = split_by_prompt(records, held_out, seed)
    store = latent_store(pipe, pipe.default_size(), cache)

    def encoded(some: Sequence[Any], drop: float, flip: bool) -> Any:
        given = {"device": pipe.device, "seed": seed, "drop_prompts": drop, "progress": bar.update}
        return PairData(some, store, pipe, flip=flip, **given) if kind == "pairs" else VoteData(some, store, pipe, **given)

    with PartialState(cpu=pipe.device.type == "cpu").main_process_first(), tqdm(desc="encode", unit="image", disable=None) as bar:
        learned = encoded(train, drop_prompts, flip)
        judged = encoded(held, 0.0, False) if held else None
    facts = {
        kind: len(train),
        "prompts": len({each.prompt for each in train}),
        f"held_out_{kind}": len(held),
        "dropped_rows": len(dropped),
        "drop_prompts": drop_prompts,
        "flip": flip,
        "sha256": learned.identity(),
    }
    return Source(learned, judged, tuple(dict.fromkeys(each.prompt for each in held)), facts)


def latent_store(pipe: Any, size: Size, cache: Path) -> LatentStore:
    """The pipeline's autoencoder tells its latents from another's by its class, its settings and its weights."""
    digest = hashlib.sha256(f"{type(pipe).__name__} {sorted(pipe.vae.config.items(), key=str)}".encode())
    for name, tensor in sorted(pipe.vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return LatentStore(cache, pipe.encode_images, size, digest.hexdigest())


def held_out_loss(objective: Objective, held: Data, size: int, seed: int) -> Evaluate:
    """The objective's loss and figures on what is held out, with the same noise every time; the score is the loss, negative."""

    def evaluate(policy: Policy, step: int) -> Mapping[str, float]:
        sums: dict[str, float] = {}
        for i in range(HELD_OUT_BATCHES):
            batch = held.take(range(i * size, (i + 1) * size))
            collected = objective.collect(policy.denoiser(), batch, seeded(seed, 4, i, 0))
            loss, figures = objective.loss(policy.denoiser(), policy.reference(), collected, seeded(seed, 4, i, 1))
            for name, value in {**figures, "loss": loss.item()}.items():
                sums[name] = sums.get(name, 0.0) + value / HELD_OUT_BATCHES
        found = {f"held_out_{name}": total for name, total in sums.items()}
        return {**found, "score": -found["held_out_loss"]}

    return evaluate


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
