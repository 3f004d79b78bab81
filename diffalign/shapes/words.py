"""The words that the embedded models and rewards have read: those of the prompts and captions of the shapes world, and no others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from diffalign.rules import RELATIONS
from diffalign.shapes.prompts import CARRIERS, NUMBER_WORDS, plural
from diffalign.shapes.scenes import COLORS, SHAPES

GRAMMAR = ("a", "an", "and", "at", "the")
SIZES = ("large", "small")
PLACES = ("top", "middle", "bottom", "left", "center", "right")


@cache
def vocabulary() -> frozenset[str]:
    """Every word that a prompt or a caption of the shapes world can have."""
    phrases = (*CARRIERS, *RELATIONS, *COLORS, *NUMBER_WORDS.values(), *SHAPES, *map(plural, SHAPES), *GRAMMAR, *SIZES, *PLACES)
    return frozenset(word for phrase in phrases for word in words(phrase))


def words(text: str) -> list[str]:
    """The words of a text in lower case, numbers among them; marks are none."""
    return re.findall(r"\w+", text.lower())


def unknown_words(prompts: Sequence[str]) -> dict[str, list[str]]:
    """Prompt -> its words that no model of the shapes world has read, for the prompts that have any."""
    found = {prompt: [word for word in dict.fromkeys(words(prompt)) if word not in vocabulary()] for prompt in prompts}
    return {prompt: strange for prompt, strange in found.items() if strange}


def warning(prompts: Sequence[str]) -> str | None:
    """What to tell who gives the embedded models such prompts; None where all is known."""
    strange = unknown_words(prompts)
    if not strange:
        return None
    first, its_words = next(iter(strange.items()))
    more = f" and of {len(strange) - 1} more prompts" if len(strange) > 1 else ""
    things, colors = ", ".join(SHAPES), ", ".join(COLORS)
    return (
        f"the shapes models have never read {', '.join(its_words[:5])} (of {first[:60]!r}{more}); what they draw, and what the "
        f"shapes rewards score, says nothing of such words. They know {things} in {colors}, alone, together, counted and side by side"
    )
