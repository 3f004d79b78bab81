"""Images that were liked or not, each on its own: what KTO learns from.

A folder of votes holds votes.jsonl, one JSON object a line, with image paths relative to the folder:

    {"prompt": "a red circle", "image": "images/1.png", "good": true}

A folder of pairs alone serves too: its winners are liked, its losers are not.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.backbone import Backbone
from diffalign.training.data import EMPTY, Dropped, LatentStore, Order, Texts, read_pairs, seeded, undecodable
from diffalign.training.objectives.kto import UnpairedBatch

logger = logging.getLogger(__name__)
VOTES = "votes.jsonl"


@dataclass(frozen=True)
class Vote:
    """One image and whether it was liked, on disk."""

    prompt: str
    image: Path
    good: bool


def read_votes(source: str | Path) -> tuple[list[Vote], list[Dropped]]:
    """The votes of a folder with votes.jsonl, of such a file, or of pairs. One with an image that cannot be read is dropped, and listed.

    Raises ValueError where a line is not a vote, or all are alike; FileNotFoundError where there is no file.
    """
    source = Path(source).expanduser()
    file = source / VOTES if source.is_dir() else source
    if source.is_dir() and not file.is_file():
        pairs, dropped = read_pairs(source)
        votes = [Vote(pair.prompt, image, good) for pair in pairs for image, good in ((pair.winner, True), (pair.loser, False))]
        return votes, dropped
    if not file.is_file():
        raise FileNotFoundError(f"data: there is no {file}; give a folder with a {VOTES} or a pairs.jsonl, or such a file")
    votes, dropped = [], []
    for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        vote = _vote(text, file, line)
        reason = undecodable(vote.image)
        if reason is None:
            votes.append(vote)
        else:
            dropped.append(Dropped(line, reason))
    if dropped:
        logger.warning("%s: %d votes dropped; the first is line %d: %s", file, len(dropped), dropped[0].line, dropped[0].reason)
    if len({vote.good for vote in votes}) < 2:
        raise ValueError(f"data: {file} needs images that were liked and images that were not; got {len(votes)} votes of one kind")
    return votes, dropped


def _vote(text: str, file: Path, line: int) -> Vote:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} line {line} is not JSON ({error})") from error
    kinds = {"prompt": str, "image": str, "good": bool}
    if not isinstance(row, dict) or row.keys() != kinds.keys() or not all(isinstance(row[name], kind) for name, kind in kinds.items()):
        raise ValueError(f"{file} line {line} must be an object with prompt and image, texts, and good, true or false; got {text[:80]!r}")
    return Vote(row["prompt"], file.parent / row["image"], row["good"])


class VoteData:
    """Votes as batches. Half of each batch are liked images, half are not, however many of either there are."""

    def __init__(
        self,
        votes: Sequence[Vote],
        store: LatentStore,
        backbone: Backbone,
        *,
        device: Any = "cpu",
        seed: int = 0,
        drop_prompts: float = 0.1,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """drop_prompts: share of images, in [0, 1), that learn under the empty prompt."""
        if not 0 <= drop_prompts < 1:
            raise ValueError(f"drop_prompts must lie in [0, 1), got {drop_prompts}")
        self.sides = tuple([vote for vote in votes if vote.good == good] for good in (True, False))
        if not all(self.sides):
            raise ValueError("votes must hold images that were liked and images that were not")
        self.store, self.device, self.seed, self.drop_prompts = store, device, seed, drop_prompts
        self.texts = Texts(backbone, [vote.prompt for vote in votes], unconditional=False, size=store.size, device=device)
        self._keys = store.prepare([(vote.image, False) for vote in votes], progress=progress)
        self._orders = tuple(Order(len(side), seed + number) for number, side in enumerate(self.sides))

    def identity(self) -> str:
        """A hash of all that is learned from."""
        told = [f"{vote.prompt}\t{self._keys[vote.image, False]}\t{vote.good}" for side in self.sides for vote in side]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    def take(self, positions: Sequence[int]) -> UnpairedBatch:
        chosen = [self.sides[position % 2][self._orders[position % 2][position // 2]] for position in positions]
        kept = [torch.rand(1, generator=seeded(self.seed, 5, position)).item() >= self.drop_prompts for position in positions]
        latents = torch.stack([self.store.get(self._keys[vote.image, False]) for vote in chosen]).to(self.device)
        prompts = [vote.prompt if keep else EMPTY for vote, keep in zip(chosen, kept, strict=True)]
        return UnpairedBatch(latents, torch.tensor([vote.good for vote in chosen], device=self.device), self.texts.of(prompts))
