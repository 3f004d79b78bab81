"""Two captions for each pair of images, for DCPO: what each image shows, the prompt said otherwise, or both.

    seen        z_w, z_l: what a captioner says of the winner and of the loser                         DCPO-c
    perturbed   z_w the prompt, z_l the prompt said otherwise                                          DCPO-p
    hybrid      z_w what the captioner says of the winner, z_l what it says of the loser, otherwise    DCPO-h

Paper: Saeidi et al., TMLR 2025 (2502.06023); its captioner is LLaVA-v1.6-34b, its perturber the paraphraser DIPPER.

Each answer is kept in captions.jsonl under a hash of the image or the text and the name of who was asked, so that a stopped run goes on, an
image in many pairs is asked about once, and other strategies cost what is new alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from diffalign.files import appending, read_lines, write_text
from diffalign.images import read_image
from diffalign.training.contract import ScoreImages
from diffalign.training.data import Pair, read_pairs

Strategy = Literal["seen", "perturbed", "hybrid"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
KNOWN, CAPTIONED = "captions.jsonl", "captioned.jsonl"

Caption = Callable[[Sequence[Path], Sequence[str]], list[str]]
"""caption(images, prompts): what each image shows, in words like the prompts'."""
Perturb = Callable[[Sequence[str]], list[str]]
"""perturb(texts): each said otherwise."""


@dataclass(frozen=True)
class Captioning:
    """Who says what."""

    strategy: Strategy = "seen"
    """Which two captions; see above."""
    caption: Caption | None = None
    """For "seen" and "hybrid"."""
    captioner: str = ""
    """What the captioner is called: answers are kept under it."""
    perturb: Perturb | None = None
    """For "perturbed" and "hybrid"."""
    perturber: str = ""
    """What the perturber and its strength are called."""
    batch_size: int = 8
    """Images or texts at once, >= 1."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        for needed, function, name in (
            (self.strategy != "perturbed", self.caption, "caption"),
            (self.strategy != "seen", self.perturb, "perturb"),
        ):
            if needed and function is None:
                raise ValueError(f"strategy {self.strategy!r} needs {name}=, a function; give one")


def caption_pairs(folder: Path, how: Captioning, progress: Callable[[int], Any] | None = None) -> list[Pair]:
    """Captions the pairs of folder/pairs.jsonl, writes them with their captions to folder/captioned.jsonl, and returns them.

    progress(n) after n more answers. Raises what read_pairs does, and ValueError where a captioner gives no text for an image.
    """
    pairs, _ = read_pairs(folder)
    memory = _Memory(folder / KNOWN, how.batch_size, progress)
    winners, losers = [pair.prompt for pair in pairs], [pair.prompt for pair in pairs]
    if how.caption is not None and how.strategy != "perturbed":
        seen = [(pair.prompt, image) for pair in pairs for image in (pair.winner, pair.loser)]
        keys = [_key(how.captioner, image.read_bytes()) for _, image in seen]
        ask = how.caption
        answers = memory.answers(keys, seen, lambda part: ask([image for _, image in part], [prompt for prompt, _ in part]))
        winners, losers = answers[::2], answers[1::2]
    if how.perturb is not None and how.strategy != "seen":
        losers = memory.answers([_key(how.perturber, text.encode()) for text in losers], losers, how.perturb)
    lines = []
    for pair, winner, loser in zip(pairs, winners, losers, strict=True):
        images = {name: getattr(pair, name).relative_to(folder).as_posix() for name in ("winner", "loser")}
        weight = {} if pair.weight == 1 else {"weight": pair.weight}
        lines.append(json.dumps({"prompt": pair.prompt, **images, "winner_caption": winner, "loser_caption": loser, **weight}))
    write_text(folder / CAPTIONED, "".join(line + "\n" for line in lines))
    return read_pairs(folder / CAPTIONED)[0]


class _Memory:
    """What has been answered before, on disk."""

    def __init__(self, file: Path, batch_size: int, progress: Callable[[int], Any] | None) -> None:
        self.file, self.batch_size, self.progress = file, batch_size, progress
        self.known: dict[str, str] = {row["key"]: row["text"] for row in read_lines(file)}

    def answers(self, keys: Sequence[str], items: Sequence[Any], ask: Callable[[Sequence[Any]], list[str]]) -> list[str]:
        missing = list({key: item for key, item in zip(keys, items, strict=True) if key not in self.known}.items())
        with appending(self.file) as append:
            for start in range(0, len(missing), self.batch_size):
                part = missing[start : start + self.batch_size]
                texts = ask([item for _, item in part])
                if len(texts) != len(part) or not all(isinstance(text, str) and text.strip() for text in texts):
                    raise ValueError(f"a captioner must give a text for each of {len(part)} questions, got {texts!r}")
                new = {key: " ".join(text.split()) for (key, _), text in zip(part, texts, strict=True)}
                append([{"key": key, "text": text} for key, text in new.items()])
                self.known |= new
                if self.progress is not None:
                    self.progress(len(part))
        return [self.known[key] for key in keys]


def _key(who: str, what: bytes) -> str:
    return hashlib.sha256(who.encode() + b"\0" + what).hexdigest()[:24]


@torch.no_grad()
def caption_gap(pairs: Sequence[Pair], score: ScoreImages, batch_size: int = 32) -> Mapping[str, float]:
    """How well captions fit, by a reward that compares image and text, such as a CLIP score; means over pairs.

    winner, loser: each image with its own caption. prompt_winner, prompt_loser: with the prompt. crossed: the winner with the loser's
    caption. gap: winner less crossed, how much z_w says of the winner that z_l does not; near 0 the captions do not tell the images apart.
    """
    asked = {
        "winner": [(pair.winner, pair.winner_caption or pair.prompt) for pair in pairs],
        "loser": [(pair.loser, pair.loser_caption or pair.prompt) for pair in pairs],
        "crossed": [(pair.winner, pair.loser_caption or pair.prompt) for pair in pairs],
        "prompt_winner": [(pair.winner, pair.prompt) for pair in pairs],
        "prompt_loser": [(pair.loser, pair.prompt) for pair in pairs],
    }
    means = {}
    for name, questions in asked.items():
        total = 0.0
        for start in range(0, len(questions), batch_size):
            by_size: dict[torch.Size, list[tuple[torch.Tensor, str]]] = {}
            for file, text in questions[start : start + batch_size]:
                image = read_image(file)
                by_size.setdefault(image.shape, []).append((image, text))
            for alike in by_size.values():
                total += float(score(torch.stack([image for image, _ in alike]), [text for _, text in alike]).sum())
        means[name] = total / len(questions)
    return {**means, "gap": means["winner"] - means["crossed"]}
