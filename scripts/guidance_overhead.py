"""The price of the guidance hook while it saves nothing: `python scripts/guidance_overhead.py`. Writes guidance_overhead.json.

The same call without the hook and with Adaptive Guidance that never stops, in turns; the ratio of the medians is the overhead.
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

from diffalign.commands import options
from diffalign.files import write_json
from diffalign.hub import load_pipeline
from diffalign.methods.adaptive_guidance import AdaptiveGuidance


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="shapes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("outputs/guidance"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pipeline = load_pipeline(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    method, rows = AdaptiveGuidance(threshold=math.inf), {}
    for size in args.batch_sizes:
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for turn in range(args.repeats + 1):
            # which comes first alternates, so that neither always follows the other
            for kind in sorted(seconds, reverse=bool(turn % 2)):
                began = time.perf_counter()
                pipeline(
                    ["a red circle"] * size,
                    seed=0,
                    num_inference_steps=args.steps,
                    output_type="latent",
                    plugins=[method] if kind == "with" else (),
                )
                if turn:
                    seconds[kind].append(time.perf_counter() - began)
        without, with_hook = (float(np.median(seconds[kind])) for kind in ("without", "with"))
        ratios = np.array(seconds["with"]) / np.array(seconds["without"])
        rows[str(size)] = {"without": without, "with": with_hook, "overhead": with_hook / without - 1,
                           "overhead_paired_median": float(np.median(ratios)) - 1}  # fmt: skip
        print(f"batch {size}: {without:.4f} s without, {with_hook:.4f} s with the hook, overhead {100 * (with_hook / without - 1):+.2f} %")
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "scripts/guidance_overhead.py", *(sys.argv[1:] if argv is None else argv)]),
        "device": options.device_name(pipeline),
        "versions": options.versions(),
        "steps": args.steps,
        "repeats": args.repeats,
    }
    write_json(args.out / "guidance_overhead.json", {**facts, "batch_sizes": rows})


if __name__ == "__main__":
    main()
