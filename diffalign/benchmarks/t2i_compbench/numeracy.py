"""T2I-CompBench++'s numeracy: are the objects of the prompt there, and as many of each as it says?

Source: Huang et al., T2I-CompBench++ (arXiv 2307.06350v3). With m objects in the prompt, each is worth 1/m: half for being there, half for
the exact number. A detection is dropped where an earlier kept one of the same label covers it (IoU, or either one's share, above 0.9; a
box covers its last pixel). A word that is no detected label takes over every label that contains it: "pen" renames "pencil case".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.benchmarks.t2i_compbench.detections import PEOPLE, Labelled
from diffalign.rules import Box

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
SINGULAR = ("a", "an", "one")
# The prompt's word -> the detector's. Upstream's list also has "telivision" -> "tv", which no prompt ever spells so; "television" stays.
SYNONYMS = {**dict.fromkeys(PEOPLE, "person"), "ship": "boat", "goldfish": "fish", "painting": "picture"}
SAME_OBJECT = 0.9


@dataclass(frozen=True)
class Vocabulary:
    """The objects that prompts may count: `plurals[i]` is the plural of `singulars[i]`."""

    singulars: tuple[str, ...]
    plurals: tuple[str, ...]

    @classmethod
    def of(cls, lines: Sequence[str], source: str = "new_objects.txt") -> Vocabulary:
        """One "singular - plural" a line; blank lines are skipped. Raises ValueError naming a line that is something else."""
        pairs = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            parts = [part.strip().lower() for part in line.split(" - ")]
            if len(parts) != 2 or not all(parts):
                raise ValueError(f'{source} line {number} must be "singular - plural"; got {line!r}')
            pairs.append(parts)
        return cls(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    def singular(self, word: str) -> str:
        """The singular of a plural; a word that is no plural in the list is returned as it is."""
        return self.singulars[self.plurals.index(word)] if word in self.plurals else word

    def __contains__(self, word: str) -> bool:
        return word in self.singulars or word in self.plurals


def tokenize(prompt: str) -> list[str]:
    """Words and punctuation marks, split at hyphens too. Numeracy prompts have little else on which English tokenizers differ."""
    return re.findall(r"\w+|[^\w\s]", prompt)


def parse(prompt: str, vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """(object, count) in the prompt's order: a number word followed by an object of the vocabulary, of two words or of one."""
    tokens = tokenize(prompt)
    wanted = []
    for i, token in enumerate(tokens[:-1]):
        if token not in NUMBERS:
            continue
        two_words, word = " ".join(tokens[i + 1 : i + 3]), tokens[i + 1]
        if len(tokens) > i + 2 and two_words in vocabulary:
            several = two_words in vocabulary.plurals and token not in SINGULAR
            wanted.append((vocabulary.singular(two_words), NUMBERS[token]) if several else (two_words, 1))
        elif word in vocabulary.singulars and token in SINGULAR:
            wanted.append((word, 1))
        elif word in vocabulary:
            wanted.append((vocabulary.singular(word), NUMBERS[token]))
    return wanted


def without_repeats(objects: Sequence[Labelled]) -> list[Labelled]:
    """The objects, best first, without those that an earlier kept one of the same label covers."""
    kept: list[Labelled] = []
    for found in objects:
        if not any(other.label == found.label and _same(found.box, other.box) for other in kept):
            kept.append(found)
    return kept


def score(wanted: Sequence[tuple[str, int]], objects: Sequence[Labelled]) -> float:
    """The image's score in [0, 1]. Raises ValueError where the prompt asks for nothing that can be counted."""
    if not wanted:
        raise ValueError("the prompt names no countable object of the vocabulary, so numeracy cannot be scored")
    labels = [found.label for found in without_repeats(objects)]
    weight, total = 1.0 / len(wanted), 0.0
    for word, count in wanted:
        label = SYNONYMS.get(word, word)
        if label not in labels:  # the renaming stays for the objects that follow
            labels = [label if label in found else found for found in labels]
        if label in labels:
            total += 0.5 * weight
            total += 0.5 * weight if labels.count(label) == count else 0.0
    return total


def _same(a: Box, b: Box) -> bool:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    intersection = width * height
    area_a, area_b = ((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b))
    shares = (intersection / (area_a + area_b - intersection), intersection / area_a, intersection / area_b)
    return any(share > SAME_OBJECT for share in shares)
