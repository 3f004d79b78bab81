"""Which ReNO settings to ship: judge accuracy and reward of several, on validation prompts of the shapes world, from the
same noises. Each variant is compared with the first that ran, image by image.

    python scripts/reno_settings.py --per-task 12 --budget 16 50 --out outputs/reno_settings.json

The defaults of diffalign/methods/reno.py were chosen with this, never on the test split.
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

import diffalign
from diffalign.evaluation import machine
from diffalign.files import write_json
from diffalign.reports.statistics import paired_difference
from diffalign.shapes import prompts
from diffalign.shapes.detector import judge_images

HALF = "half"  # of the budget
MEASURED_REWARD = {"shapes-clip": 0.2, "shapes-preference": 1.0}  # what docs/reno.md was measured with
VARIANTS: dict[str, dict] = {
    "lr 1/256": {"lr": 1 / 256},
    "lr 1/128": {"lr": 1 / 128},
    "lr 1/64": {"lr": 1 / 64},
    "lr 1/32": {"lr": 1 / 32},
    "lr 1/32, half the evaluations as starts": {"lr": 1 / 32, "starts": HALF},
    "lr 1/64, half the evaluations as starts": {"lr": 1 / 64, "starts": HALF},
    "lr 1/64, no sphere": {"lr": 1 / 64, "sphere": False},
    "lr 1/64, momentum 0.5": {"lr": 1 / 64, "momentum": 0.5},
    "lr 1/512": {"lr": 1 / 512},
    "lr 1/256, half the evaluations as starts": {"lr": 1 / 256, "starts": HALF},
    "lr 1/512, half the evaluations as starts": {"lr": 1 / 512, "starts": HALF},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-task", type=int, default=12)
    parser.add_argument("--budget", type=int, nargs="+", default=[30], help="evaluations of the generator for each prompt")
    parser.add_argument("--batch-size", type=int, default=32)
    reward_help = 'JSON, such as {"shapes-reward": 1} (default: what docs/reno.md was measured with)'
    parser.add_argument("--reward", type=json.loads, default=MEASURED_REWARD, help=reward_help)
    known = ["best-of-n", "paper", *VARIANTS]
    parser.add_argument("--only", nargs="+", choices=known, default=known, help="these variants alone, in this order")
    parser.add_argument("--out", type=Path, default=Path("outputs/reno_settings.json"))
    args = parser.parse_args()

    pipe = diffalign.load_pipeline("shapes-turbo")
    pipe.set_progress_bar_config(disable=True)
    reward = diffalign.load_reward(args.reward)
    rows = prompts.metadata("validation", per_task=args.per_task)
    results = []
    for budget in args.budget:
        reference = None
        for name in args.only:
            result, after = measure(pipe, method_of(name, reward, budget), rows, args.batch_size)
            reference = reference or after
            paired = paired_difference(after, reference, range(len(rows)), [row["tag"] for row in rows])
            against = [round(x, 4) for x in (paired.mean, paired.low, paired.high)]
            results.append({"budget": budget, "settings": name, **result, "against_the_first": against})
            print(results[-1], flush=True)
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine.machine(pipe.device),
        "prompts": len(rows),
        "reward": args.reward,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {**facts, "results": results})


def method_of(name: str, reward: Any, budget: int) -> Any:
    if name == "best-of-n":
        return diffalign.BestOfN(reward, budget=budget)
    if name == "paper":
        return diffalign.ReNO.paper(reward, budget=budget)
    starts = max(budget // 2, 1) if VARIANTS[name].get("starts") == HALF else 1
    return diffalign.ReNO(reward, budget=budget, patience=None, **VARIANTS[name] | {"starts": starts})


def measure(pipe: Any, method: Any, rows: Sequence[Mapping[str, Any]], size: int) -> tuple[dict[str, Any], list[float]]:
    """What one variant reaches, and whether each image is right."""
    start, before, after, scores = time.perf_counter(), [], [], []
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        seeds = list(range(at, at + len(part)))
        out = pipe([row["prompt"] for row in part], seed=seeds, plugins=[method], output_type="np")
        for images, verdicts in ((out.initial_images, before), (out.images, after)):
            verdicts += [float(v.correct) for v in judge_images((images * 255).round().astype(np.uint8), part)]
        totals = out.trace.rewards["total"]
        scores += [(total[0], total[best]) for total, best in zip(totals, out.trace.best, strict=True)]
    tags = np.array([row["tag"] for row in rows])
    accuracy = [float(np.mean([np.mean(np.array(v)[tags == t]) for t in dict.fromkeys(tags)])) for v in (before, after)]
    result = {
        "accuracy": [round(x, 4) for x in accuracy],
        "reward": [round(float(x), 3) for x in np.mean(scores, axis=0)],
        "seconds": round(time.perf_counter() - start, 1),
    }
    return result, after


if __name__ == "__main__":
    main()
