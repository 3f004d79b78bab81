"""Reads a caption of the shapes world back into GenEval's schema, knowing only the grammar: so captions can be checked against scenes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffalign.rules import RELATIONS, Detection, Verdict, evaluate
from diffalign.shapes.prompts import CARRIERS
from diffalign.shapes.scenes import COLORS, SHAPES, Scene

NUMBERS = {"two": 2, "three": 3, "four": 4}
PLURALS = {"crosses": "cross", **{f"{shape}s": shape for shape in SHAPES if shape != "cross"}}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_NAME = rf"(?P<article>an?) (?:(?P<size>large|small) )?(?:(?P<color>{'|'.join(COLORS)}) )?(?P<shape>{'|'.join(SHAPES)})"
_PLACE = r"(?: at the (?P<place>(?:top|middle|bottom) (?:left|center|right)))?"
_SAID = re.compile(_NAME + _PLACE + r"$")
_SEVERAL = re.compile(rf"(?P<number>{'|'.join(NUMBERS)}) (?:(?P<color>{'|'.join(COLORS)}) )?(?P<shapes>{'|'.join(PLURALS)})$")


@dataclass(frozen=True)
class Said:
    """One thing as a caption names it; what is not said is None."""

    shape: str
    color: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Caption:
    """What a caption says: one or two things and how the first stands to the second, or a number of one shape."""

    things: tuple[Said, ...]
    relation: str | None = None
    number: int = 1

    def metadata(self) -> dict:
        """The same in GenEval's schema, without tag and prompt."""
        if self.number > 1:
            (thing,) = self.things
            clause = {"class": thing.shape, "count": self.number} | ({"color": thing.color} if thing.color else {})
            return {"include": [clause], "exclude": [{"class": thing.shape, "count": self.number + 1}]}
        clauses = [{"class": t.shape, "count": 1} | ({"color": t.color} if t.color else {}) for t in self.things]
        if self.relation:
            subject, target = clauses
            return {"include": [target, subject | {"position": [self.relation, 0]}]}
        return {"include": clauses}

    def color_pairs(self) -> set[tuple[str, str]]:
        return {(t.shape, t.color) for t in self.things if t.color}

    def relation_pairs(self) -> set[tuple[str, str]]:
        """Both ways round: "a left of b" also says that b is right of a."""
        if not self.relation:
            return set()
        a, b = self.things
        return {(a.shape, self.relation), (b.shape, OPPOSITE[self.relation])}


def parse(caption: str) -> Caption:
    """Raises ValueError for a sentence outside the grammar, and for a wrong article."""
    carrier = next(c for c in sorted(CARRIERS, key=len, reverse=True) if caption.startswith(c))
    body = caption.removeprefix(carrier)
    if several := _SEVERAL.match(body):
        return Caption((Said(PLURALS[several["shapes"]], several["color"]),), number=NUMBERS[several["number"]])
    joint = re.search(rf" (and|{'|'.join(RELATIONS)}) (?=an? )", body)
    if not joint:
        return Caption((_said(body),))
    relation = None if joint[1] == "and" else joint[1]
    return Caption((_said(body[: joint.start()]), _said(body[joint.end() :])), relation)


def _said(phrase: str) -> Said:
    match = _SAID.match(phrase)
    if match is None:
        raise ValueError(f"not a phrase of the grammar: {phrase!r}")
    word = match["size"] or match["color"] or match["shape"]
    if match["article"] != ("an" if word[0] in "aeiou" else "a"):
        raise ValueError(f"wrong article: {phrase!r}")
    return Said(match["shape"], match["color"], match["size"], match["place"])


def true_verdict(scene: Scene, metadata: dict) -> Verdict:
    """GenEval's rules on the true boxes and colours of a scene: no image, no detector."""
    objects: dict[str, list[Detection]] = {}
    for thing in scene.things:
        objects.setdefault(thing.shape, []).append(Detection(thing.box, 1.0, mask=thing.color))
    return evaluate(metadata, objects, lambda _, found: [d.mask for d in found])
