"""Judge accuracy of a generator on a split's prompts: what the cards report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from tqdm import tqdm

from diffalign.rules import TASKS
from diffalign.shapes import prompts
from diffalign.shapes.detector import judge_images
from diffalign.shapes.train import card

Pipeline = StableDiffusionPipeline | StableDiffusion3Pipeline


def judge_accuracy(
    pipeline: Pipeline,
    *,
    steps: int,
    guidance: float,
    split: str = "test",
    per_task: int = prompts.PROMPTS_PER_TASK,
    seed: int = 0,
    batch: int = 64,
    call: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, int]]:
    """(correct, total) per task, for one image a prompt; image i starts from noise of seed (seed, i).

    call: further options of the pipeline's call.
    """
    rows = prompts.metadata(split, per_task=per_task)
    counts = {task: [0, 0] for task in TASKS}
    pipeline.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(rows), batch), desc=f"judging {split}, {steps} steps, guidance {guidance}", mininterval=5):
        part = rows[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
        texts = [row["prompt"] for row in part]
        out = pipeline(texts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np", **(call or {}))
        images = out.images
        for row, verdict in zip(part, judge_images((images * 255).round().astype(np.uint8), part), strict=True):
            counts[row["tag"]][0] += verdict.correct
            counts[row["tag"]][1] += 1
    return {task: (correct, total) for task, (correct, total) in counts.items()}


def overall(counts: dict[str, tuple[int, int]]) -> float:
    """The unweighted mean of the tasks' accuracies, as in GenEval."""
    return float(np.mean([correct / total for correct, total in counts.values() if total]))


GUIDANCES = (2.0, 3.0, 4.5, 6.0)


def best_guidance(
    pipeline: Pipeline, steps: int, per_task: int = 24, call: Mapping[str, int] | None = None
) -> tuple[float, dict[str, float]]:
    """The guidance scale with the best overall accuracy on the validation split, and what each reached."""
    options = {"steps": steps, "split": "validation", "per_task": per_task, "call": call}
    reached = {str(g): overall(judge_accuracy(pipeline, guidance=g, **options)) for g in GUIDANCES}
    return float(max(reached, key=reached.__getitem__)), reached


def figures(counts: dict[str, tuple[int, int]]) -> dict[str, object]:
    """Per task the accuracy with its 95 % (Wilson) interval, and the overall mean: what a card shows."""
    return {task: card.interval(*pair) for task, pair in counts.items() if pair[1]} | {"overall": round(overall(counts), 4)}
