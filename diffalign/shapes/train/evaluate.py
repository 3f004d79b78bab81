"""What the cards report of a generator: judge accuracy on a split's prompts, and the measures beside the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from diffalign.rules import TASKS
from diffalign.shapes import measures, prompts
from diffalign.shapes.detector import judge_images
from diffalign.shapes.train import base, card, data, rewards_preference
from diffalign.shapes.train import rewards_scenes as worlds
from diffalign.shapes.train.judged import eight_bit
from diffalign.shapes.train.rewards_clip import normalise

Pipeline = StableDiffusionPipeline | StableDiffusion3Pipeline
Draw = Callable[[list[str], int], UInt8[Tensor, "n h w 3"]]  # prompts and a seed -> an image each
Features = Callable[[UInt8[Tensor, "n h w 3"]], Float[Tensor, "n d"]]
GUIDANCES = (2.0, 3.0, 4.5, 6.0)
MEASURES_NOTE = (
    "Beside the judge: `test` images also give the colour deviation inside a thing (RMS distance in RGB of its inner pixels from their"
    " mean, 8-bit units) and the overlap of its outline with the template of its shape, beside those of drawn scenes that went through the"
    " autoencoder. The other measures are of images for captions of new scenes of training's kind, beside those scenes: Frechet distance"
    " (to other new scenes, as many) and diversity (of images of one caption, beside training scenes that were captioned so) on the unit"
    " embeddings of the image tower of `shapes-clip`, which no generator was trained with; near-duplicates: a training scene lies within"
    f" {measures.NEAR} 8-bit units (RMS over cells of {measures.CELL} x {measures.CELL} pixels), about one pixel's shift."
)


@dataclass(frozen=True)
class MeasureConfig:
    """What the measures beside the judge look at."""

    scenes: int = 1000  # new ones, of training's kind; a caption of each is a prompt
    searched: int = 30_000  # of the base's training scenes, for near-duplicates and for what captions were said of
    prompts: int = 64  # captions of which several images are drawn, for diversity
    group: int = 8  # images of each
    seed: int = 91  # of the new scenes; not that of a training


def drawer(pipeline: Pipeline, *, steps: int, guidance: float, batch: int = 64, call: Mapping[str, int] | None = None) -> Draw:
    """Draw with a pipeline, on its device; image i starts from noise of seed (seed, i), the same on every device.

    call: further options of the pipeline's call.
    """
    pipeline.set_progress_bar_config(disable=True)

    def draw(texts: list[str], seed: int) -> UInt8[Tensor, "n h w 3"]:
        parts = []
        for start in tqdm(range(0, len(texts), batch), desc=f"drawing, {steps} steps, guidance {guidance}", mininterval=5):
            some = texts[start : start + batch]
            generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(some))]
            options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt", **(call or {})}
            parts.append(eight_bit(pipeline(some, generator=generators, **options).images.float().cpu()))
        return torch.cat(parts)

    return draw


def counted(images: UInt8[Tensor, "n h w 3"], rows: list[dict]) -> dict[str, tuple[int, int]]:
    """(correct, total) per task, of one image of each row."""
    counts = {task: [0, 0] for task in TASKS}
    for row, verdict in zip(rows, judge_images(images.numpy(), rows), strict=True):
        counts[row["tag"]][0] += verdict.correct
        counts[row["tag"]][1] += 1
    return {task: (correct, total) for task, (correct, total) in counts.items()}


def judge_accuracy(
    pipeline: Pipeline,
    *,
    steps: int,
    guidance: float,
    split: str = "test",
    per_task: int = prompts.PROMPTS_PER_TASK,
    seed: int = 0,
    call: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, int]]:
    """(correct, total) per task, for one image of each of a split's prompts."""
    rows = prompts.metadata(split, per_task=per_task)
    draw = drawer(pipeline, steps=steps, guidance=guidance, call=call)
    return counted(draw([row["prompt"] for row in rows], seed), rows)


def overall(counts: dict[str, tuple[int, int]]) -> float:
    """The unweighted mean of the tasks' accuracies, as in GenEval."""
    return float(np.mean([correct / total for correct, total in counts.values() if total]))


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


def clip_features(folder: Path, device: str) -> Features:
    """Unit embeddings of the image tower of `shapes-clip`. Raises FileNotFoundError where it is not trained yet."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no shapes-clip, whose features the cards need; run the stage shapes-clip first")
    model = rewards_preference.load_clip(folder).to(device).eval()

    @torch.no_grad()
    def features(images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n d"]:
        pixels = (normalise(some.to(device).permute(0, 3, 1, 2).float() / 255) for some in images.split(256))
        return F.normalize(torch.cat([model.get_image_features(pixel_values=some).pooler_output.cpu() for some in pixels]), dim=1)

    return features


@torch.no_grad()
def decoded(vae: AutoencoderKL, images: UInt8[Tensor, "n h w 3"]) -> UInt8[Tensor, "n h w 3"]:
    """What the autoencoder makes of drawn scenes: the cleanest pictures that a generator of its latents could draw."""
    latents = base.encode_images(vae, images, str(vae.device)) / vae.config.scaling_factor
    parts = [eight_bit((vae.decode(some.to(vae.device)).sample.float().cpu() / 2 + 0.5).clamp(0, 1)) for some in latents.split(256)]
    return torch.cat(parts)


def generator_figures(
    pipeline: Pipeline, draw: Draw, features: Features, rows: list[dict], training: data.ShapesData, settings: MeasureConfig
) -> dict[str, object]:
    """Judge accuracy and finish on the rows' prompts, and the measures on captions of new scenes.

    training: scenes as the generator saw them. What is drawn serves every measure it can.
    """
    images = draw([row["prompt"] for row in rows], 0)
    new, others = (data.draw(settings.scenes, settings.seed + k) for k in range(2))
    through = decoded(pipeline.vae, new.images)
    sets = {"generated": draw([captions[0] for captions in new.captions], 1), "decoded renders": through, "renders": new.images}
    reference = features(others.images)
    near = {name: round(measures.near_duplicates(sets[name], training.images), 4) for name in ("generated", "renders")}
    return {
        "test": figures(counted(images, rows)),
        "finish": finish_figures(measures.finish(images), measures.finish(through)),
        "Frechet distance": {name: round(measures.frechet_distance(features(these), reference), 4) for name, these in sets.items()},
        "near-duplicates": near | {"searched scenes": len(training.images)},
        "diversity": diversity_figures(draw, features, training, settings),
    }


def finish_figures(mine: measures.Finish, theirs: measures.Finish) -> dict[str, object]:
    """Colour deviation and template overlap of generated images and of decoded renders, and the ratios; none without a thing."""
    section: dict[str, object] = {"things": mine.things}
    named = {"colour deviation": (mine.deviation, theirs.deviation), "template overlap": (mine.overlap, theirs.overlap)}
    for name, (own, other) in named.items():
        if own is not None and other is not None:
            section[name] = {"generated": round(own, 3), "decoded renders": round(other, 3), "ratio": round(own / other, 3)}
    return section


def shared_captions(training: data.ShapesData, group: int) -> dict[str, list[int]]:
    """What was said, by a first caption without its carrier, of at least `group` training scenes -> the first `group` of them."""
    found: dict[str, list[int]] = {}
    for i, captions in enumerate(training.captions):
        found.setdefault(worlds.split_carrier(captions[0])[1], []).append(i)
    return {body: those[:group] for body, those in found.items() if len(those) >= group}


def diversity_figures(draw: Draw, features: Features, training: data.ShapesData, settings: MeasureConfig) -> dict[str, object]:
    """Pairwise distance and Vendi score of images of one caption, and of as many training scenes that were captioned so.

    Of as many captions as settings.prompts, or as there are; their number is among the figures.
    """
    shared = shared_captions(training, settings.group)
    order = np.random.default_rng(settings.seed).permutation(len(shared))[: settings.prompts]
    chosen = [list(shared)[i] for i in order]
    section: dict[str, object] = {"captions": len(chosen), "images of each": settings.group}
    if not chosen:
        return section
    sets = {
        "generated": draw([body for body in chosen for _ in range(settings.group)], 2),
        "training scenes": training.images[torch.tensor([shared[body] for body in chosen]).flatten()],
    }
    grouped = {name: features(images).unflatten(0, (len(chosen), settings.group)) for name, images in sets.items()}
    distance = {name: round(measures.pairwise_distance(f).mean().item(), 4) for name, f in grouped.items()}
    vendi = {name: round(float(np.mean([measures.vendi_score(one) for one in f])), 3) for name, f in grouped.items()}
    return section | {"pairwise distance": distance, "Vendi score": vendi}
