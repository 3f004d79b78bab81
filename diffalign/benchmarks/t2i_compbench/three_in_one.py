"""T2I-CompBench's 3-in-1 score of complex prompts: the mean of those of three scores that the prompt's kind calls for.

    spatial prompts           (BLIP-VQA + 2D spatial) / 2
    action prompts            (BLIP-VQA + CLIP) / 2
    the others                (BLIP-VQA + 2D spatial + CLIP) / 3

Source: Huang et al. (arXiv 2307.06350). Kinds are looked up in upstream's lists of spatial and of action prompts, by the text up to the
first full stop in lower case.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

KINDS = ("spatial", "action", "both")


@dataclass(frozen=True)
class Kinds:
    """Normalised prompts of each list. A prompt in both lists is spatial; in neither, "both" (it has a relation and an action)."""

    spatial: Collection[str]
    action: Collection[str]

    @classmethod
    def of(cls, spatial: Collection[str], action: Collection[str]) -> Kinds:
        return cls(frozenset(map(normalise, spatial)), frozenset(map(normalise, action)))

    def kind(self, prompt: str) -> str:
        text = normalise(prompt)
        return "spatial" if text in self.spatial else "action" if text in self.action else "both"


def normalise(prompt: str) -> str:
    return prompt.strip("\n").split(".")[0].lower()


def three_in_one(kind: str, blip_vqa: float, spatial_2d: float, clip: float) -> float:
    """The mean of the scores that the kind of prompt calls for; the others are not looked at."""
    if kind == "spatial":
        return (spatial_2d + blip_vqa) * 0.5
    if kind == "action":
        return (clip + blip_vqa) * 0.5
    if kind == "both":
        return (blip_vqa + spatial_2d + clip) / 3
    raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
