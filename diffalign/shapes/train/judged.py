"""Images that the embedded generators made for a prompt, several each, with the judge's verdicts: to learn from, and to measure with.

Who may learn from a verdict: the simulated annotator of `shapes-reward` sees `annotator_rows` alone. These are made of training
combinations, and none of them is a prompt of the validation or the test split, under any carrier.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffalign.shapes import prompts
from diffalign.shapes.captions import draw_scene
from diffalign.shapes.detector import judge_images
from diffalign.shapes.train import rewards_scenes as worlds
from diffalign.shapes.train.rewards_captions import true_caption

PART = 16  # prompts in one file
TASK_SHARES = {"two_object": 0.2, "counting": 0.2, "colors": 0.12, "position": 0.3, "color_attr": 0.18}
Maker = Callable[[list[str], torch.Generator], Float[Tensor, "n 3 h w"]]


@dataclass
class Judged:
    """g images of each of n prompts, and whether the judge called them correct."""

    images: UInt8[Tensor, "n g h w 3"]
    right: Bool[Tensor, "n g"]
    rows: list[dict]

    @property
    def mixed(self) -> Bool[Tensor, " n"]:
        """Prompts with a right and a wrong image: only these say anything about order."""
        return self.right.any(dim=1) & ~self.right.all(dim=1)


def joined(parts: Sequence[Judged]) -> Judged:
    """Several of equal group size as one."""
    return Judged(torch.cat([p.images for p in parts]), torch.cat([p.right for p in parts]), [row for p in parts for row in p.rows])


@cache
def reserved_bodies() -> frozenset[str]:
    """What validation and test prompts say, without their carriers."""
    return frozenset(worlds.split_carrier(p)[1] for split in ("validation", "test") for p in prompts.prompts(split))


def annotator_rows(count: int, seed: int) -> list[dict]:
    """`count` prompts for the simulated annotator, in GenEval's schema: what training scenes can be said to show, tasks by TASK_SHARES.

    Plain single objects are all in the test split, so there are none.
    """
    rng = np.random.default_rng([seed, 17])
    wanted = list(rng.choice(list(TASK_SHARES), size=count, p=list(TASK_SHARES.values())))
    found: list[dict] = []
    for task in wanted:
        while True:
            scene = draw_scene(rng)
            row = row_of(true_caption(rng, scene))
            if row["tag"] == task and worlds.split_carrier(row["prompt"])[1] not in reserved_bodies():
                found.append(row)
                break
    return found


def row_of(caption: str) -> dict:
    """A short caption as a row of GenEval's metadata. Raises ValueError for a caption outside the short ones' grammar."""
    claim = worlds.read_claim(caption)
    first = _clause(claim.first, claim.count)
    if claim.count > 1:
        exclude = [{"class": claim.first[0], "count": claim.count + 1}]
        return {"tag": "counting", "include": [first], "exclude": exclude, "prompt": caption}
    if claim.second is None:
        return {"tag": "colors" if claim.first[1] else "single_object", "include": [first], "prompt": caption}
    second = _clause(claim.second, 1)
    if claim.relation:
        return {"tag": "position", "include": [second, first | {"position": [claim.relation, 0]}], "prompt": caption}
    tag = "color_attr" if claim.first[1] and claim.second[1] else "two_object"
    return {"tag": tag, "include": [first, second], "prompt": caption}


def _clause(kind: worlds.Kind, count: int) -> dict:
    return {"class": kind[0], "count": count} | ({"color": kind[1]} if kind[1] else {})


def from_pipeline(pipeline: StableDiffusionPipeline, steps: int, guidances: Sequence[float]) -> Maker:
    """A maker that shares each call's images among the guidance scales in turn."""
    pipeline.set_progress_bar_config(disable=True)

    def make(texts: list[str], generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
        shape = (len(texts), pipeline.unet.config.in_channels, pipeline.unet.config.sample_size, pipeline.unet.config.sample_size)
        noise = torch.randn(shape, generator=generator)
        images = noise.new_empty(0)
        order: list[int] = []
        for k, guidance in enumerate(guidances):
            mine = list(range(k, len(texts), len(guidances)))
            if not mine:
                continue
            out = (
                pipeline(
                    [texts[i] for i in mine],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    latents=noise[mine].to(pipeline.device),
                    output_type="pt",
                )
                .images.float()
                .cpu()
            )
            images = torch.cat([images, out]) if len(images) else out
            order += mine
        return images[torch.tensor(order).argsort()]

    return make


def make_judged(folder: Path, rows: list[dict], group: int, make: Maker, seed: int, label: str) -> Judged:
    """`group` images of every row, judged; kept in `folder` in parts of PART prompts, so a stopped run goes on where it was.

    Part k depends on (seed, k) alone. Raises ValueError where the folder holds images of other prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for k in tqdm(range(0, len(rows), PART), desc=label, mininterval=5):
        some, path = rows[k : k + PART], folder / f"{k // PART:04d}.safetensors"
        said = _codes([row["prompt"] for row in some])
        if not path.exists():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + k)
            images = eight_bit(make([row["prompt"] for row in some for _ in range(group)], generator))
            verdicts = judge_images(images.numpy(), [row for row in some for _ in range(group)])
            right = torch.tensor([v.correct for v in verdicts])
            parts = {"images": images.unflatten(0, (len(some), group)), "right": right.view(len(some), group), "prompts": said}
            save_file(parts, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        stored = load_file(path)
        if not torch.equal(stored["prompts"], said) or stored["right"].shape[1] != group:
            raise ValueError(f"{path} holds images of other prompts or another number of them; remove {folder} and run again")
        done.append(Judged(stored["images"], stored["right"], some))
    return joined(done)


def eight_bit(images: Float[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n h w 3"]:
    return (images.detach() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def _codes(texts: list[str]) -> UInt8[Tensor, "n 128"]:
    """Prompts as bytes, so that a file of images says whose they are."""
    return torch.stack([torch.frombuffer(bytearray(text.encode()[:128].ljust(128)), dtype=torch.uint8) for text in texts])
