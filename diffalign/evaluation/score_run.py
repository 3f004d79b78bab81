"""Scoring a folder with one reward: images read ahead, those of one size batched, each batch's scores on the disk before the next.

    OUT/scores/NAME.jsonl     one line per image: {"item", "sha256", "prompt", "score", "notes"}; no prompt where the reward needs none

A line counts for an image as long as the image has that sha256 and that prompt, so pictures made anew are scored again. What cannot be
scored has no line and is tried again by the next run.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from diffalign.benchmarks.base import Record
from diffalign.evaluation.image_files import ImageFile
from diffalign.files import appending, read_lines
from diffalign.images import Picture, decode

Model: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]
READERS = 4  # threads that decode; Pillow releases the interpreter meanwhile
HELD_BATCHES = 4  # at most so many batches' images wait for others of their size
HELD_PIXELS = 64_000_000  # and of large ones fewer: three quarters of a gigabyte as floats

GIVE_UP = 8  # images in a row that a reward breaks on: then it is not the images


@dataclass
class Loaded:
    """An image in memory, or in `problem` why not."""

    image: ImageFile
    sha256: str = ""
    picture: Picture | None = None
    problem: str = ""


@dataclass
class Work:
    """One reward's scores: those on the disk that still count, the images that are to do, and what could not be done.

    prompts: of every image that has one; None where the reward needs none. notes: what was decided in reading an image.
    """

    reward: str
    path: Path
    prompts: Mapping[str, str] | None
    scores: dict[str, float] = field(default_factory=dict)
    pending: list[ImageFile] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    broken: int = 0  # images in a row that ended in a RuntimeError

    def prompt(self, image: ImageFile) -> str | None:
        """The image's prompt; None where the reward needs none."""
        return None if self.prompts is None else self.prompts[image.name]

    def keep(self, image: ImageFile, score: float, notes: Sequence[str]) -> None:
        self.scores[image.name] = score
        if notes:
            self.notes[image.name] = list(notes)


class Digests:
    """sha256 of files, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, image: ImageFile) -> str:
        """Empty where the file cannot be read."""
        if image.path not in self._known:
            try:
                self._known[image.path] = hashlib.sha256(image.path.read_bytes()).hexdigest()
            except OSError:
                return ""
        return self._known[image.path]


def open_work(reward: str, out: Path, images: Sequence[ImageFile], prompts: Mapping[str, str] | None, digests: Digests) -> Work:
    """What is done and what is left. An image without a needed prompt is a problem."""
    work = Work(reward, out / "scores" / f"{reward}.jsonl", prompts)
    known = {line["item"]: line for line in read_lines(work.path)}
    for image in images:
        if prompts is not None and image.name not in prompts:
            work.problems[image.name] = "no prompt was found"
            continue
        line = known.get(image.name)
        if line and line["prompt"] == work.prompt(image) and line["sha256"] == digests.of(image):
            work.keep(image, line["score"], line.get("notes", ()))
        else:
            work.pending.append(image)
    return work


def score_pending(work: Work, model: Model, device: str, batch_size: int, progress: Callable[[int], None]) -> None:
    """Scores what is pending and keeps it.

    Problems with one image, or that the reward has with one image, are noted in `work.problems`; everything else is raised.
    """
    with appending(work.path) as append:
        for batch in _batches(_whole(read_ahead(work.pending, load), work, progress), batch_size):
            done = []
            for loaded, score in zip(batch, _scores(model, batch, work, device), strict=True):
                if isinstance(score, str):
                    work.problems[loaded.image.name] = score
                else:
                    done.append((loaded, score))
            append([_line(loaded, work, score) for loaded, score in done])
            for loaded, score in done:
                work.keep(loaded.image, score, loaded.picture.notes)
            progress(len(batch))


def load(image: ImageFile) -> Loaded:
    """Reads and decodes a file; whatever is wrong with it is `problem`."""
    try:
        data = image.path.read_bytes()
        return Loaded(image, hashlib.sha256(data).hexdigest(), decode(data))
    except OSError as error:
        return Loaded(image, problem=f"cannot be read ({error.strerror or error})")
    except ValueError as error:
        return Loaded(image, problem=str(error))


def read_ahead(images: Sequence[ImageFile], read: Callable[[ImageFile], Loaded]) -> Iterator[Loaded]:
    """The images in order, some decoded in threads while others are scored."""
    threads = min(READERS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    left = iter(images)
    try:
        queue = deque(pool.submit(read, image) for image in islice(left, threads + 1))
        while queue:
            yield queue.popleft().result()
            queue.extend(pool.submit(read, image) for image in islice(left, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _whole(images: Iterable[Loaded], work: Work, progress: Callable[[int], None]) -> Iterator[Loaded]:
    """Those that could be read; the others are problems."""
    for loaded in images:
        if loaded.picture is None:
            work.problems[loaded.image.name] = loaded.problem
            progress(1)
        else:
            yield loaded


def _batches(images: Iterable[Loaded], size: int) -> Iterator[list[Loaded]]:
    """Images of one size together. Where too many others wait, the fullest goes first, so that memory stays bounded."""
    waiting: dict[tuple[int, ...], list[Loaded]] = {}

    def area(shape: tuple[int, ...]) -> int:
        return len(waiting[shape]) * shape[0] * shape[1]

    for loaded in images:
        shape = loaded.picture.levels.shape
        waiting.setdefault(shape, []).append(loaded)
        if len(waiting[shape]) == size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= HELD_BATCHES * size or sum(map(area, waiting)) >= HELD_PIXELS:
            yield waiting.pop(max(waiting, key=area))
    yield from waiting.values()


def _scores(model: Model, batch: Sequence[Loaded], work: Work, device: str) -> list[float | str]:
    """A score or a problem for each. An image that the reward refuses must not take its batch mates along.

    It refuses with a ValueError by its contract, with a RuntimeError where a shape breaks the model or a server has no answer. Raises
    ValueError where that happens to GIVE_UP images in a row.
    """
    prompts = [work.prompt(loaded.image) or "" for loaded in batch]
    images = torch.stack([loaded.picture.tensor() for loaded in batch]).to(device)
    try:
        with torch.no_grad():
            values = model(images, prompts).tolist()
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # out of memory, a broken device
        if len(batch) > 1:
            return [score for loaded in batch for score in _scores(model, [loaded], work, device)]
        problem = " ".join(str(error).split())
        work.broken = work.broken + 1 if isinstance(error, RuntimeError) else 0
        if work.broken == GIVE_UP:
            raise ValueError(f"{work.reward} failed on {GIVE_UP} images in a row, and the last time said: {problem}") from error
        return [problem]
    work.broken = 0
    return [value if math.isfinite(value) else f"the score is not finite ({value})" for value in values]


def _line(loaded: Loaded, work: Work, score: float) -> Record:
    line = {"item": loaded.image.name, "sha256": loaded.sha256, "prompt": work.prompt(loaded.image), "score": score}
    return {**line, "notes": list(loaded.picture.notes)} if loaded.picture.notes else line
