"""How fast GenEval's rules judge: results rows from made-up detections, on one core (one process, no threads). Writes JSON.

    python scripts/geneval_rule_speed.py --rows 100000 --out outputs/geneval_rule_speed.json

Each row is one of the 553 prompts with detections of its own classes and a few others, as many as Mask2Former gives on a busy image;
the time covers the cut by score, the rules, the partial credit where --partial is given, and the JSON of the row.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from diffalign.benchmarks.geneval.partial_credit import partial_credit
from diffalign.benchmarks.geneval.prompts import OBJECTS, metadata
from diffalign.benchmarks.geneval.results import result_row, score
from diffalign.rules import COLORS, Detection, Limits, evaluate, keep

OTHERS_PER_IMAGE = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--partial", action="store_true", help="also compute Flow-GRPO's partial credit of every row")
    parser.add_argument("--out", type=Path, default=Path("outputs/geneval_rule_speed.json"))
    args = parser.parse_args()

    rows = metadata()
    images = [detections(rows[i % len(rows)], np.random.default_rng([43, i])) for i in range(min(args.rows, 2000))]
    limits = Limits()
    began, began_cpu = time.perf_counter(), time.process_time()
    results = []
    for i in range(args.rows):
        row, found = rows[i % len(images) % len(rows)], images[i % len(images)]
        results.append(judged_row(i, row, found, limits))
        if args.partial:
            partial_credit(row, found, given_colors, limits)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu

    report = {
        "rows": args.rows,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "partial": args.partial,
        "detections_per_image": round(float(np.mean([sum(map(len, image.values())) for image in images])), 2),
        "correct": score(results).correct_images,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version(), "numpy": np.__version__},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def judged_row(i: int, row: dict, found: dict[str, list[Detection]], limits: Limits) -> dict:
    threshold = limits.counting_threshold if row["tag"] == "counting" else limits.threshold
    kept = {name: keep(objects, threshold, limits) for name, objects in found.items()}
    verdict = evaluate(row, {name: objects for name, objects in kept.items() if objects}, given_colors, limits.position_threshold)
    return result_row(f"{i:05d}/samples/00000.png", row, verdict, kept)


def given_colors(_name: str, objects) -> list[str]:
    return [d.mask for d in objects]


def detections(row: dict, rng: np.random.Generator) -> dict[str, list[Detection]]:
    """The prompt's objects with one more or fewer now and then, and other classes with low scores."""
    out: dict[str, list[Detection]] = {}
    for clause in row["include"]:
        for _ in range(max(clause["count"] + int(rng.integers(-1, 2)), 0)):
            color = clause.get("color") if rng.random() < 0.7 else None
            out.setdefault(clause["class"], []).append(detection(rng, float(rng.uniform(0.5, 1)), color))
    for _ in range(OTHERS_PER_IMAGE):
        out.setdefault(OBJECTS[rng.integers(len(OBJECTS))], []).append(detection(rng, float(rng.uniform(0, 0.6))))
    return out


def detection(rng: np.random.Generator, score_: float, color: str | None = None) -> Detection:
    x, y = rng.uniform(0, 400, 2).tolist()
    width, height = rng.uniform(10, 112, 2).tolist()
    return Detection((x, y, x + width, y + height), score_, mask=color or COLORS[rng.integers(len(COLORS))])


if __name__ == "__main__":
    main()
