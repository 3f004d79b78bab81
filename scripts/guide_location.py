"""A location loss in Guide, on the multi-step shapes model: does position accuracy rise, at which cost, and is all else left alone?

    python scripts/guide_location.py --split validation --strength 0.15 0.3 --every 3      # how the setting was chosen
    python scripts/guide_location.py --split test --strength 0.3 --every 3 --out docs/results/guide_location.json

The loss is what a user with a differentiable detector would write: for "a ring left of a star" it looks for the outline of a ring in the
left half of the predicted image and for that of a star in the right half, colours unseen. The renderer draws the outlines; the judge,
which no method may see, compares outlines too, so what this shows is that a detector can place things, not that a learnt reward could.

    m = sigmoid((|x - ground| - 0.2) / 0.05) on 32 x 32 cells;  o_p = overlap of m with the outline at place p over the union nearby
    r = sum over the two things of  tau log sum_p exp(o_p / tau) sigmoid((side_p - 0.3) / 0.08),    tau = 0.05

For prompts without a relation it is constant, so nothing pulls them; the script says by how much their images differ from the plain ones
(by the rounding of our loop beside the stock one, if it is right).
Seconds are of the process, by one thread, so that a busy machine does not decide.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import diffalign
from diffalign.evaluation import machine
from diffalign.files import packaged_path, read_json, write_json
from diffalign.reports.statistics import paired_difference
from diffalign.shapes import prompts, scenes
from diffalign.shapes.detector import judge_images

SIDES = {"left of": (0, -1.0), "right of": (0, 1.0), "above": (1, -1.0), "below": (1, 1.0)}  # axis and direction of the first thing
PLACES = torch.tensor([(x, y) for y in range(12, 53, 4) for x in range(12, 53, 4)], dtype=torch.float32)
CELLS = torch.stack(torch.meshgrid(2 * torch.arange(32) + 0.5, 2 * torch.arange(32) + 0.5, indexing="xy"), -1).view(-1, 2)
NEARBY = (torch.cdist(PLACES, CELLS) < 15).float()
GROUND = torch.tensor(scenes.GROUND).view(1, 3, 1, 1) / 255
TAU = 0.05


@cache
def outlines(shape: str) -> Tensor:
    """Coverage of the 32 x 32 cells by a shape at every place, in two sizes: "places 2 1024"."""
    drawn = [[scenes.coverage(scenes.Thing(shape, "black", float(x), float(y), r)) for r in (10.5, 12.5)] for x, y in PLACES]
    return F.avg_pool2d(torch.tensor(np.array(drawn)), 2).flatten(2)


def overlap(seen: Tensor, shapes: Sequence[str]) -> Tensor:
    """o of every place, the better of the two sizes: "b places"."""
    drawn = torch.stack([outlines(shape) for shape in shapes])
    common = torch.einsum("bn,bpsn->bps", seen, drawn)
    nearby = torch.einsum("bn,pn->bp", seen, NEARBY)[..., None]
    return (common / (drawn.sum(-1) + nearby - common + 1)).amax(-1)


def placed(images: Tensor, texts: Sequence[str]) -> Tensor:
    """r of each image; 0 for a prompt without a relation."""
    known = [(i, *relation) for i, text in enumerate(texts) if (relation := relation_of(text))]
    score = 0 * images.sum(dim=(1, 2, 3))
    if not known:
        return score
    rows, first, joints, second = (list(column) for column in zip(*known, strict=True))
    distance = (images[rows] - GROUND).square().sum(1, keepdim=True).add(1e-6).sqrt()
    seen = F.avg_pool2d(torch.sigmoid((distance - 0.2) / 0.05), 2).flatten(1)
    axes, signs = zip(*(SIDES[joint] for joint in joints), strict=True)
    side = torch.tensor(signs)[:, None] * (PLACES[:, list(axes)].T - 32) / 32
    found = [
        TAU * torch.logsumexp(overlap(seen, shapes) / TAU + F.logsigmoid((way * side - 0.3) / 0.08), dim=1)
        for shapes, way in ((first, 1), (second, -1))
    ]
    return score.index_add(0, torch.tensor(rows), found[0] + found[1])


def relation_of(text: str) -> tuple[str, str, str] | None:
    """(first shape, relation, second shape) of a prompt that has them."""
    for joint in SIDES:
        first, found, second = text.partition(f" {joint} ")
        if found:
            return first.split()[-1], joint, second.split()[-1]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    parser.add_argument("--prompts", type=int, help="position prompts (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one image of every prompt for each")
    parser.add_argument("--others", type=int, default=2, help="prompts of each other task whose images are looked at")
    parser.add_argument("--strength", type=float, nargs="+", default=[0.3])
    parser.add_argument("--every", type=int, nargs="+", default=[3])
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--reward", action="store_true", help="guide by shapes-reward itself, too")
    parser.add_argument("--out", type=Path, default=Path("outputs/guide_location.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    pipe = diffalign.load_pipeline("shapes")
    pipe.set_progress_bar_config(disable=True)
    rows = prompts.metadata(args.split)
    position = [row for row in rows if row["tag"] == "position"][: args.prompts]
    items = [(row, 1000 * seed + i) for seed in args.seeds for i, row in enumerate(position)]
    plain, right, results = *images_of(pipe, None, items, args.batch_size), []
    arms: dict[str, Callable[..., Any]] = {"place": diffalign.Guide.by(placed).reward}
    if args.reward:
        arms["shapes-reward"] = diffalign.load_reward("shapes-reward")
    for name, reward in arms.items():
        for strength in args.strength:
            for every in args.every:
                method = diffalign.Guide(reward, budget=1, strength=strength, every=every)
                cost, after = images_of(pipe, method, items, args.batch_size)
                names, truth = [str(i % len(position)) for i in range(len(items))], ["position"] * len(items)
                paired = paired_difference(after, right, names, truth)
                against = [round(x, 4) for x in (paired.mean, paired.low, paired.high)]
                results.append({"by": name, "strength": strength, "every": every, "accuracy": mean(after), "seconds": cost,
                                "times": round(cost / plain, 3), "against plain": against})  # fmt: skip
                print(results[-1], flush=True)
    change = change_of_others(pipe, diffalign.Guide(arms["place"], budget=1, strength=args.strength[-1]), rows, args.others)
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine.machine(pipe.device),
        "model made": read_json(packaged_path("package:shapes/weights/shapes") / "card.json")["date"],
        "split": args.split,
        "position prompts": len(position),
        "seeds": args.seeds,
        "plain": {"accuracy": mean(right), "seconds": plain},
        "largest change of a pixel in images of other tasks": change,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {**facts, "guided": results})
    print(facts["plain"], change)


def mean(verdicts: Sequence[float]) -> float:
    return round(float(np.mean(verdicts)), 4)


def images_of(pipe: Any, method: Any, items: Sequence[tuple[Mapping[str, Any], int]], size: int) -> tuple[float, list[float]]:
    """Seconds of the process for an image, and whether each is right."""
    right, spent = [], 0.0
    for at in range(0, len(items), size):
        part = items[at : at + size]
        began = time.process_time()
        out = pipe(
            [row["prompt"] for row, _ in part], seed=[seed for _, seed in part], plugins=[method] if method else [], output_type="np"
        )
        spent += time.process_time() - began
        right += [float(v.correct) for v in judge_images((out.images * 255).round().astype(np.uint8), [row for row, _ in part])]
    return round(spent / len(items), 4), right


def change_of_others(pipe: Any, method: Any, rows: Sequence[Mapping[str, Any]], count: int) -> float | None:
    """By how much the guided images of `count` prompts of each other task differ from the plain ones, of 1; None where none were made."""
    tasks = dict.fromkeys(row["tag"] for row in rows if row["tag"] != "position")
    texts = [row["prompt"] for task in tasks for row in [row for row in rows if row["tag"] == task][:count]]
    if not texts:
        return None
    before, after = (pipe(texts, seed=0, plugins=plugins, output_type="pt").images for plugins in ([], [method]))
    return float((before - after).abs().max())


if __name__ == "__main__":
    main()
