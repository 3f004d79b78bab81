"""How well a reward sees: within a prompt, does it put the images that the judge calls right above the wrong ones?

AUC of a prompt: the share of (right, wrong) pairs of its images that the reward orders rightly, ties counted half. A task's AUC is the mean
over its prompts that have both; the overall AUC the mean over all such prompts. Best of n: the judge's accuracy of the image that the
reward likes best, and what share it is of the gain the judge itself would make,

    share = (accuracy by the reward - accuracy of a random image) / (any image right - accuracy of a random image),

each accuracy the unweighted mean over the tasks, as in GenEval.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from diffalign.rules import TASKS
from diffalign.shapes.train.judged import Judged

Score = Callable[[UInt8[Tensor, "b h w 3"], list[str]], Float[Tensor, " b"]]
RESAMPLES = 1_000
SHARE = "share of the judge's gain"
AUC_NOTE = (
    "AUC: within a prompt, how often a right image scores above a wrong one (ties half), by the judge, on images of prompts of the named"
    " split; mean over the prompts that have both kinds, with a 95 % interval from resampled prompts. Best of 32: the judge's accuracy of"
    " the image with the highest score; its share counts from a random image to the judge's own best."
)


def score_groups(score: Score, judged: Judged, batch: int = 512) -> Float[Tensor, "n g"]:
    """The reward of every image for its own prompt."""
    n, g = judged.right.shape
    texts = [row["prompt"] for row in judged.rows for _ in range(g)]
    flat = judged.images.flatten(0, 1)
    parts = [score(flat[i : i + batch], texts[i : i + batch]) for i in range(0, n * g, batch)]
    return torch.cat(parts).view(n, g)


def prompt_aucs(scores: Float[Tensor, "n g"], right: Bool[Tensor, "n g"]) -> Float[Tensor, " n"]:
    """AUC within each prompt; NaN where all its images are right or all wrong."""
    higher = torch.sign(scores[:, :, None] - scores[:, None, :]).double()
    pairs = (right[:, :, None] & ~right[:, None, :]).double()
    return ((0.5 + 0.5 * higher) * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2))


def auc_figures(scores: Float[Tensor, "n g"], judged: Judged, seed: int = 0) -> dict[str, dict]:
    """AUC by task and overall, each with its interval and how many prompts it is of; nothing where no prompt says anything."""
    aucs, tags = prompt_aucs(scores, judged.right).numpy(), np.array([row["tag"] for row in judged.rows])
    known = ~np.isnan(aucs)
    figures = {task: _mean(aucs[known & (tags == task)], seed) for task in TASKS if (known & (tags == task)).any()}
    return figures | ({"overall": _mean(aucs[known], seed)} if known.any() else {})


def _mean(values: np.ndarray, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    means = rng.choice(values, size=(RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"value": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": len(values)}


def best_of_figures(scores: Float[Tensor, "n g"], judged: Judged) -> dict[str, dict | float]:
    """Judge accuracy of a random image, of the best by the reward and of the best there is, by task; and the share of the gain."""
    n = len(scores)
    chosen = judged.right[torch.arange(n), scores.argmax(dim=1)].double()
    ways = {"random image": judged.right.double().mean(dim=1), "by the reward": chosen, "by the judge": judged.right.any(dim=1).double()}
    tags = np.array([row["tag"] for row in judged.rows])
    figures: dict[str, dict | float] = {}
    for name, values in ways.items():
        by_task = {task: float(values[torch.from_numpy(tags == task)].mean()) for task in TASKS if (tags == task).any()}
        figures[name] = {task: round(v, 4) for task, v in by_task.items()} | {"overall": round(float(np.mean(list(by_task.values()))), 4)}
    base, reached, most = (figures[name]["overall"] for name in ways)
    return figures | {SHARE: round((reached - base) / (most - base), 4) if most > base else float("nan")}
