"""Which ReNO settings to ship: judge accuracy and reward of several, on validation prompts of the shapes world, from the
same noises. Each variant is compared with the first that ran, image by image.

    python scripts/reno_settings.py --per-task 12 --budget 30 --out outputs/reno_settings.json

The defaults of diffalign/methods/reno.py were chosen with this, never on the test split.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import diffalign
from diffalign.benchmarks.statistics import paired_difference
from diffalign.shapes import prompts
from diffalign.shapes.detector import judge_images

HALF = "half"  # of the budget
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
    parser.add_argument("--budget", type=int, default=30, help="evaluations of the generator for each prompt")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--reward", type=json.loads, default={"shapes-clip": 1.0}, help='JSON, such as {"shapes-clip": 1, "shapes-preference": 5}'
    )
    parser.add_argument("--only", nargs="+", choices=["paper", "best-of-n", *VARIANTS], help="these variants alone")
    parser.add_argument("--out", type=Path, default=Path("outputs/reno_settings.json"))
    args = parser.parse_args()

    pipe = diffalign.load_pipeline("shapes-turbo")
    reward = diffalign.load_reward(args.reward)
    rows = prompts.metadata("validation", per_task=args.per_task)
    methods = {
        "best-of-n": diffalign.BestOfN(reward, budget=args.budget),
        "paper": diffalign.ReNO.paper(reward, budget=args.budget),
    }
    for name, settings in VARIANTS.items():
        starts = args.budget // 2 if settings.get("starts") == HALF else 1
        methods[name] = diffalign.ReNO(reward, budget=args.budget, patience=None, **settings | {"starts": starts})
    results, reference = [], None
    for name, method in methods.items():
        if args.only and name not in args.only:
            continue
        start, before, after, scores = time.perf_counter(), [], [], []
        for at in range(0, len(rows), args.batch_size):
            part = rows[at : at + args.batch_size]
            seeds = list(range(at, at + len(part)))
            out = pipe([row["prompt"] for row in part], seed=seeds, plugins=[method], output_type="np")
            for images, verdicts in ((out.initial_images, before), (out.images, after)):
                verdicts += [v.correct for v in judge_images((images * 255).round().astype(np.uint8), part)]
            totals = out.trace.rewards["total"]
            scores += [(total[0], total[best]) for total, best in zip(totals, out.trace.best, strict=True)]
        tags = np.array([row["tag"] for row in rows])
        mean = [float(np.mean([np.mean(np.array(v)[tags == t]) for t in dict.fromkeys(tags)])) for v in (before, after)]
        reference = reference or after
        paired = paired_difference([float(v) for v in after], [float(v) for v in reference], range(len(rows)), tags.tolist())
        rewards = [round(float(x), 3) for x in np.mean(scores, axis=0)]
        result = {
            "settings": name,
            "accuracy": [round(x, 4) for x in mean],
            "against_the_first": [round(x, 4) for x in (paired.mean, paired.low, paired.high)],
            "reward": rewards,
            "seconds": round(time.perf_counter() - start, 1),
        }
        results.append(result)
        print(result, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"arguments": {**vars(args), "out": str(args.out)}, "torch": torch.__version__, "results": results}, indent=2)
    )


if __name__ == "__main__":
    main()
