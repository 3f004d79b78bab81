"""What people choose among images of a prompt, kept so that nothing is lost, and made into pairs.

A folder of groups holds

    images.jsonl   {"prompt": "a red circle", "image": "images/1.png"}, as `diffalign pairs` writes it; more keys may follow
    choices.jsonl  {"group": ID, "annotator": "ada", "preferred": ID, "over": [ID, ...]}, a line a choice; "preferred" null: no choice

A group is a prompt and its images. Ids are hashes of content, so that a choice means the same images whatever is added, moved or sorted.
A line is on the disk before `choose` returns. An annotator's last line on a group counts; what was killed half-written is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffalign.files import appending, read_lines, write_text
from diffalign.training.data import PAIRS, pair_line

IMAGES, CHOICES = "images.jsonl", "choices.jsonl"


@dataclass(frozen=True)
class Group:
    """Images of one prompt, to choose among."""

    id: str
    prompt: str
    images: Mapping[str, str]
    """Image id -> path relative to the folder, in the folder's order; at least two."""


@dataclass(frozen=True)
class Choice:
    """One annotator's choice in one group."""

    group: str
    annotator: str
    preferred: str | None
    """Image id; None: looked at, and no choice made."""
    over: tuple[str, ...] = ()
    """Ids of the images that it was preferred to; empty: all others of the group."""


def read_groups(folder: Path) -> dict[str, Group]:
    """Group id -> group, in the order in which prompts first appear. A prompt with one image, or with copies of one, is no group.

    Raises FileNotFoundError where there is no images.jsonl or an image is missing, ValueError where a line is no image.
    """
    if not (folder / IMAGES).is_file():
        raise FileNotFoundError(f"there is no {folder / IMAGES}; `diffalign pairs` writes one, or list your images in it")
    found: dict[str, dict[str, str]] = {}
    for number, row in enumerate(read_lines(folder / IMAGES), 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("prompt", "image")):
            raise ValueError(f"{folder / IMAGES} line {number} must be an object with prompt and image, both texts; got {row!r}")
        found.setdefault(row["prompt"], {}).setdefault(_hash((folder / row["image"]).read_bytes()), row["image"])
    groups = [Group(_hash("\n".join([prompt, *sorted(images)]).encode()), prompt, images) for prompt, images in found.items()]
    return {group.id: group for group in groups if len(group.images) > 1}


class Choices:
    """The choices of a folder, to read and to add to. Several annotators may write at once, each from a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.groups = folder, read_groups(folder)

    def choose(self, group: str, annotator: str, preferred: str | None, over: Sequence[str] = ()) -> Choice:
        """Writes a choice; it takes the place of an earlier one by this annotator. ValueError for ids that are not of the group."""
        if not annotator:
            raise ValueError("annotator is empty; give a name, so that people's choices are told apart")
        if group not in self.groups:
            raise ValueError(f"group {group!r} is not in {self.folder / IMAGES}; have its images changed since it was shown?")
        wrong = [each for each in (preferred, *over) if each is not None and each not in self.groups[group].images]
        if wrong or (preferred in over) or (preferred is None and over):
            raise ValueError(f"preferred and over must be different images of group {group}; got {preferred!r} over {list(over)}")
        choice = Choice(group, annotator, preferred, tuple(over))
        with appending(self.folder / CHOICES) as append:
            append([{"group": group, "annotator": annotator, "preferred": preferred, "over": list(over)}])
        return choice

    def made(self) -> list[Choice]:
        """What counts: the last choice of each annotator in each group that is still there, in the order of the groups."""
        last: dict[tuple[str, str], Choice] = {}
        for row in read_lines(self.folder / CHOICES):
            last[row["group"], row["annotator"]] = Choice(row["group"], row["annotator"], row["preferred"], tuple(row["over"]))
        order = list(self.groups)
        known = [choice for (group, _), choice in last.items() if group in self.groups]
        return sorted(known, key=lambda choice: (order.index(choice.group), choice.annotator))

    def left(self, annotator: str) -> list[Group]:
        """Groups that this annotator has not looked at yet."""
        seen = {choice.group for choice in self.made() if choice.annotator == annotator}
        return [group for group in self.groups.values() if group.id not in seen]

    def write_pairs(self, captions: Mapping[str, str] = MappingProxyType({})) -> int:
        """pairs.jsonl of all choices, whole or as it was; returns how many pairs. People who disagree give both pairs.

        captions: image path -> its own caption, for DCPO. ValueError where nothing has been chosen.
        """
        lines = [line for choice in self.made() for line in self._pairs(choice, captions)]
        if not lines:
            raise ValueError(f"{self.folder / CHOICES} has no choice that makes a pair; choose first")
        write_text(self.folder / PAIRS, "".join(line + "\n" for line in lines))
        return len(lines)

    def _pairs(self, choice: Choice, captions: Mapping[str, str]) -> list[str]:
        group = self.groups[choice.group]
        if choice.preferred is None:
            return []
        over = choice.over or tuple(image for image in group.images if image != choice.preferred)
        winner = group.images[choice.preferred]
        return [pair_line(group.prompt, winner, loser, captions) for loser in (group.images[image] for image in over)]


def _hash(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
