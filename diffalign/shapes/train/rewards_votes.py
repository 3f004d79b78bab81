"""Simulated pairwise votes: two pictures for one prompt, an annotator with a stated utility, Bradley-Terry noise and lapses.

The utility of a picture x for a prompt p, in nats of log-odds:

    u(x, p) = 3 [p is true of the scene] + 1.5 (1 - damage) + 0.75 purity + 0.75 size - 0.75 extra

damage in [0, 1] is the strength of noise, blotches, blur or a second picture shining through; purity in [0, 1] is what is left of the
colours' distance from the ground; size in [0, 1] is the mean radius, 0 at 6 pixels, 1 at the largest; extra counts the things that the
prompt does not name. P(a beats b) = LAPSE / 2 + (1 - LAPSE) sigmoid(u(a) - u(b)): in LAPSE of the votes the annotator does not look.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from diffalign.shapes.captions import draw_scene, long_caption, short_caption
from diffalign.shapes.scenes import GROUND, RADIUS_RANGES, Scene, render
from diffalign.shapes.train import rewards_scenes as worlds
from diffalign.shapes.train.rewards_images import blur
from diffalign.shapes.train.rewards_report import SPLITS, held_out_scene

FAITHFUL, CLEAN, PURE, LARGE, EXTRA = 3.0, 1.5, 0.75, 0.75, 0.75
LAPSE = 0.05
VOTES = 2  # annotators per training pair; the label is their mean
SMALLEST = 6.0  # pixels; radius at which `size` is 0
LARGEST = max(high for _, high in RADIUS_RANGES.values())  # and at which it is 1
SAME, TWIN = 0.55, 0.3  # shares of pictures of the prompt's own scene, and of a scene that differs in one respect; the rest is unrelated
DAMAGES = ("noise", "blotches", "blur", "ghost")


@dataclass
class Votes:
    """Pairs of pictures ("n 2 h w 3"), the prompt of each pair, and the true probability that the first one wins."""

    images: UInt8[Tensor, "n 2 h w 3"]
    prompts: list[str]
    probability: Float[Tensor, " n"]

    def cast(self, generator: torch.Generator, voters: int) -> Float[Tensor, " n"]:
        """The share of `voters` independent annotators who prefer the first picture."""
        draws = torch.rand(voters, len(self.probability), generator=generator)
        return (draws < self.probability).float().mean(dim=0)

    @property
    def ceiling(self) -> float:
        """The expected accuracy of the best possible predictor of a single vote."""
        return torch.maximum(self.probability, 1 - self.probability).mean().item()


def damaged(image: UInt8[Tensor, "h w 3"], kind: str, strength: float, other: UInt8[Tensor, "h w 3"], generator: torch.Generator) -> Tensor:
    """A picture with one damage of a strength in [0, 1], as "h w 3" uint8."""
    x = image.permute(2, 0, 1).float().unsqueeze(0) / 255
    side = x.shape[-1]
    if kind == "noise":
        x = x + 0.2 * strength * torch.randn(x.shape, generator=generator)
    elif kind == "blotches":
        coarse = torch.randn(1, 3, side // 8, side // 8, generator=generator)
        x = x + 0.2 * strength * F.interpolate(coarse, size=side, mode="bilinear")
    elif kind == "blur":
        x = x.lerp(blur(blur(blur(x))), strength)
    elif kind == "ghost":
        x = x.lerp(other.permute(2, 0, 1).float().unsqueeze(0) / 255, 0.5 * strength)
    else:
        raise ValueError(f"kind must be one of {', '.join(DAMAGES)}; got {kind!r}")
    return (x[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)


def washed_out(image: UInt8[Tensor, "h w 3"], purity: float) -> UInt8[Tensor, "h w 3"]:
    """Every pixel brought nearer to the ground, `purity` of the distance left."""
    ground = torch.tensor(GROUND, dtype=torch.float32)
    return (ground + purity * (image.float() - ground)).round().byte()


def shrunk(scene: Scene, factor: float) -> Scene:
    return Scene(tuple(replace(t, radius=t.radius * factor) for t in scene.things))


def utility(scene: Scene, faithful: bool, damage: float, purity: float, claim: worlds.Claim | None) -> float:
    """u(x, p) of the module's docstring. A prompt whose claim is None (a long caption) names everything in its scene."""
    radius = float(np.mean([t.radius for t in scene.things]))
    size = min(max((radius - SMALLEST) / (LARGEST - SMALLEST), 0.0), 1.0)
    named = len(scene.things) if claim is None else claim.count + (claim.second is not None)
    extra = max(len(scene.things) - named, 0)
    return FAITHFUL * faithful + CLEAN * (1 - damage) + PURE * purity + LARGE * size - EXTRA * extra


def draw_votes(count: int, seed: int, split: str = "train", long_share: float = 0.1) -> Votes:
    """`count` pairs of pictures for prompts of a split's scenes, with the annotator's true preference."""
    rng = np.random.default_rng([seed, 7, SPLITS.index(split)])
    generator = torch.Generator().manual_seed(seed * 31 + SPLITS.index(split))
    images, prompts, probability = [], [], []
    other = torch.from_numpy(render(draw_scene(rng)))
    for _ in tqdm(range(count), desc=f"drawing {split} votes", mininterval=5):
        scene = held_out_scene(rng, split)
        if len(scene.things) <= 2 and rng.random() < long_share:
            prompt, claim = long_caption(rng, scene), None
        else:
            prompt = short_caption(rng, scene)
            claim = worlds.read_claim(prompt)
        pair, worth = [], []
        for _ in range(2):
            image, value = _candidate(rng, generator, scene, claim, split, other)
            other = image
            pair.append(image)
            worth.append(value)
        images.append(torch.stack(pair))
        prompts.append(prompt)
        probability.append(LAPSE / 2 + (1 - LAPSE) / (1 + np.exp(worth[1] - worth[0])))
    return Votes(torch.stack(images), prompts, torch.tensor(probability, dtype=torch.float32))


def _candidate(
    rng: np.random.Generator, generator: torch.Generator, scene: Scene, claim: worlds.Claim | None, split: str, other: Tensor
) -> tuple[Tensor, float]:
    """One picture for the prompt, and its utility."""
    origin = rng.random()
    shown = scene
    if origin >= SAME + TWIN:
        shown = draw_scene(rng)
    elif origin >= SAME:
        found = worlds.twin(rng, scene, train_only=split == "train")
        shown = found[0] if found else scene
    faithful = shown is scene
    if claim is not None:
        faithful = bool(worlds.holds(worlds.tabulate([shown]), torch.tensor([claim.encode()])))
    if rng.random() < 0.3:
        shown = shrunk(shown, rng.uniform(0.7, 1.0))
    image = torch.from_numpy(render(shown))
    purity = rng.uniform(0.4, 1.0) if rng.random() < 0.25 else 1.0
    damage = rng.uniform(0.0, 1.0) if rng.random() < 0.5 else 0.0
    image = washed_out(image, purity)
    if damage:
        image = damaged(image, DAMAGES[rng.integers(len(DAMAGES))], damage, other, generator)
    return image, utility(shown, faithful, damage, purity, claim)
