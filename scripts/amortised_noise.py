"""The noise policy of the embedded one-step model: trains it on training prompts, or goes on where it stopped, and measures it.

    python scripts/amortised_noise.py --out outputs/noise
    python scripts/amortised_noise.py --out outputs/noise --split test --per-task 60

Training is about a quarter of an hour on one free core. Beside the policy, from the same noises: doing nothing, best-of-N and ReNO at
--budget evaluations. `kept` is the policy's share of ReNO's gain in judge accuracy; `time` its time over a plain call's, without rewards;
`diversity` the mean distance between shapes-clip features of images of one prompt, over that of doing nothing. The policy ships where
its files lie in diffalign/shapes/weights/shapes-turbo-noise: noise_policy.json, noise_policy.safetensors, card.json and README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffalign
from diffalign.evaluation import machine
from diffalign.files import packaged_path, write_json
from diffalign.reports.statistics import paired_difference
from diffalign.shapes import prompts
from diffalign.shapes.detector import judge_images
from diffalign.shapes.measures import pairwise_distance
from diffalign.shapes.train.evaluate import clip_features
from diffalign.training.loop import LoopSettings

NEW = 10_000  # seeds from here on are nobody's in training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/noise"))
    parser.add_argument("--pipeline", default="shapes-turbo")
    parser.add_argument("--reward", type=json.loads, default={"shapes-reward": 1.0}, help="JSON (default: shapes-reward)")
    parser.add_argument("--form", choices=("residual", "distribution"), default="residual")
    parser.add_argument("--pull", type=float, default=0.5, help="what a nat an entry costs")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--per-task", type=int, default=10, help="prompts of each task to measure on")
    parser.add_argument("--seeds", type=int, default=3, help="images of each prompt")
    parser.add_argument("--budget", type=int, default=50, help="evaluations of the searches beside it")
    parser.add_argument("--without-searches", action="store_true", help="leave best-of-N and ReNO out: seconds instead of minutes")
    args = parser.parse_args()

    pipe = diffalign.load_pipeline(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    settings = LoopSettings(steps=args.steps, lr=args.lr, batch_size=args.batch_size, warmup=20, schedule="cosine", save_every=20)
    diffalign.train_noise(
        training_prompts(), args.reward, pipeline=args.pipeline, out=args.out, form=args.form, pull=args.pull, settings=settings,
        resume=True, command=shlex.join(["python", *sys.argv]),
    )  # fmt: skip
    reward = diffalign.load_reward(args.reward)
    methods = {"none": None, "amortised": diffalign.AmortisedNoise(args.out), "amortised, best of 8": None}
    methods["amortised, best of 8"] = diffalign.AmortisedNoise(args.out, reward, budget=8)
    if not args.without_searches:
        methods["best-of-n"] = diffalign.BestOfN(reward, budget=args.budget)
        methods["reno"] = diffalign.ReNO(reward, budget=args.budget)
    rows = [row for row in prompts.metadata(args.split, per_task=args.per_task) for _ in range(args.seeds)]
    measured = {name: measure(pipe, method, rows, reward) for name, method in methods.items()}
    tags, groups = [row["tag"] for row in rows], [i // args.seeds for i in range(len(rows))]
    results, correct = {}, {name: figures.pop("correct") for name, figures in measured.items()}
    features = clip_features(packaged_path("package:shapes/weights/shapes-clip"), "cpu")
    for name, figures in measured.items():
        images = figures.pop("images")
        paired = paired_difference(correct[name], correct["none"], groups, tags)
        distance = pairwise_distance(features(images).unflatten(0, (-1, args.seeds))).mean().item() if args.seeds > 1 else None
        results[name] = {**figures, "gain": [round(x, 4) for x in (paired.mean, paired.low, paired.high)], "distance": distance}
    base = results["none"]["distance"]
    summary = {"time": times(pipe, methods["amortised"])}
    if base:
        summary["diversity"] = round(results["amortised"]["distance"] / base, 4)
    if "reno" in results:
        summary["kept"] = round(results["amortised"]["gain"][0] / results["reno"]["gain"][0], 4)
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine.machine(pipe.device),
        "split": args.split,
        "images": len(rows),
        "reward": args.reward,
    }
    print(json.dumps({**summary, "results": results}, indent=2))
    write_json(args.out / f"results-{args.split}.json", {**facts, **summary, "results": results})


def training_prompts() -> list[str]:
    """As many of each task: the rarer ones are repeated, so that a task's weight does not depend on how many prompts it has."""
    rows = prompts.metadata("train", per_task=400)
    tasks = {row["tag"]: [r["prompt"] for r in rows if r["tag"] == row["tag"]] for row in rows}
    most = max(map(len, tasks.values()))
    return [texts[i % len(texts)] for texts in tasks.values() for i in range(most)]


def measure(pipe: Any, method: Any, rows: Sequence[Mapping[str, Any]], reward: Any, size: int = 60) -> dict[str, Any]:
    """Verdicts, images, mean reward and seconds an image; row i is made from the noise of seed NEW + i."""
    images, totals, seconds = [], [], 0.0
    for at in range(0, len(rows), size):
        texts = [row["prompt"] for row in rows[at : at + size]]
        start = time.perf_counter()
        out = pipe(texts, seed=NEW + at, output_type="pt", plugins=[] if method is None else [method])
        seconds += time.perf_counter() - start
        images.append(out.images)
        with torch.no_grad():
            totals.append(reward(out.images, texts).total)
    eight = (torch.cat(images) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    correct = [float(verdict.correct) for verdict in judge_images(eight.numpy(), rows)]
    tags = np.array([row["tag"] for row in rows])
    tasks = {tag: round(float(np.mean(np.array(correct)[tags == tag])), 4) for tag in dict.fromkeys(tags.tolist())}
    return {
        "correct": correct,
        "images": eight,
        "accuracy": round(float(np.mean(list(tasks.values()))), 4),
        "tasks": tasks,
        "reward": round(torch.cat(totals).mean().item(), 3),
        "seconds_per_image": round(seconds / len(rows), 4),
    }


def times(pipe: Any, method: Any, repeats: int = 9) -> dict[str, float]:
    """Median time of a call with the policy over that of a plain one, for one prompt and for 32; calls alternate."""
    ratios = {}
    for count in (1, 32):
        texts, taken = prompts.prompts("validation", per_task=6)[:count], {True: [], False: []}
        for i in range(2 * repeats + 2):
            start = time.perf_counter()
            pipe(texts, seed=0, output_type="pt", plugins=[method] if i % 2 else [])
            taken[bool(i % 2)].append(time.perf_counter() - start)
        ratios[f"batch {count}"] = round(float(np.median(taken[True][1:]) / np.median(taken[False][1:])), 3)
    return ratios


if __name__ == "__main__":
    main()
