"""`shapes-aesthetic`: a small head on the patch features of the frozen shapes-clip, taught a stated notion of composition.

The notion, 0 (worst) to 10 (best), whatever the prompt:

    10 (0.35 balance + 0.2 margin + 0.2 evenness + 0.25 cleanness) presence

balance: 1 - d / 20 with d the distance in pixels of the centre of visual mass from the image's centre, things weighing by their area.
margin: the least distance of a thing's box to the edge, 8 pixels or more counting as 1. evenness: smallest radius over largest, 0.7 and
below counting as 0. cleanness: 1 - the strength of the damage done to the picture. All are cut to [0, 1]. presence is 1, or 0 for an
empty ground or a ruined picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.shapes.captions import draw_scene
from diffalign.shapes.scenes import RING_HOLE, SIZE, Scene, Thing, outline, render
from diffalign.shapes.train import card, loop
from diffalign.shapes.train.rewards_clip import normalise
from diffalign.shapes.train.rewards_convert import save_half
from diffalign.shapes.train.rewards_images import ruin
from diffalign.shapes.train.rewards_report import EVALUATION_SEED, SPLITS, held_out_scene
from diffalign.shapes.train.rewards_votes import DAMAGES, damaged, shrunk

CONFIG = loop.LoopConfig(steps=2500, lr=2e-3, seed=23, warmup=100, ema_decay=0.995, weight_decay=0.01, save_every=500)
PICTURES = 8_000
BATCH = 128
EVALUATED = 1_000
BALANCE, MARGIN, EVENNESS, CLEANNESS = 0.35, 0.2, 0.2, 0.25
WORTHLESS = 0.06  # share of pictures with an empty ground or ruined
CHANNELS, HIDDEN = 8, 64  # of the head


def area(thing: Thing) -> float:
    """Of the drawn thing in square pixels (shoelace formula on its outline)."""
    x, y = outline(thing.shape).T
    inside = 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))
    if thing.shape == "ring":
        inside *= 1 - RING_HOLE**2
    return inside * thing.radius**2


def composition(things: Sequence[Thing], damage: float = 0.0) -> float:
    """The score of the module's docstring, in [0, 10]; 0 where there is nothing."""
    if not things:
        return 0.0
    weights = np.array([area(t) for t in things])
    centre = (weights[:, None] * np.array([(t.x, t.y) for t in things])).sum(axis=0) / weights.sum()
    balance = 1 - float(np.hypot(*(centre - SIZE / 2))) / 20
    margin = min(min(t.box[0], t.box[1], SIZE - t.box[2], SIZE - t.box[3]) for t in things) / 8
    radii = [t.radius for t in things]
    evenness = (min(radii) / max(radii) - 0.7) / 0.3
    terms = [(BALANCE, balance), (MARGIN, margin), (EVENNESS, evenness), (CLEANNESS, 1 - damage)]
    return 10 * sum(weight * min(max(value, 0.0), 1.0) for weight, value in terms)


def draw_pictures(count: int, seed: int, split: str = "train") -> tuple[UInt8[Tensor, "n h w 3"], Float[Tensor, " n"]]:
    """`count` pictures and their composition; half of them damaged, some shrunk, a few worthless."""
    rng = np.random.default_rng([seed, 9, SPLITS.index(split)])
    generator = torch.Generator().manual_seed(seed * 31 + SPLITS.index(split))
    images, values = [], []
    other = torch.from_numpy(render(draw_scene(rng)))
    for _ in tqdm(range(count), desc=f"drawing {split} pictures", mininterval=5):
        scene = held_out_scene(rng, split)
        if rng.random() < 0.3:
            scene = shrunk(scene, rng.uniform(0.7, 1.0))
        image, value = torch.from_numpy(render(scene)), composition(scene.things)
        if rng.random() < WORTHLESS:
            pair = torch.stack([image, other]).permute(0, 3, 1, 2).float() / 255
            spoilt = (ruin(pair, generator)[0] * 255).round().byte().permute(1, 2, 0)
            image, value = torch.from_numpy(render(Scene(()))) if rng.random() < 0.4 else spoilt, 0.0
        elif rng.random() < 0.5:
            damage = rng.uniform(0.0, 1.0)
            image = damaged(image, DAMAGES[rng.integers(len(DAMAGES))], damage, other, generator)
            value = composition(scene.things, damage)
        images.append(image)
        values.append(value)
        other = image
    return torch.stack(images), torch.tensor(values, dtype=torch.float32)


def build_head(width: int, patches: int, channels: int = CHANNELS, hidden: int = HIDDEN) -> nn.Sequential:
    """Patch features "b p width" -> "b 1": a few channels of each patch, so that places count, then two layers."""
    return nn.Sequential(
        nn.Linear(width, channels), nn.GELU(), nn.Flatten(), nn.Linear(channels * patches, hidden), nn.GELU(), nn.Linear(hidden, 1)
    )


def load_tower(clip_folder: Path) -> nn.Module:
    """shapes-clip's frozen image tower, set to return (embedding, patch features)."""
    layout = json.loads((clip_folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    model = open_clip.CLIP(**layout)
    model.load_state_dict({name: t.float() for name, t in load_file(clip_folder / "model.safetensors").items()})
    model.visual.output_tokens = True
    return model.visual.requires_grad_(False).eval()


@torch.no_grad()
def patch_features(tower: nn.Module, images: UInt8[Tensor, "n h w 3"], device: str) -> Float[Tensor, "n p d"]:
    """On the CPU, in half precision: they are kept for all pictures."""
    parts = [tower(normalise(some.to(device).permute(0, 3, 1, 2).float() / 255))[1].cpu().half() for some in images.split(256)]
    return torch.cat(parts)


def correlation(predicted: np.ndarray, true: np.ndarray, seed: int, resamples: int = 500) -> dict[str, float]:
    """Spearman's correlation with a 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(len(true), size=len(true)) for _ in range(resamples)]
    low, high = np.quantile([spearmanr(predicted[i], true[i]).statistic for i in drawn], [0.025, 0.975])
    value = spearmanr(predicted, true).statistic
    return {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": len(true)}


def train_aesthetic(
    run: Path,
    clip_folder: Path,
    folder: Path,
    config: loop.LoopConfig = CONFIG,
    pictures: int = PICTURES,
    device: str = "cpu",
    command: str = "python -m diffalign.shapes.train shapes-aesthetic",
    evaluated: int = EVALUATED,
) -> Path:
    """Train (or resume from `run`) and write `folder`: head.safetensors (float16), config.json, card. The tower stays in `clip_folder`."""
    torch.manual_seed(config.seed)
    tower = load_tower(clip_folder).to(device)
    images, values = draw_pictures(pictures, config.seed)
    features = patch_features(tower, images, device)
    head = build_head(features.shape[2], features.shape[1]).to(device)
    nn.init.constant_(head[-1].bias, values.mean().item())
    trainee = loop.Trainee({"head": head}, config, run / "aesthetic.safetensors")

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(values), (BATCH,), generator=generator)
        predicted = head(features[index].float().to(device)).squeeze(1)
        loss = F.mse_loss(predicted / 10, values[index].to(device) / 10)
        return loss, {"error": (predicted - values[index].to(device)).abs().mean().item()}

    loop.train(trainee, loss_of, "shapes-aesthetic")
    trainee.use_average()
    folder.mkdir(parents=True, exist_ok=True)
    save_half(head.eval().state_dict(), folder / "head.safetensors")
    layout = {"features": "shapes-clip", "width": features.shape[2], "patches": features.shape[1], "channels": CHANNELS, "hidden": HIDDEN}
    (folder / "config.json").write_text(json.dumps(layout, indent=2) + "\n", encoding="utf-8")
    figures = {}
    for split in SPLITS:
        shown, true = draw_pictures(evaluated, config.seed + EVALUATION_SEED, split)
        with torch.no_grad():
            predicted = head(patch_features(tower, shown, device).float().to(device)).squeeze(1).cpu()
        error = (predicted - true).abs().mean().item()
        figures[split] = {"Spearman correlation": correlation(predicted.numpy(), true.numpy(), config.seed), "mean error": round(error, 3)}
    card.write_card(
        folder,
        title="shapes-aesthetic",
        command=command,
        config=config,
        seconds=trainee.seconds,
        figures=figures,
        data={"pictures": pictures, "batch": BATCH},
        device=device,
        notes=[
            "A head on the patch features of shapes-clip that scores composition from 0 to 10, whatever the prompt.",
            f"Composition: 10 x ({BALANCE} balance + {MARGIN} margin + {EVENNESS} evenness + {CLEANNESS} cleanness), 0 for an empty or"
            " ruined picture; the terms are defined in diffalign/shapes/train/rewards_aesthetic.py.",
        ],
    )
    return folder
