"""What the judge says of the rewards: AUC and best of 32 on generated images of held-out prompts, written into each reward's card.

The images are made once and kept in the run folder; a reward is measured on exactly the images of every other. Settings are chosen on
validation; nothing learns from these verdicts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from diffalign.shapes import prompts
from diffalign.shapes.train import card
from diffalign.shapes.train.judged import Judged, from_pipeline, make_judged
from diffalign.shapes.train.rewards_auc import AUC_NOTE, Score, auc_figures, best_of_figures, score_groups

SAMPLES = 32  # one-step images of each prompt
BASE_SAMPLES, BASE_STEPS, BASE_GUIDANCE = 8, 10, 3.0  # images of `shapes` of each prompt
SEEDS = {"validation": 71, "test": 72}


def one_step_images(run: Path, turbo: StableDiffusionPipeline, split: str, per_task: int = prompts.PROMPTS_PER_TASK) -> Judged:
    """SAMPLES images of `shapes-turbo` for every prompt of a split."""
    folder = run / "judged" / f"{turbo_name(turbo)}-{split}"
    rows = prompts.metadata(split, per_task=per_task)
    return make_judged(folder, rows, SAMPLES, from_pipeline(turbo, 1, (0.0,)), SEEDS[split], f"one-step images, {split}")


def base_images(run: Path, base: StableDiffusionPipeline, split: str, per_task: int = prompts.PROMPTS_PER_TASK) -> Judged:
    """BASE_SAMPLES images of `shapes` for every prompt of a split."""
    folder = run / "judged" / f"{turbo_name(base)}-{split}"
    rows = prompts.metadata(split, per_task=per_task)
    maker = from_pipeline(base, BASE_STEPS, (BASE_GUIDANCE,))
    return make_judged(folder, rows, BASE_SAMPLES, maker, SEEDS[split] + 2, f"images of shapes, {split}")


def turbo_name(pipeline: StableDiffusionPipeline) -> str:
    """The folder name of a pipeline, for the images it makes."""
    return Path(pipeline.config._name_or_path).name or "pipeline"


def measured(score: Score, judged: Judged) -> dict[str, Any]:
    """A reward's AUC figures on these images, and its best of n."""
    scores = score_groups(score, judged)
    return {"AUC": auc_figures(scores, judged), f"best of {judged.right.shape[1]}": best_of_figures(scores, judged)}


def add_to_card(folder: Path, section: str, figures: dict[str, Any], note: str = AUC_NOTE) -> None:
    """Put a section of figures into a card that stands already, replacing an earlier one of that name.

    Raises FileNotFoundError where there is no card: the stage that trains the model writes it.
    """
    path = folder / "card.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `python -m diffalign.shapes.train {folder.name}` first")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["figures"][section] = figures
    content["notes"] = [*(n for n in content["notes"] if n != note), note]
    card.replace_card(folder, content)


def batched(score: Score, batch: int = 256) -> Score:
    """A score that is computed `batch` images at a time and without gradients."""

    @torch.no_grad()
    def whole(images, texts):
        parts = [score(images[i : i + batch], texts[i : i + batch]) for i in range(0, len(texts), batch)]
        return torch.cat(parts).float().cpu()

    return whole
