"""What the judge says of the rewards: AUC and best of 32 on generated images of held-out prompts, written into each reward's card.

The images are made once and kept in the run folder; a reward is measured on exactly the images of every other. Settings are chosen on
validation; nothing learns from these verdicts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from diffalign.rules import TASKS
from diffalign.shapes import prompts
from diffalign.shapes.train import card, export, loop, rewards_captioner, rewards_captioner_tune, rewards_preference, rewards_watch
from diffalign.shapes.train.judged import Judged, from_pipeline, make_judged
from diffalign.shapes.train.rewards_auc import AUC_NOTE, SHARE, Score, auc_figures, best_of_figures, score_groups

SAMPLES = 32  # one-step images of each prompt
BASE_SAMPLES, BASE_STEPS, BASE_GUIDANCE = 4, 10, 3.0  # images of `shapes` of each prompt
SEEDS = {"validation": 71, "test": 72}


def one_step_images(run: Path, turbo: StableDiffusionPipeline, split: str, per_task: int = prompts.PROMPTS_PER_TASK) -> Judged:
    """SAMPLES images of `shapes-turbo` for every prompt of a split."""
    folder = run / "judged" / f"turbo-{split}"
    rows = prompts.metadata(split, per_task=per_task)
    return make_judged(folder, rows, SAMPLES, from_pipeline(turbo, 1, (0.0,)), SEEDS[split], f"one-step images, {split}")


def base_images(run: Path, base: StableDiffusionPipeline, split: str, per_task: int = prompts.PROMPTS_PER_TASK) -> Judged:
    """BASE_SAMPLES images of `shapes` for every prompt of a split."""
    folder = run / "judged" / f"base-{split}"
    rows = prompts.metadata(split, per_task=per_task)
    maker = from_pipeline(base, BASE_STEPS, (BASE_GUIDANCE,))
    return make_judged(folder, rows, BASE_SAMPLES, maker, SEEDS[split] + 2, f"images of shapes, {split}")


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


def on_held_out(score: Score, run: Path, weights: Path, device: str, per_task: int = prompts.PROMPTS_PER_TASK) -> dict[str, Any]:
    """A reward's figures on generated images of held-out prompts: one-step images of both splits, and those of `shapes` of the test."""
    turbo, base = (export.load_pipeline(weights / name, device) for name in ("shapes-turbo", "shapes"))
    score = batched(score)
    return {
        "test, shapes-turbo": measured(score, one_step_images(run, turbo, "test", per_task)),
        "test, shapes": measured(score, base_images(run, base, "test", per_task)),
        "validation, shapes-turbo": measured(score, one_step_images(run, turbo, "validation", per_task)),
    }


def climb_figures(run: Path) -> dict[str, dict[str, float]]:
    """Judge accuracy along the climbs of training prompts that each round began with: were they hacked, it would fall."""
    figures = {}
    for folder in sorted((run / "reward_images").glob("climbed*")):
        right = torch.cat([load_file(part)["right"] for part in sorted(folder.glob("*.safetensors"))])
        kept = rewards_captioner_tune.CLIMB.kept
        along = right.view(-1, len(kept)).double().mean(dim=0).tolist()
        figures[f"before round {folder.name.removeprefix('climbed')}"] = {
            f"after {steps} steps": round(value, 4) for steps, value in zip(kept, along, strict=True)
        }
    return figures


def write_reward_card(
    run: Path,
    weights: Path,
    device: str,
    first: loop.LoopConfig,
    later: loop.LoopConfig,
    tune: rewards_captioner_tune.TuneConfig,
    scenes: int,
    per_task: int,
    flags: str,
) -> None:
    """Measure the finished `shapes-reward` and write its card.

    first, later, tune, scenes: what it was trained with. flags: what followed the stages on the command line.
    """
    folder = weights / "shapes-reward"
    model = rewards_captioner.load_captioner(folder).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    states = [run / "captioner.safetensors", *(run / f"reward_round{k}.safetensors" for k in range(tune.rounds))]
    score = rewards_captioner_tune.final_reward(model, tokenizer)
    figures = on_held_out(
        lambda images, texts: score(rewards_captioner_tune.as_pixels(images, device), texts), run, weights, device, per_task
    )
    figures["judge accuracy of climbs, train prompts"] = climb_figures(run)
    card.write_card(
        folder,
        title="shapes-reward",
        command="python -m diffalign.shapes.train captioner shapes-reward judge-shapes-reward" + flags,
        config=first,
        seconds=sum(loop.progress(state)[1] for state in states if state.is_file()),
        figures=figures,
        data={
            "scenes": scenes,
            "near copies": scenes,
            "rounds": f"{tune.rounds} of {later.steps} steps, learning rate {later.lr}",
            "votes flipped": rewards_captioner_tune.FLIPPED,
            **{k: str(v) for k, v in dataclasses.asdict(tune).items() if k not in ("captions", "rounds")},
        },
        device=device,
        notes=[
            "A captioner; score: log p(prompt | image) in nats, said either way round, without the end token. Taught on drawn scenes, then"
            " on pairs of generated images of one prompt with noisy votes, in rounds that add images found by climbing it.",
            f"The simulated annotator (votes, captions, marked regions) is the judge with {rewards_captioner_tune.FLIPPED:.0%} of its"
            " answers wrong, on prompts of training combinations that are in neither validation nor test under any carrier.",
            AUC_NOTE,
        ],
    )


def write_watch_card(
    run: Path,
    weights: Path,
    device: str,
    config: loop.LoopConfig,
    settings: rewards_watch.WatchConfig,
    per_task: int,
    flags: str,
) -> None:
    """Measure the finished `shapes-watch` and write its card; arguments as of `write_reward_card`."""
    folder = weights / "shapes-watch"
    score = rewards_watch.watch_scores(rewards_watch.load_watch(folder).to(device), CLIPTokenizer.from_pretrained(folder), device)
    card.write_card(
        folder,
        title="shapes-watch",
        command="python -m diffalign.shapes.train shapes-watch judge-shapes-watch" + flags,
        config=config,
        seconds=loop.progress(run / "watch.safetensors")[1],
        figures=on_held_out(score, run, weights, device, per_task),
        data={"scenes": settings.scenes, "near copies": settings.scenes, "votes flipped": rewards_watch.FLIPPED},
        device=device,
        notes=[
            "For watching only: nothing optimises it. A FiLM network (no transformer, no likelihood, no cosine) with a seed and votes of"
            " its own, taught on drawn scenes; score: log-odds that the prompt is true of the image.",
            AUC_NOTE,
        ],
    )


REWARDS = ("shapes-reward", "shapes-clip", "shapes-preference", "shapes-watch")


def auc_table(weights: Path, images: str = "test, shapes-turbo") -> str:
    """The cards' AUC by task and best of n as the Markdown table of docs/shapes.md, without rewards that are not judged yet."""
    lines = [f"| AUC | {' | '.join(task.replace('_', ' ') for task in TASKS)} | overall | best of {SAMPLES} | share |"]
    lines.append("|" + "---|" * (len(TASKS) + 4))
    for name in REWARDS:
        path = weights / name / "card.json"
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else {}
        found = figures.get("judged", figures).get(images)
        if found is None:
            continue
        best = found[f"best of {SAMPLES}"]
        values = [f"{found['AUC'][task]['value']:.2f}" for task in (*TASKS, "overall")]
        values += [f"{best['by the reward']['overall']:.3f}", f"{best[SHARE]:.0%}"]
        lines.append(f"| `{name}` | {' | '.join(values)} |")
    return "\n".join(lines)


def add_to_towers(run: Path, weights: Path, device: str, per_task: int = prompts.PROMPTS_PER_TASK) -> None:
    """Put the figures of `shapes-clip` and `shapes-preference` on the same images into their cards."""
    models = {
        "shapes-clip": rewards_preference.load_clip(weights / "shapes-clip"),
        "shapes-preference": CLIPModel.from_pretrained(weights / "shapes-preference", dtype=torch.float32),
    }
    for name, model in models.items():
        tokenizer = CLIPTokenizer.from_pretrained(weights / name)
        score = rewards_preference.preference_scores(model.to(device).eval(), tokenizer, device)  # of one order with cosines
        add_to_card(weights / name, "judged", on_held_out(score, run, weights, device, per_task))
