"""Reward models as judges of images on disk, for the prompt sets that have no rules of their own; and HPSv2's way of summing up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffalign.benchmarks.base import Item, Pixels, Record
from diffalign.types import RewardModel

GROUPS = 10  # HPSv2 sums each style up in ten groups, and quotes their spread


@dataclass(frozen=True)
class RewardScorer:
    """One reward's score of each image, in its own unit. version: its name, unit and weights, as results quote it."""

    reward: RewardModel
    name: str
    version: str
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, images: Sequence[Pixels], items: Sequence[Item]) -> list[Record]:
        """Raises FloatingPointError where a score is not finite: it would spoil every mean without a word."""
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            shapes.setdefault(image.shape, []).append(i)
        values = [0.0] * len(images)
        for members in shapes.values():  # a batch is of one size
            pixels = torch.from_numpy(np.stack([images[i] for i in members])).to(self.device).permute(0, 3, 1, 2).float() / 255
            for i, value in zip(members, self.reward(pixels, [items[i].prompt for i in members]).tolist(), strict=True):
                values[i] = value
        wrong = [items[i].name for i, value in enumerate(values) if not np.isfinite(value)]
        if wrong:
            raise FloatingPointError(f"reward {self.name!r} gives no finite score for {wrong[0]} and {len(wrong) - 1} more")
        return [{"value": value} for value in values]


def hpsv2_table(rows: Sequence[Record], measure: str) -> dict[str, tuple[float, float]]:
    """Style -> mean of the ten group means, and their standard deviation, groups as the benchmark cuts them (80 prompts each of 800).

    A style with fewer images than groups has a spread of 0. "average" is over all images.
    """
    styles: dict[str, list[float]] = {}
    for row in rows:
        styles.setdefault(row["tag"], []).append(row["values"][measure])
    table = {}
    for style, values in styles.items():
        means = [float(np.mean(part)) for part in np.array_split(np.array(values), min(GROUPS, len(values)))]
        table[style] = (float(np.mean(means)), float(np.std(means)) if len(values) >= GROUPS else 0.0)
    return {**table, "average": (float(np.mean([row["values"][measure] for row in rows])), 0.0)}
