"""T2I-CompBench's scorers: each turns images of prompts into numbers in [0, 1], with what they rest on beside.

The rules are in t2i_spatial, t2i_numeracy and t2i_three_in_one, the models in t2i_models and open_vocabulary; here they meet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffalign.benchmarks.base import Item, Pixels, Record
from diffalign.benchmarks.t2i_compbench import numeracy
from diffalign.benchmarks.t2i_compbench.detections import Labelled
from diffalign.benchmarks.t2i_compbench.language import Annotations, questions, without_adjectives
from diffalign.benchmarks.t2i_compbench.models import BlipVqa, ClipScore, Depth
from diffalign.benchmarks.t2i_compbench.spatial import as_label, complex_objects, score_2d, score_3d, template_objects


class Finder(Protocol):
    """Finds the objects that words name in images of items, best first, in the frame of the rules."""

    version: str

    def find(self, images: Sequence[Pixels], items: Sequence[Item], words: Sequence[Sequence[str]]) -> list[list[Labelled]]: ...


@dataclass(frozen=True)
class OpenVocabulary:
    """A detector that is asked for the words of the prompt."""

    detector: Any

    @property
    def version(self) -> str:
        return self.detector.version

    def find(self, images: Sequence[Pixels], items: Sequence[Item], words: Sequence[Sequence[str]]) -> list[list[Labelled]]:
        return self.detector(images, words)


@dataclass(frozen=True)
class GivenDetections:
    """The user's own detections by image file name, whatever labels they have. Raises ValueError for an image they lack."""

    objects: Mapping[str, Sequence[Labelled]]
    version: str = "detections given by the user"

    def find(self, images: Sequence[Pixels], items: Sequence[Item], words: Sequence[Sequence[str]]) -> list[list[Labelled]]:
        out = []
        for item in items:
            name = next((name for name in (item.name, item.name.rpartition("/")[2]) if name in self.objects), None)
            if name is None:
                raise ValueError(f"the detections given have no entry for {item.name}; give it an empty list if nothing was found")
            out.append(list(self.objects[name]))
        return out


@dataclass(frozen=True)
class BlipVqaScorer:
    """The product over the prompt's noun phrases of P(yes) to "PHRASE?". A prompt without any scores 1, as upstream."""

    model: BlipVqa
    annotations: Annotations
    name: str = "blip-vqa"

    @property
    def version(self) -> str:
        return f"{self.model.version}; phrases by {self.annotations.made_by}"

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        asked = [questions(self.annotations[item.prompt].phrases) for item in items]
        answers = [[round(p, 4) for p in row] for row in self.model(images, asked)]
        return [
            {"value": round(math.prod(row), 4), "answers": [list(pair) for pair in zip(question, row, strict=True)]}
            for question, row in zip(asked, answers, strict=True)
        ]


@dataclass(frozen=True)
class ClipScorer:
    """The plain cosine of CLIP. In complex prompts adjectives are dropped, for which the annotations are needed."""

    model: ClipScore
    annotations: Annotations | None = None
    name: str = "clip-score"

    @property
    def version(self) -> str:
        return f"{self.model.version}; adjectives by {self.annotations.made_by}" if self.annotations else self.model.version

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        texts = [without_adjectives(self.annotations[item.prompt].tokens) if self.annotations else item.prompt for item in items]
        return [{"value": value, "text": text} for value, text in zip(self.model(images, texts), texts, strict=True)]


@dataclass(frozen=True)
class Spatial2DScorer:
    """Two objects in a relation. Objects come from the template, or in complex prompts from the annotations."""

    finder: Finder
    annotations: Annotations | None = None
    name: str = "2d-spatial"

    @property
    def version(self) -> str:
        tagged = f"; objects by {self.annotations.made_by}" if self.annotations else ""
        return f"2D rules of T2I-CompBench on {self.finder.version}{tagged}"

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        pairs = [self.pair(item.prompt) for item in items]
        found = self.finder.find(images, items, [labels(pair or ()) for pair in pairs])
        return [
            {"value": score_2d(item.prompt, objects, pair), "pair": pair, "objects": shown(objects)}
            for item, objects, pair in zip(items, found, pairs, strict=True)
        ]

    def pair(self, prompt: str) -> tuple[str, str] | None:
        return complex_objects(self.annotations[prompt].tokens) if self.annotations else template_objects(prompt)


@dataclass(frozen=True)
class Spatial3DScorer:
    """Two objects one before the other. `depth_axes`: see t2i_spatial; "published" repeats upstream's transposed map."""

    finder: Finder
    depth: Depth
    depth_axes: str = "published"
    name: str = "3d-spatial"

    @property
    def version(self) -> str:
        return f"3D rules of T2I-CompBench, {self.depth_axes} depth axes, on {self.finder.version} and {self.depth.version}"

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        pairs = [template_objects(item.prompt) for item in items]
        found = self.finder.find(images, items, [labels(pair) for pair in pairs])
        return [
            {"value": score_3d(item.prompt, objects, pair, depth, self.depth_axes), "pair": pair, "objects": shown(objects)}
            for item, objects, pair, depth in zip(items, found, pairs, self.depth(images), strict=True)
        ]


@dataclass(frozen=True)
class NumeracyScorer:
    """Presence and exact number of the prompt's objects."""

    finder: Finder
    vocabulary: numeracy.Vocabulary
    name: str = "numeracy"

    @property
    def version(self) -> str:
        return f"numeracy rules of T2I-CompBench on {self.finder.version}"

    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        wanted = [numeracy.parse(item.prompt, self.vocabulary) for item in items]
        words = [list(dict.fromkeys(numeracy.SYNONYMS.get(word, word) for word, _ in row)) for row in wanted]
        found = self.finder.find(images, items, words)
        return [
            {"value": numeracy.score(row, objects), "wanted": row, "objects": shown(objects)}
            for row, objects in zip(wanted, found, strict=True)
        ]


def labels(words: Sequence[str]) -> list[str]:
    """What a detector is asked for: each word once, people as persons."""
    return list(dict.fromkeys(map(as_label, words)))


def shown(objects: Sequence[Labelled]) -> list[list[Any]]:
    """[label, score, x1, y1, x2, y2] of each, for the record."""
    return [[found.label, round(found.score, 4), *(round(v, 1) for v in found.box)] for found in objects]
