"""Judges that answer questions about images, and what the benchmarks of questions need of them.

A judge is anything with `ask` and `answer`: a vision-language model that is shown images and questions. It is brought from outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.benchmarks.base import Item, Models, Pixels, Record
from diffalign.files import read_json

VLM = "vlm"  # the default judge's name on the command line
ROUNDING = 1e-3  # by which a sum of probabilities may exceed 1


class Judge(Protocol):
    """A model that looks at images "b 3 h w" in [0, 1] and one question each.

    ask: the probability of "yes" against "no". answer: the probability that its answer begins with the first token of any of the words that
    are accepted, against all others.
    """

    def ask(self, images: Float[Tensor, "b 3 h w"], questions: Sequence[str]) -> Float[Tensor, " b"]: ...

    def answer(
        self, images: Float[Tensor, "b 3 h w"], questions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> Float[Tensor, " b"]: ...


@dataclass(frozen=True)
class Panel:
    """A judge, what it is called in results, where it runs, and how many (image, question) pairs it is given at once."""

    judge: Judge
    version: str
    device: str = "cpu"
    batch_size: int = 8

    def ask(self, images: Sequence[Pixels], items: Sequence[Item], questions: Sequence[Sequence[str]]) -> list[list[float]]:
        """P(yes) of each image's questions."""
        return self._pairs(images, questions, lambda pixels, pairs: self.judge.ask(pixels, [questions[i][k] for i, k in pairs]))

    def answer(
        self, images: Sequence[Pixels], questions: Sequence[Sequence[str]], answers: Sequence[Sequence[Sequence[str]]]
    ) -> list[list[float]]:
        """The probability of the accepted answers to each image's questions."""

        def ask(pixels: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
            return self.judge.answer(pixels, [questions[i][k] for i, k in pairs], [answers[i][k] for i, k in pairs])

        return self._pairs(images, questions, ask)

    @torch.no_grad()
    def _pairs(
        self, images: Sequence[Pixels], questions: Sequence[Sequence[str]], ask: Callable[[Tensor, Sequence[tuple[int, int]]], Tensor]
    ) -> list[list[float]]:
        """Images of one size together. Raises FloatingPointError where an answer is no probability."""
        found: list[list[float]] = [[0.0] * len(asked) for asked in questions]
        sizes: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, asked in enumerate(questions):
            sizes.setdefault(images[i].shape, []).extend((i, k) for k in range(len(asked)))
        for pairs in sizes.values():
            for start in range(0, len(pairs), self.batch_size):
                batch = pairs[start : start + self.batch_size]
                pixels = torch.from_numpy(np.stack([images[i] for i, _ in batch])).to(self.device).permute(0, 3, 1, 2).float() / 255
                for (i, k), p in zip(batch, ask(pixels, batch).tolist(), strict=True):
                    if not 0 <= p <= 1 + ROUNDING:
                        raise FloatingPointError(f"{self.version} gave {p} as the probability of an answer to {questions[i][k]!r}")
                    found[i][k] = min(p, 1.0)
        return found


def asked(judge: str | None, models: Models) -> Panel:
    """The panel of --judge: "vlm" is the default model, anything else a folder or hub id."""
    source = None if judge == VLM else judge
    return Panel(models.vlm(source), models.vlm_name(source), models.device)


@dataclass(frozen=True)
class GivenAnswers:
    """The user's own answers: image name -> question -> "yes", "no" or a probability, from a JSON file. Stands in for a judge.

    An image is named by its path in the run's folder. Raises ValueError for an answer that is missing or neither.
    """

    answers: Mapping[str, Record]
    version: str

    @classmethod
    def read(cls, path: Path) -> GivenAnswers:
        data = read_json(path)
        if not isinstance(data, Mapping) or not all(isinstance(entry, Mapping) for entry in data.values()):
            raise ValueError(f'{path} must hold image name -> question -> answer, as in {{"0/samples/00000.png": {{"Is it red?": "yes"}}}}')
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        return cls(data, f"answers given by the user ({path.name}, sha256 {digest})")

    def ask(self, images: Sequence[Pixels], items: Sequence[Item], questions: Sequence[Sequence[str]]) -> list[list[float]]:
        """P(yes) of each item's questions; nobody looks at the images."""
        return [self._of(item, asked) for item, asked in zip(items, questions, strict=True)]

    def _of(self, item: Item, questions: Sequence[str]) -> list[float]:
        if item.name not in self.answers:
            raise ValueError(f"the answers given have no entry for {item.name}")
        given = self.answers[item.name]
        out = []
        for question in questions:
            answer = given.get(question)
            p = {"yes": 1.0, "no": 0.0}.get(str(answer).strip().lower(), answer)
            if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
                raise ValueError(f'{item.name}: the answer to {question!r} must be "yes", "no" or a probability; got {answer!r}')
            out.append(float(p))
        return out
