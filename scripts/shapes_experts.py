"""Experts of shapes-reward for the multi-step shapes model: what they can tell from a prediction, and what methods gain by them.

    python scripts/shapes_experts.py --per-task 40 --steps 200 --judged 60 --out docs/results/shapes_experts.json

Trained on the model's own samples of training prompts, nothing else; the folder --experts holds them, and a stopped run goes on. "plain"
and "expert" are correlations, within held-out training prompts, of a score of the predicted image with the score of the finished one, for
each range of noise. With --judged, so many validation prompts are made by Guide and by seed pruning, each with and without experts, from
the same noises; the judge says how many are right.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import diffalign
from diffalign.evaluation import machine
from diffalign.files import packaged_path, read_json, write_json
from diffalign.methods.experts_fit import ExpertSettings, train_experts
from diffalign.reports.statistics import paired_difference
from diffalign.shapes import prompts
from diffalign.shapes.detector import judge_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-task", type=int, default=40, help="training prompts of each task")
    parser.add_argument("--samples", type=int, default=4, help="images of each")
    parser.add_argument("--steps", type=int, default=200, help="updates of each range")
    parser.add_argument("--bounds", type=float, nargs="*", default=[0.5, 0.85, 0.97])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--judged", type=int, default=0, help="validation prompts for the comparison of methods")
    parser.add_argument("--strength", type=float, default=0.05, help="of Guide")
    parser.add_argument("--experts", type=Path, default=Path("outputs/shapes-experts"))
    parser.add_argument("--out", type=Path, default=Path("outputs/shapes_experts.json"))
    args = parser.parse_args()

    pipe, reward = diffalign.load_pipeline("shapes"), diffalign.load_reward("shapes-reward")
    pipe.set_progress_bar_config(disable=True)
    steps, scale = pipe.defaults["num_inference_steps"], pipe.defaults["guidance_scale"]
    texts = prompts.prompts("train", per_task=args.per_task)
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]  # those held out are of every task
    settings = ExpertSettings(bounds=tuple(args.bounds), samples=args.samples, steps=args.steps, lr=args.lr)
    began = time.perf_counter()
    experts = train_experts(pipe, reward, texts, args.experts, settings, steps=steps, guidance_scale=scale)
    seconds = round(time.perf_counter() - began, 1)
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine.machine(pipe.device),
        "model made": read_json(packaged_path("package:shapes/weights/shapes") / "card.json")["date"],
        "training prompts": len(texts),
        "seconds of training": seconds,
        "ranges": read_json(args.experts / "report.json")["ranges"],
    }
    print(*facts["ranges"], sep="\n", flush=True)
    if args.judged:
        facts["methods"] = compare(pipe, methods(reward, experts, args.strength), args.judged)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, facts)


def methods(reward: Any, experts: Any, strength: float) -> Mapping[str, Any]:
    """Each method without experts, and with them."""
    return {
        "guide": diffalign.Guide(reward, budget=1, strength=strength),
        "guide with experts": diffalign.Guide(reward, budget=1, strength=strength, ranges=experts),
        "prune": diffalign.SeedPruning(reward, budget=4),
        "prune with experts": diffalign.SeedPruning(reward, budget=4, ranges=experts),
    }


def compare(pipe: Any, arms: Mapping[str, Any], count: int, size: int = 20) -> list[dict[str, Any]]:
    """Judge accuracy over `count` validation prompts, spread over the tasks; the second of each pair against the first."""
    rows = prompts.metadata("validation", per_task=-(-count // 6))[:count]
    found, before = [], None
    for name, method in arms.items():
        began = time.process_time()
        right = judged(pipe, method, rows, size)
        result = {"method": name, "accuracy": round(float(np.mean(right)), 4), "seconds": round((time.process_time() - began) / count, 3)}
        if before is not None and "experts" in name:
            paired = paired_difference(right, before, range(len(rows)), ["all"] * len(rows))
            result["against the same without"] = [round(x, 4) for x in (paired.mean, paired.low, paired.high)]
        before = right
        found.append(result)
        print(result, flush=True)
    return found


def judged(pipe: Any, method: Any, rows: Sequence[Mapping[str, Any]], size: int) -> list[float]:
    """Whether each image is right."""
    right = []
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        out = pipe([row["prompt"] for row in part], seed=list(range(at, at + len(part))), plugins=[method], output_type="np")
        right += [float(v.correct) for v in judge_images((out.images * 255).round().astype(np.uint8), part)]
    return right


if __name__ == "__main__":
    main()
