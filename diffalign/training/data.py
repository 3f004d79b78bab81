"""What is learned from: pairs of images that somebody preferred one of, and prompts to make images of.

A folder of pairs holds pairs.jsonl, one JSON object a line, with image paths relative to the folder:

    {"prompt": "a red circle", "winner": "images/1.png", "loser": "images/2.png"}

and, where wanted, "weight" (> 0), "winner_caption" and "loser_caption" (prompts of their own for the two images, as in DCPO).

Images are encoded once and kept in a cache by their content. Everything random about the sample at position p of the endless stream of
shuffled epochs comes from (seed, p), so batches depend neither on what was drawn before nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.backbone import Backbone, Conditioning, Size
from diffalign.files import whole_file
from diffalign.images import decode
from diffalign.training.contract import PairBatch, PromptBatch

logger = logging.getLogger(__name__)
PAIRS = "pairs.jsonl"
MOST_IN_MEMORY = 2 * 1024**3  # bytes of latents; further ones are read from the cache each time
EMPTY = ""  # the prompt that stands for no prompt

Batch = TypeVar("Batch", covariant=True)
Record = TypeVar("Record")
"""A pair or a vote: what has a `prompt`."""


class Data(Protocol, Generic[Batch]):
    """An endless stream of samples: the loop asks for positions 0, 1, 2, ... of it."""

    def take(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions, as a batch."""
        ...


# ---- records -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One preference, on disk."""

    prompt: str
    winner: Path
    loser: Path
    weight: float = 1.0
    """How much it counts, > 0."""
    winner_caption: str | None = None
    """The winner's own prompt; None: `prompt`."""
    loser_caption: str | None = None


@dataclass(frozen=True)
class Dropped:
    """A row that cannot be used, and why."""

    line: int
    reason: str


def read_pairs(source: str | Path) -> tuple[list[Pair], list[Dropped]]:
    """The pairs of a folder with pairs.jsonl, or of a JSONL file. A pair with an image that cannot be read is dropped, and listed.

    Raises ValueError where a line is not a pair at all, or none is left; FileNotFoundError where there is no file.
    """
    file = Path(source).expanduser()
    file = file / PAIRS if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"data: there is no {file}; give a folder with a {PAIRS}, or such a file")
    pairs, dropped = [], []
    for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        pair = _pair(text, file, line)
        reason = next(filter(None, (undecodable(path) for path in (pair.winner, pair.loser))), None)
        if reason is None:
            pairs.append(pair)
        else:
            dropped.append(Dropped(line, reason))
    if dropped:
        logger.warning("%s: %d of %d pairs dropped; the first is line %d: %s", file, len(dropped), len(dropped) + len(pairs),
                       dropped[0].line, dropped[0].reason)  # fmt: skip
    if not pairs:
        raise ValueError(f"data: {file} has no pair that can be used ({len(dropped)} dropped)")
    return pairs, dropped


def _pair(text: str, file: Path, line: int) -> Pair:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} line {line} is not JSON ({error})") from error
    known = {"prompt", "winner", "loser", "weight", "winner_caption", "loser_caption"}
    if not isinstance(row, dict) or not {"prompt", "winner", "loser"} <= row.keys():
        raise ValueError(f"{file} line {line} must be an object with prompt, winner and loser; got {text[:80]!r}")
    if row.keys() - known:
        raise ValueError(f"{file} line {line} has {', '.join(sorted(row.keys() - known))}; known are {', '.join(sorted(known))}")
    for name in ("prompt", "winner", "loser", "winner_caption", "loser_caption"):
        if row.get(name) is not None and not isinstance(row[name], str):
            raise ValueError(f"{file} line {line}: {name} must be text, got {row[name]!r}")
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"{file} line {line}: weight must be a finite number greater than 0, got {weight!r}")
    images = {name: file.parent / row[name] for name in ("winner", "loser")}
    return Pair(row["prompt"], **images, weight=float(weight), winner_caption=row.get("winner_caption"),
                loser_caption=row.get("loser_caption"))  # fmt: skip


def pair_line(prompt: str, winner: str, loser: str, captions: Mapping[str, str] = MappingProxyType({})) -> str:
    """A line of pairs.jsonl. captions: image path -> its own prompt, where it has one."""
    said = {name: captions[image] for name, image in (("winner_caption", winner), ("loser_caption", loser)) if image in captions}
    return json.dumps({"prompt": prompt, "winner": winner, "loser": loser, **said})


def undecodable(path: Path) -> str | None:
    """Why an image file cannot be used; None where it can."""
    try:
        decode(path.read_bytes())
    except (ValueError, OSError) as error:
        return f"{path}: {error}"
    return None


def split_by_prompt(pairs: Sequence[Record], held_out: float, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """(train, held out): all pairs of a prompt on one side, which its text and the seed alone decide. ValueError where one is empty."""
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {held_out}")
    chosen = [_share(seed, pair.prompt) < held_out for pair in pairs]
    train = [pair for pair, out in zip(pairs, chosen, strict=True) if not out]
    held = [pair for pair, out in zip(pairs, chosen, strict=True) if out]
    if held_out > 0 and not (train and held):
        raise ValueError(f"held_out={held_out} leaves {len(train)} pairs to train and {len(held)} held out, of "
                         f"{len({pair.prompt for pair in pairs})} prompts; give more prompts, or held_out=0")  # fmt: skip
    return train, held


def _share(seed: int, text: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:8], "big") / 2**64


# ---- latents -----------------------------------------------------------------------------------------------------------------


@dataclass
class LatentStore:
    """Latents of image files, encoded once and kept in `folder`, under a hash of the file, the size and the autoencoder."""

    folder: Path
    encode: Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b ..."]]
    """`Backbone.encode_images`."""
    size: Size
    """Images of another size are scaled to cover it and cut around the centre."""
    autoencoder: str
    """What tells autoencoders apart, such as a hash of the weights."""
    _memory: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _bytes: int = 0

    def key(self, image: Path, flipped: bool = False) -> str:
        digest = hashlib.sha256(f"{self.autoencoder} {self.size.height}x{self.size.width} {flipped} ".encode())
        digest.update(image.read_bytes())
        return digest.hexdigest()[:32]

    @torch.no_grad()
    def prepare(self, images: Iterable[tuple[Path, bool]], batch_size: int = 8, progress: Callable[[int], Any] | None = None) -> dict:
        """(image, flipped) -> key, for `get`; what is not in the cache is encoded and written."""
        keys = {item: self.key(*item) for item in dict.fromkeys(images)}
        missing = list({key: item for item, key in keys.items() if not self._path(key).is_file()}.items())
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            latents = self.encode(torch.stack([self._pixels(*item) for _, item in part])).float().cpu()
            for (key, _), latent in zip(part, latents, strict=True):
                self._path(key).parent.mkdir(parents=True, exist_ok=True)
                with whole_file(self._path(key)) as temporary:
                    save_file({"latents": latent.contiguous()}, temporary)
            if progress is not None:
                progress(len(part))
        return keys

    def get(self, key: str) -> Tensor:
        """Raises FileNotFoundError where `prepare` did not make it."""
        if key not in self._memory:
            latent = load_file(self._path(key))["latents"]
            if self._bytes + latent.nbytes > MOST_IN_MEMORY:
                return latent
            self._memory[key] = latent
            self._bytes += latent.nbytes
        return self._memory[key]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _pixels(self, image: Path, flipped: bool) -> Float[Tensor, "3 h w"]:
        pixels = covering(decode(image.read_bytes()).tensor(), self.size)
        return pixels.flip(-1) if flipped else pixels


def covering(image: Float[Tensor, "3 h w"], size: Size) -> Float[Tensor, "3 H W"]:
    """The image scaled until it covers the size, and cut around its centre; as it is where it has the size."""
    height, width = image.shape[-2:]
    if (height, width) == (size.height, size.width):
        return image
    scale = max(size.height / height, size.width / width)
    shape = (max(round(height * scale), size.height), max(round(width * scale), size.width))
    scaled = torch.nn.functional.interpolate(image[None], shape, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = (shape[0] - size.height) // 2, (shape[1] - size.width) // 2
    return scaled[:, top : top + size.height, left : left + size.width]


# ---- prompts -----------------------------------------------------------------------------------------------------------------


class Texts:
    """Prompts, each distinct one encoded once; kept on the CPU and moved a batch at a time."""

    def __init__(
        self, backbone: Backbone, prompts: Iterable[str], *, unconditional: bool, size: Size | None, device: Any, batch_size: int = 32
    ) -> None:
        self.device = device
        distinct = list(dict.fromkeys([*prompts, EMPTY]))
        self._row = {prompt: row for row, prompt in enumerate(distinct)}
        parts = [
            backbone.encode(distinct[start : start + batch_size], unconditional=unconditional, size=size)
            for start in range(0, len(distinct), batch_size)
        ]
        tensors = {name: torch.cat([part.tensors[name].cpu() for part in parts]) for name in parts[0].tensors}
        self._all = replace(parts[0], prompts=tuple(distinct), tensors=tensors)

    def of(self, prompts: Sequence[str]) -> Conditioning:
        chosen = self._all.rows([self._row[prompt] for prompt in prompts])
        return replace(chosen, tensors={name: tensor.to(self.device) for name, tensor in chosen.tensors.items()})


# ---- streams -----------------------------------------------------------------------------------------------------------------


def seeded(*key: int) -> torch.Generator:
    """A generator on the CPU that the numbers of `key` (>= 0) decide together; keys that differ share no draws."""
    # words of one width, and how many: SeedSequence itself cannot tell (1,) from (1, 0)
    words = [len(key), *(word for number in key for word in divmod(number, 2**32))]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))


class Order:
    """Position in the endless stream -> item: each epoch is a shuffle of all items, which (seed, epoch) alone decides."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epochs: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch not in self._epochs:
            if len(self._epochs) > 2:
                self._epochs.clear()
            self._epochs[epoch] = torch.randperm(self.count, generator=seeded(self.seed, 0, epoch)).tolist()
        return self._epochs[epoch][place]


class PairData:
    """Pairs as batches of latents and encoded prompts."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        store: LatentStore,
        backbone: Backbone,
        *,
        device: Any = "cpu",
        seed: int = 0,
        drop_prompts: float = 0.1,
        flip: bool = False,
        unconditional: bool = False,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """drop_prompts: share of pairs, in [0, 1), that learn under the empty prompt, so that guidance goes on working.
        flip: mirror both images of every other pair. unconditional: encode the other branch too, for losses under guidance.
        """
        if not 0 <= drop_prompts < 1:
            raise ValueError(f"drop_prompts must lie in [0, 1), got {drop_prompts}")
        if not pairs:
            raise ValueError("pairs is empty")
        self.pairs, self.store, self.device = list(pairs), store, device
        self.seed, self.drop_prompts, self.flip = seed, drop_prompts, flip
        self.weighted = any(pair.weight != 1 for pair in pairs)
        self.captioned = any(pair.winner_caption is not None or pair.loser_caption is not None for pair in pairs)
        texts = [text for pair in pairs for text in (pair.prompt, pair.winner_caption, pair.loser_caption) if text is not None]
        self.texts = Texts(backbone, texts, unconditional=unconditional, size=store.size, device=device)
        versions = (False, True) if flip else (False,)
        images = [(path, flipped) for pair in pairs for path in (pair.winner, pair.loser) for flipped in versions]
        self._keys = store.prepare(images, progress=progress)
        self._order = Order(len(pairs), seed)

    def __len__(self) -> int:
        return len(self.pairs)

    def identity(self) -> str:
        """A hash of all that is learned from: texts, weights and the content of images."""

        def told(pair: Pair) -> str:
            images = f"{self._keys[pair.winner, False]} {self._keys[pair.loser, False]}"
            return f"{pair.prompt}\t{images}\t{pair.weight}\t{pair.winner_caption}\t{pair.loser_caption}"

        return hashlib.sha256("\n".join(map(told, self.pairs)).encode()).hexdigest()[:16]

    def take(self, positions: Sequence[int]) -> PairBatch:
        chosen = [self.pairs[self._order[position]] for position in positions]
        draws = [torch.rand(2, generator=seeded(self.seed, 1, position)).tolist() for position in positions]
        kept = [drop >= self.drop_prompts for drop, _ in draws]
        flipped = [self.flip and side < 0.5 for _, side in draws]

        def latents(side: str) -> Tensor:
            keys = [self._keys[getattr(pair, side), flip] for pair, flip in zip(chosen, flipped, strict=True)]
            return torch.stack([self.store.get(key) for key in keys]).to(self.device)

        def conditioning(caption: str) -> Conditioning:
            texts = [getattr(pair, caption) or pair.prompt for pair in chosen]
            return self.texts.of([text if keep else EMPTY for text, keep in zip(texts, kept, strict=True)])

        return PairBatch(
            latents("winner"),
            latents("loser"),
            conditioning("winner_caption"),
            conditioning("loser_caption") if self.captioned else None,
            torch.tensor([pair.weight for pair in chosen], device=self.device) if self.weighted else None,
        )


class PromptData:
    """Prompts as batches, for objectives that make their own images. The sample at position p gets a seed of its own."""

    def __init__(self, prompts: Sequence[str], backbone: Backbone, *, device: Any = "cpu", seed: int = 0, size: Size | None = None) -> None:
        if not prompts:
            raise ValueError("prompts is empty")
        self.prompts, self.seed = list(prompts), seed
        self.texts = Texts(backbone, prompts, unconditional=True, size=size, device=device)
        self._order = Order(len(self.prompts), seed)

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, positions: Sequence[int]) -> PromptBatch:
        seeds = tuple(seeded(self.seed, 2, position).initial_seed() for position in positions)
        return PromptBatch(self.texts.of([self.prompts[self._order[position]] for position in positions]), seeds)
