"""What the last iterations of ReNO spoil: the judge's accuracy along climbs from one noise, and what several rules of stopping and choosing
would have returned, on validation prompts of the embedded one-step model.

    python scripts/reno_trajectory.py --per-task 10 --seeds 3 --out outputs/reno_trajectory.json

Every evaluation of a climb is scored by the reward and by watched rewards, and judged. At evaluations 1, 10, 20, ... the file has the
accuracy of the current image and of the best so far: by the reward (what ReNO returns), by the sum of the standardised reward and a
share of a standardised watched one, and by the reward up to where a watched one has not risen for so many evaluations. All are chosen
afterwards, from the same climbs, so differences are paired.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
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
from diffalign.types import Evaluation

WATCHED = ("shapes-watch", "shapes-clip")
SHARES, PATIENCES = (0.5, 1.0), (4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-task", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="climbs of each prompt")
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=60)
    parser.add_argument("--settings", type=json.loads, default={}, help='of ReNO, JSON such as {"lr": 0.0078125}')
    parser.add_argument("--out", type=Path, default=Path("outputs/reno_trajectory.json"))
    args = parser.parse_args()

    pipe = diffalign.load_pipeline("shapes-turbo")
    pipe.set_progress_bar_config(disable=True)
    reward = diffalign.load_reward({"shapes-reward": 1.0}, watch=WATCHED)
    rows = [row for row in prompts.metadata("validation", per_task=args.per_task) for _ in range(args.seeds)]
    climb = {"starts": 1, "patience": None, **args.settings}
    scores, correct = climbs(pipe, diffalign.ReNO(reward, budget=args.budget, **climb), rows, args.batch_size)
    tags, groups = [row["tag"] for row in rows], [i // args.seeds for i in range(len(rows))]
    rules = choices(scores)
    table = []
    for upto in sorted({1, *range(10, args.budget + 1, 10), args.budget}):
        line: dict[str, Any] = {"evaluations": upto, "reward": round(float(scores["total"][:, :upto].max(1).mean()), 3)}
        chosen = {name: rule(upto) for name, rule in rules.items()}
        verdicts = {name: np.take_along_axis(correct, at[:, None], 1)[:, 0].tolist() for name, at in chosen.items()}
        for name, values in verdicts.items():
            paired = paired_difference(values, verdicts["reward"], groups, tags)
            line[name] = {
                "accuracy": accuracy(values, tags),
                "against the reward": [round(x, 4) for x in (paired.mean, paired.low, paired.high)],
            }
        line["any"] = accuracy(correct[:, :upto].max(1).tolist(), tags)
        table.append(line)
        print(json.dumps(line), flush=True)
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine.machine(pipe.device),
        "images": len(rows),
        "settings": climb,
    }
    write_json(args.out, {**facts, "table": table})


def climbs(pipe: Any, method: Any, rows: list[dict], size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every score and every verdict, each "samples evaluations"; row i climbs from the noise of seed i."""
    parts: list[dict[str, np.ndarray]] = []
    verdicts: list[np.ndarray] = []
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        columns: list[list[float]] = []

        def judge(event: Evaluation, part: list[dict] = part, columns: list[list[float]] = columns) -> None:
            images = (event.images * 255).round().byte().movedim(1, -1).cpu().numpy()
            columns.append([float(v.correct) for v in judge_images(images, [part[row] for row in event.rows])])

        out = pipe([row["prompt"] for row in part], seed=at, plugins=[method], progress=judge, output_type="np")
        parts.append({name: np.array(series) for name, series in out.trace.rewards.items()})
        verdicts.append(np.array(columns).T)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, np.concatenate(verdicts)


def choices(scores: dict[str, np.ndarray]) -> dict[str, Callable[[int], np.ndarray]]:
    """Rule -> for the first n evaluations, which one it returns, "samples"."""
    total = scores["total"]
    rules: dict[str, Callable[[int], np.ndarray]] = {
        "reward": lambda n: total[:, :n].argmax(1),
        "current": lambda n: np.full(len(total), n - 1),
    }
    for name in WATCHED:
        watched = scores[name]
        for share in SHARES:
            both = standardised(total) + share * standardised(watched)
            rules[f"reward + {share:g} {name}"] = lambda n, both=both: both[:, :n].argmax(1)
        for patience in PATIENCES:
            ends = np.array([end_of(series, patience) for series in watched])
            rules[f"{name} has not risen for {patience}"] = lambda n, ends=ends: stopped(total, np.minimum(ends, n))
    return rules


def standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def end_of(series: np.ndarray, patience: int) -> int:
    """How many evaluations are made until `patience` in a row have brought no new best."""
    best = 0
    for k, value in enumerate(series):
        if value > series[best]:
            best = k
        if k - best >= patience:
            return k + 1
    return len(series)


def stopped(total: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The best by the reward within each sample's first evaluations."""
    return np.where(np.arange(total.shape[1])[None] < ends[:, None], total, -np.inf).argmax(1)


def accuracy(values: list[float], tags: list[str]) -> float:
    """The unweighted mean over tasks."""
    of = np.array(values)
    return round(float(np.mean([of[np.array(tags) == tag].mean() for tag in dict.fromkeys(tags)])), 4)


if __name__ == "__main__":
    main()
