"""Measures what tuning does on the shapes model: `python scripts/tuning_table.py --pairs outputs/pairs --out outputs/tuning`.

Each arm is a file of configs/train, run as the command line runs it (`diffalign train`), once a seed; then the tuned model draws test
prompts from the noises that the untuned one draws them from, and the judge compares. Writes results.json and table.md. Whatever has been
made is kept, so that a stopped run goes on, and further arms and seeds join the table. `diffalign pairs --out outputs/pairs` makes the
pairs. While settings are chosen: --split validation; test is for reporting.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffalign.cli import main as diffalign
from diffalign.files import differing_settings, read_json, write_json, write_text
from diffalign.loading import load_pipeline
from diffalign.reports.statistics import overall_estimate, paired_difference, task_estimates
from diffalign.shapes import prompts as world
from diffalign.shapes.detector import judge_images
from diffalign.shapes.pairs import draw_images, noise_of
from diffalign.training.card import device_name
from diffalign.training.table import find_row

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "train"
ARMS = ("sft", "dpo", "inpo", "dcpo", "mapo", "kto")
BASE = "base"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    judged = {BASE: [judge(args, BASE, None)]}
    for seed in args.seeds:
        for arm in args.arms:
            folder = args.out / "runs" / f"{arm}-{seed}"
            train(args, arm, seed, folder)
            judged.setdefault(arm, []).append(judge(args, f"{arm}-{seed}", folder))
            publish(args, judged)  # after every run: a table that stands is worth more than one that is to come
    publish(args, judged)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, metavar="FOLDER", help="what `diffalign pairs` wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/tuning"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="NAME", help="names of configs/train/NAME_shapes.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="images of each prompt (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth prompt: a quick look (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps of the judged images (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, metavar="X", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--train-args", nargs=argparse.REMAINDER, default=[], help="the rest of the line goes to every training")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, arm: str, seed: int, folder: Path) -> None:
    """One run, or what is left of it; none where its card is there."""
    if (folder / "card.json").is_file():
        return
    data = [] if find_row(arm).data == "prompts" else ["--data", str(args.pairs)]
    command = ["train", arm, "--config", str(CONFIGS / f"{arm}_shapes.yaml"), *data, "--seed", str(seed), "--out", str(folder),
               "--cache", str(args.out / "latents"), "--device", "cpu", "--resume", *args.train_args]  # fmt: skip
    if diffalign(command) != 0:
        sys.exit(f"training {arm} with seed {seed} failed; what is said above names the reason")


def judge(args: argparse.Namespace, name: str, folder: Path | None) -> dict[str, Any]:
    """The judge's verdicts on images of the tuned model, or of the untuned one; drawn once."""
    settings = {"split": args.split, "samples": args.samples, "every": args.every, "steps": args.steps, "scale": args.guidance_scale}
    path = args.out / "judged" / f"{name}.json"
    if path.is_file():
        stored = read_json(path, ("settings", "right"))
        changed = differing_settings(stored["settings"], settings)
        if changed:
            sys.exit(f"{path} was made with other settings ({'; '.join(changed)}); give those, or another --out")
        return stored
    pipe = load_pipeline("shapes" if folder is None or not (folder / "pipeline").is_dir() else folder / "pipeline", device="cpu")
    if folder is not None and not (folder / "pipeline").is_dir():
        pipe.load_lora_weights(folder)
    rows = [(i, row, k) for i, row in list(enumerate(world.metadata(args.split)))[:: args.every] for k in range(args.samples)]
    right: list[bool] = []
    for start in tqdm(range(0, len(rows), 64), desc=f"judge {name}", mininterval=5):
        part = rows[start : start + 64]
        images = draw_images(pipe, [row["prompt"] for _, row, _ in part], [noise_of(7, i, k) for i, _, k in part], args.steps,
                             args.guidance_scale, pipe.default_size())  # fmt: skip
        right += [bool(verdict.correct) for verdict in judge_images(images, [row for _, row, _ in part])]
    card = {} if folder is None else read_json(folder / "card.json")
    found = {
        "settings": settings,
        "prompts": [row["prompt"] for _, row, _ in rows],
        "tasks": [row["tag"] for _, row, _ in rows],
        "right": right,
        "training": {name: card[name] for name in ("steps", "kept_step", "seconds", "evaluations", "settings", "data") if name in card},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def publish(args: argparse.Namespace, judged: dict[str, list[dict[str, Any]]]) -> None:
    """results.json and table.md of all that is judged."""
    base = judged[BASE][0]
    where = (base["prompts"], base["tasks"])
    results: dict[str, Any] = {}
    for arm, runs in judged.items():
        mean = np.mean([np.asarray(run["right"], dtype=float) for run in runs], axis=0)  # over seeds, image by image
        gain = paired_difference(mean, base["right"], *where)
        results[arm] = {
            "overall": overall_estimate(mean, *where).mean,
            "tasks": {task: each.mean for task, each in task_estimates(mean, *where).items()},
            "gain": {"mean": gain.mean, "low": gain.low, "high": gain.high},
            "gain of each seed": [paired_difference(run["right"], base["right"], *where).mean for run in runs],
            "kept steps": [run["training"].get("kept_step") for run in runs],
            "seconds": [run["training"].get("seconds") for run in runs],
        }
    about = {
        "command": f"python scripts/tuning_table.py --pairs PAIRS --seeds {' '.join(map(str, args.seeds))} --split {args.split} "
        + " ".join(args.train_args),
        "settings": base["settings"],
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "images": len(base["right"]),
        "pairs": read_json(args.pairs / "about.json") if (args.pairs / "about.json").is_file() else None,
    }
    write_json(args.out / "results.json", {**about, "arms": results})
    write_text(args.out / "table.md", table(results, about))


def table(results: dict[str, Any], about: dict[str, Any]) -> str:
    """As docs/tuning.md shows it."""
    tasks = list(results[BASE]["tasks"])
    head = ["", *(task.replace("_", " ") for task in tasks), "overall", "gain over base [95 %]", "each seed", "seconds"]
    lines = [_row(head), _row(["---"] * len(head))]
    for arm, found in results.items():
        gain, tuned = found["gain"], arm != BASE
        interval = f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if tuned else ""
        seeds = ", ".join(f"{each:+.3f}" for each in found["gain of each seed"]) if tuned else ""
        seconds = f"{np.mean([each for each in found['seconds'] if each is not None]):.0f}" if tuned else ""
        lines.append(_row([arm, *(f"{found['tasks'][task]:.2f}" for task in tasks), f"{found['overall']:.3f}", interval, seeds, seconds]))
    settings = about["settings"]
    prompts = f"{settings['split']} prompts" + ("" if settings["every"] == 1 else f", every {settings['every']}th alone")
    drawn = f"{settings['samples']} images each, {settings['steps']} DDIM steps, guidance {settings['scale']:g}"
    lines += [
        "",
        f"Judge accuracy, {prompts}, {drawn}; {about['device']}, {about['date']}. Intervals: over prompts, of the mean over seeds.",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
