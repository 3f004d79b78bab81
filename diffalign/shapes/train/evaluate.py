"""Judge accuracy of a generator on a split's prompts: what the cards report."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from diffalign.benchmarks.geneval_rules import TASKS
from diffalign.shapes import prompts
from diffalign.shapes.detector import judge_images


def judge_accuracy(
    pipeline: StableDiffusionPipeline, *, steps: int, guidance: float, split: str = "test", per_task: int = 60, seed: int = 0, batch: int = 64
) -> dict[str, tuple[int, int]]:
    """(correct, total) per task, for one image a prompt; image i starts from noise of seed (seed, i)."""
    rows = prompts.metadata(split, per_task=per_task)
    counts = {task: [0, 0] for task in TASKS}
    pipeline.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(rows), batch), desc=f"judging {split}, {steps} steps, guidance {guidance}", mininterval=5):
        part = rows[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
        texts = [row["prompt"] for row in part]
        images = pipeline(texts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np").images
        for row, verdict in zip(part, judge_images((images * 255).round().astype(np.uint8), part), strict=True):
            counts[row["tag"]][0] += verdict.correct
            counts[row["tag"]][1] += 1
    return {task: (correct, total) for task, (correct, total) in counts.items()}


def overall(counts: dict[str, tuple[int, int]]) -> float:
    """The unweighted mean of the tasks' accuracies, as in GenEval."""
    return float(np.mean([correct / total for correct, total in counts.values() if total]))
