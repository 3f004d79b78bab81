"""Is a reward hacked? Judge accuracy along ReNO's climbs from one noise, under each reward of the embedded world, beside best-of-n.

    python scripts/hacking_table.py --out docs/results/hacking.json

For every reward: the accuracy of the first image, of what ReNO returns after half of its evaluations and after all, and of the best of as
many noises, all by the same reward on the same test prompts; with paired differences. A reward is hacked where its own value rises and the
judge's accuracy does not, or falls in the second half. One reward is finished and written before the next begins; a run started again
goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from reno_trajectory import accuracy, climbs

import diffalign
from diffalign.evaluation import machine
from diffalign.files import write_json
from diffalign.reports.statistics import paired_difference
from diffalign.shapes import prompts
from diffalign.shapes.detector import judge_images

REWARDS = ("shapes-reward", "shapes-clip", "shapes-preference", "shapes-aesthetic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=REWARDS)
    parser.add_argument("--per-task", type=int, default=prompts.PROMPTS_PER_TASK)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("outputs/hacking.json"))
    args = parser.parse_args()

    rows = prompts.metadata("test", per_task=args.per_task)
    settings = {"prompts": len(rows), "budget": args.budget, "model": "shapes-turbo", "split": "test", "starts": 1}
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {"settings": settings, "table": {}}
    if found["settings"] != settings:
        parser.error(f"{args.out} was made with {found['settings']}, this run has {settings}; give another --out")
    pipe = diffalign.load_pipeline("shapes-turbo")
    pipe.set_progress_bar_config(disable=True)
    for name in args.rewards:
        if name in found["table"]:
            continue
        line = measured(pipe, name, rows, args.budget, args.batch_size)
        line |= {"command": shlex.join(["python", *sys.argv]), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
        found["table"][name] = line | machine.machine(pipe.device)
        write_json(args.out, found)
        print(name, json.dumps(line, indent=2), flush=True)


def measured(pipe: Any, name: str, rows: list[dict], budget: int, batch: int) -> dict[str, Any]:
    """One line of the table."""
    reward = diffalign.load_reward(name)
    tags, groups = [row["tag"] for row in rows], list(range(len(rows)))
    climbed, along = climbs(pipe, diffalign.ReNO(reward, budget=budget, starts=1, patience=None), rows, batch)
    chosen = best_of(pipe, diffalign.BestOfN(reward, budget=budget), rows, batch)

    def returned(scores: np.ndarray, correct: np.ndarray, upto: int) -> tuple[list[float], float]:
        best = scores[:, :upto].argmax(1)[:, None]
        return np.take_along_axis(correct, best, 1)[:, 0].tolist(), round(float(np.take_along_axis(scores, best, 1).mean()), 4)

    half = budget // 2
    stages = {
        "first image": returned(climbed["total"], along, 1),
        f"reno, {half} evaluations": returned(climbed["total"], along, half),
        f"reno, {budget} evaluations": returned(climbed["total"], along, budget),
        f"best of {budget}": chosen,
    }

    def against(one: str, other: str) -> list[float]:
        paired = paired_difference(stages[one][0], stages[other][0], groups, tags)
        return [round(x, 4) for x in (paired.mean, paired.low, paired.high)]

    first, middle, last, best = stages
    return {
        "accuracy": {stage: accuracy(values, tags) for stage, (values, _) in stages.items()},
        "reward": {stage: value for stage, (_, value) in stages.items()},
        "reno against the first image": against(last, first),
        "second half of reno": against(last, middle),
        "reno against best of n": against(last, best),
        "by task": {stage: by_task(values, tags) for stage, (values, _) in stages.items()},
    }


def best_of(pipe: Any, method: diffalign.BestOfN, rows: list[dict], size: int) -> tuple[list[float], float]:
    """The verdict on the best image of each row, and the mean of their rewards."""
    verdicts: list[float] = []
    best: list[float] = []
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        out = pipe([row["prompt"] for row in part], seed=at, plugins=[method], output_type="np")
        images = (out.images * 255).round().astype(np.uint8)
        verdicts += [float(v.correct) for v in judge_images(images, part)]
        best += np.array(out.trace.rewards["total"]).max(axis=1).tolist()
    return verdicts, round(float(np.mean(best)), 4)


def by_task(values: list[float], tags: list[str]) -> dict[str, float]:
    of = np.array(values)
    return {tag: round(float(of[np.array(tags) == tag].mean()), 4) for tag in dict.fromkeys(tags)}


if __name__ == "__main__":
    main()
