"""The price of the guidance hook while it saves nothing, and what half the guidance saves: `python scripts/guidance_overhead.py`.

The same call without the hook, with Adaptive Guidance that never stops, and with guidance in the first half of the steps only, in turns;
the ratios are taken turn by turn, and their median is reported. Writes guidance_overhead.json.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from diffalign.evaluation import machine
from diffalign.files import write_json
from diffalign.hub import load_pipeline
from diffalign.methods.adaptive_guidance import AdaptiveGuidance
from diffalign.methods.guidance_rivals import FixedFraction

KINDS = {"without": None, "hook": AdaptiveGuidance(threshold=math.inf), "half": FixedFraction(fraction=0.5)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="shapes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 26])
    parser.add_argument("--repeats", type=int, nargs="+", default=[25, 9, 5], help="timed turns for each of --batch-sizes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/guidance/guidance_overhead.json"))
    args = parser.parse_args(argv)
    if len(args.repeats) != len(args.batch_sizes):
        parser.error(f"--repeats must be given once for each of --batch-sizes; got {len(args.repeats)} for {len(args.batch_sizes)}")
    torch.set_num_threads(args.threads)
    pipeline = load_pipeline(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    rows = {}
    for size, repeats in zip(args.batch_sizes, args.repeats, strict=True):
        measured = measure(pipeline, size, args.steps, repeats)
        rows[str(size)] = row = {"turns": repeats}
        for kind, label in (("seconds", "wall"), ("cpu", "cpu")):
            times = {name: np.array(each[kind]) for name, each in measured.items()}
            row[f"{label}_seconds"] = {name: float(np.median(each)) for name, each in times.items()}
            row[f"{label}_overhead"] = float(np.median(times["hook"] / times["without"])) - 1
            row[f"{label}_saved_by_half"] = 1 - float(np.median(times["half"] / times["without"]))
        print(f"batch {size}: {row['cpu_seconds']['without']:.3f} s of CPU time; the hook adds {100 * row['cpu_overhead']:+.2f} % "
              f"({100 * row['wall_overhead']:+.2f} % of wall time); 25 % fewer evaluations save "
              f"{100 * row['cpu_saved_by_half']:.1f} % ({100 * row['wall_saved_by_half']:.1f} %)")  # fmt: skip
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "scripts/guidance_overhead.py", *(sys.argv[1:] if argv is None else argv)]),
        **machine.machine(pipeline.device),
        "steps": args.steps,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {**facts, "batch_sizes": rows})


def measure(pipeline: object, size: int, steps: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds and CPU seconds of every turn but the first, which warms up."""
    measured: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu": []} for name in KINDS}
    names = list(KINDS)
    for turn in range(repeats + 1):
        first = turn % len(names)  # another comes first each time, so that none always follows the same one
        for name in (*names[first:], *names[:first]):
            plugins = () if KINDS[name] is None else [KINDS[name]]
            began, began_cpu = time.perf_counter(), time.process_time()
            pipeline(["a red circle"] * size, seed=0, num_inference_steps=steps, output_type="latent", plugins=plugins)
            if turn:
                measured[name]["seconds"].append(time.perf_counter() - began)
                measured[name]["cpu"].append(time.process_time() - began_cpu)
    return measured


if __name__ == "__main__":
    main()
