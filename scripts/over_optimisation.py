"""Does a mix of rewards stop over-optimisation? Rules compared on the shapes world, with held-out rewards and the judge watching.

    python scripts/over_optimisation.py --out outputs/over_optimisation

Every arm optimises something else from the same noises, with ReNO (the paper's preset: one start, the climb itself) and with best-of-N at
equal evaluations; the judge sees the image that would be returned after each evaluation. Scores are calibrated on base-model samples of the
same prompts (unit "within"), so a climb's gradient is longer than ReNO's clip in every arm and the steps are equally long.

Members: shapes-clip; shapes-preference; and shapes-aesthetic, the deliberately weak one: it does not read the prompt, and on validation
prompts it orders a right and a wrong image of one prompt hardly better than a coin (`--agreement` measures that for every reward; figures
in docs/reward_mixing.md). Always watched: shapes-clip on pictures reduced to 8 x 8, which sees colour and layout but no fine pattern.

Best-of-N's candidates do not depend on the reward, so they are made and scored once, and every arm chooses among them. Writes one file per
arm, then over_optimisation.json, .md and .png; a run that was stopped goes on with the arms that are missing.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffalign
from diffalign import reward_models
from diffalign.benchmarks.shapes.benchmark import ShapesBenchmark
from diffalign.files import differing_settings, read_json, write_json, write_text
from diffalign.reports.statistics import overall_estimate, paired_difference
from diffalign.reports.summary import interval, table
from diffalign.rewards import Calibration, RewardMix
from diffalign.rewards.calibration import calibrate
from diffalign.rewards.panel import panel
from diffalign.shapes.detector import judge_images
from diffalign.types import Evaluation

HELD_OUT = "clip at 8x8"
REWARDS = ("shapes-clip", "shapes-preference", "shapes-aesthetic", HELD_OUT)
THREE = REWARDS[:3]
ARMS: dict[str, tuple[Sequence[str], dict[str, str]]] = {
    "shapes-clip alone": (REWARDS[:1], {}),
    "weak member alone": (REWARDS[2:3], {}),
    "weighted sum": (THREE, {}),
    "worst case (WCO)": (THREE, {"rule": "worst-case"}),
    "soft minimum 0.3": (THREE, {"rule": "soft-min=0.3"}),
    "uncertainty 0.5 (UWO)": (THREE, {"rule": "uncertainty=0.5"}),
    "equal gradients": (THREE, {"gradient": "equal"}),
}
METHODS = ("reno", "best-of-n")
BASE_SEED = 10_000_000  # of the calibration's images, away from the run's


class Reduced:
    """A reward that sees every picture reduced to 8 x 8 and enlarged again."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name, self.differentiable = model, name, True

    def prepare(self, prompts: Sequence[str]) -> None:
        self.model.prepare(prompts)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        small = torch.nn.functional.interpolate(images, size=(8, 8), mode="area")
        return self.model(torch.nn.functional.interpolate(small, size=images.shape[2:], mode="bilinear"), prompts)


def to_bytes(images: torch.Tensor) -> np.ndarray:
    return (images.detach().permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/over_optimisation"))
    parser.add_argument("--limit", type=int, default=144, help="prompts, spread over the tasks by the benchmark's own rule")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--budget", type=int, default=25, help="evaluations of the generator for each prompt")
    parser.add_argument("--base-samples", type=int, default=6, help="images of each prompt that calibrate the rewards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS), help="these arms alone")
    parser.add_argument("--agreement", action="store_true", help="only say how well each reward agrees with the judge inside prompts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (args.out / "arms").mkdir(parents=True, exist_ok=True)
    pipe = diffalign.load_pipeline("shapes-turbo", device=args.device)
    pipe.set_progress_bar_config(disable=True)
    models = {name: reward_models.load(name, device=args.device) for name in THREE}
    models[HELD_OUT] = Reduced(models["shapes-clip"], HELD_OUT)
    items = ShapesBenchmark(split=args.split, limit=args.limit, seed=args.seed).items()
    if args.agreement:
        write_json(args.out / "agreement.json", agreement(pipe, models, items, args))
        return
    calibration = calibrated(pipe, models, items, args)
    for name in args.only:
        run_once(pipe, models, calibration, items, args, name)
    report(args, calibration, items)


def settings(args: argparse.Namespace, what: Mapping[str, Any]) -> dict[str, Any]:
    common = {key: getattr(args, key) for key in ("limit", "split", "budget", "base_samples", "seed")}
    return {**common, **what}


def resumed(path: Path, wanted: Mapping[str, Any]) -> Any:
    """The file's content where it was made with these settings."""
    if path.is_file() and not differing_settings((found := read_json(path))["settings"], wanted):
        return found
    return None


# ---- running --------------------------------------------------------------------------------------------------------------------


def base_images(pipe: Any, items: Sequence[Any], args: argparse.Namespace) -> tuple[torch.Tensor, list[str]]:
    """`base_samples` images of every prompt, all first ones first."""
    images, prompts = [], [item.prompt for item in items]
    for k in range(args.base_samples):
        for at in range(0, len(items), args.batch_size):
            part = prompts[at : at + args.batch_size]
            seeds = [BASE_SEED + k * len(items) + at + i for i in range(len(part))]
            images.append(pipe(part, seed=seeds, output_type="pt").images.float())
    return torch.cat(images), prompts * args.base_samples


def calibrated(pipe: Any, models: Mapping[str, Any], items: Sequence[Any], args: argparse.Namespace) -> Calibration:
    path, wanted = args.out / "calibration.json", settings(args, {})
    if found := resumed(path, wanted):
        return Calibration.from_json(found["calibration"], str(path))
    images, prompts = base_images(pipe, items, args)
    source = f"shapes-turbo, {len(items)} {args.split} prompts, {args.base_samples} images of each"
    calibration = calibrate(models, images, prompts, unit="within", source=source)
    write_json(path, {"settings": wanted, "calibration": calibration.to_json()})
    return calibration


def mix_of(name: str, models: Mapping[str, Any], calibration: Calibration) -> RewardMix:
    members, rules = ARMS[name]
    watched = {other: models[other] for other in REWARDS if other not in members}
    return RewardMix({member: (models[member], 1.0) for member in members}, watched, calibration=calibration, **rules)


def run_once(
    pipe: Any, models: Mapping[str, Any], calibration: Calibration, items: Sequence[Any], args: argparse.Namespace, name: str
) -> None:
    """Both methods under one arm, unless they are there already."""
    mix = mix_of(name, models, calibration)
    for method in methods_of(name):
        path = arm_path(args, method, name)
        wanted = settings(args, {"method": method, "arm": name, "mix": {**mix.settings(), "calibration": calibration.digest}})
        if resumed(path, wanted):
            continue
        began = time.process_time()
        if method == "reno":
            samples = search(pipe, mix, items, args, lambda reward: diffalign.ReNO.paper(reward, budget=args.budget))
        else:
            samples = [chosen(sample, item, mix) for sample, item in zip(candidates(pipe, models, items, args), items, strict=True)]
        write_json(path, {"settings": wanted, "cpu_seconds": round(time.process_time() - began, 1), "samples": samples})
        print(f"{method}, {name}: {time.process_time() - began:.0f} s", flush=True)


def methods_of(name: str) -> tuple[str, ...]:
    """Best-of-N has no gradient to change: it would be the weighted sum again."""
    return METHODS[:1] if "gradient" in ARMS[name][1] else METHODS


def arm_path(args: argparse.Namespace, method: str, name: str) -> Path:
    return args.out / "arms" / f"{method}-{name.split(' (')[0].replace(' ', '-')}.json"


def search(pipe: Any, mix: RewardMix, items: Sequence[Any], args: argparse.Namespace, make: Any) -> list[dict[str, Any]]:
    """Every sample's scores and verdicts, one per evaluation."""
    samples = []
    for at in range(0, len(items), args.batch_size):
        part = items[at : at + args.batch_size]
        events: list[Evaluation] = []
        out = pipe([item.prompt for item in part], seed=[item.seed for item in part], plugins=[make(mix)], progress=events.append)
        verdicts = [judge_images(to_bytes(event.images), [item.metadata for item in part]) for event in events]
        for i in range(len(part)):
            trace = out.trace.sample(i)
            rewards = {name: [round(score, 4) for score in series] for name, series in trace["rewards"].items()}
            samples.append({"rewards": rewards, "best": trace["best"], "correct": [bool(v[i].correct) for v in verdicts]})
    return samples


def candidates(pipe: Any, models: Mapping[str, Any], items: Sequence[Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Best-of-N's candidates under every reward, made once."""
    path, wanted = args.out / "candidates.json", settings(args, {})
    if found := resumed(path, wanted):
        return found["samples"]
    mix = RewardMix({REWARDS[0]: (models[REWARDS[0]], 1.0)}, {name: models[name] for name in REWARDS[1:]})
    samples = search(pipe, mix, items, args, lambda reward: diffalign.BestOfN(reward, budget=args.budget))
    write_json(path, {"settings": wanted, "samples": samples})
    return samples


def chosen(sample: Mapping[str, Any], item: Any, mix: RewardMix) -> dict[str, Any]:
    """The same candidates with the totals, and so the choice, of another mix."""
    rewards = {name: torch.tensor(sample["rewards"][name]) for name in REWARDS}
    total = mix.total(rewards, [item.prompt] * len(sample["correct"]))
    scores = {"total": [round(float(score), 4) for score in total], **{name: sample["rewards"][name] for name in REWARDS}}
    return {"rewards": scores, "best": int(total.argmax()), "correct": sample["correct"]}


def agreement(pipe: Any, models: Mapping[str, Any], items: Sequence[Any], args: argparse.Namespace) -> dict[str, Any]:
    """For each reward, how often it puts the right one of a right and a wrong image of one prompt first, on base-model images."""
    images, prompts = base_images(pipe, items, args)
    metadata = [item.metadata for item in items] * args.base_samples
    right = np.array([v.correct for v in judge_images(to_bytes(images), metadata)]).reshape(args.base_samples, -1)
    shares = {}
    for name, model in models.items():
        with torch.no_grad():
            scores = torch.cat([model(images[at : at + 50], prompts[at : at + 50]) for at in range(0, len(prompts), 50)])
        scores = scores.numpy().reshape(args.base_samples, -1)
        pairs = right[:, None] & ~right[None]
        shares[name] = float((scores[:, None] > scores[None])[pairs].mean())
    found = {"settings": settings(args, {}), "pairs": int(pairs.sum()), "images": len(prompts), "share of pairs in order": shares}
    print(found)
    return found


# ---- reporting ------------------------------------------------------------------------------------------------------------------


def summary_of(
    samples: Sequence[Mapping[str, Any]], items: Sequence[Any], members: Sequence[str], calibration: Calibration
) -> dict[str, Any]:
    """One arm in numbers: the panel's curves, the judge's, and the paired difference between the returned and the first image."""
    prompts, tasks = [item.index for item in items], [item.task for item in items]
    paths = [best_so_far(sample["rewards"]["total"]) for sample in samples]
    verdicts = np.array([[sample["correct"][t] for t in path] for sample, path in zip(samples, paths, strict=True)], dtype=float)
    scales = {name: calibration.scale(name) for name in REWARDS}
    curves = panel(samples, dict.fromkeys(members, 1.0), [name for name in REWARDS if name not in members], scales)
    gains = {
        name: [(s["rewards"][name][path[-1]] - s["rewards"][name][0]) / scales[name] for s, path in zip(samples, paths, strict=True)]
        for name in REWARDS
    }
    zeros = [0.0] * len(samples)
    return {
        "members": list(members),
        "panel": rounded(curves.to_json()),
        "gains": {name: rounded(asdict(paired_difference(values, zeros, prompts, tasks))) for name, values in gains.items()},
        "accuracy": rounded(asdict(overall_estimate(verdicts[:, -1], prompts, tasks))),
        "accuracy_gain": rounded(asdict(paired_difference(verdicts[:, -1], verdicts[:, 0], prompts, tasks))),
        # over-optimisation, if there is any: what the second half of the search did to the images that the first half had found
        "accuracy_second_half": rounded(asdict(paired_difference(verdicts[:, -1], verdicts[:, verdicts.shape[1] // 2], prompts, tasks))),
        "accuracy_curve": rounded([task_mean(column, tasks) for column in verdicts.T]),
        "returned_right": [int(verdict) for verdict in verdicts[:, -1]],
    }


def best_so_far(totals: Sequence[float]) -> list[int]:
    path = []
    for t, total in enumerate(totals):
        path.append(t if t == 0 or total > totals[path[-1]] else path[-1])
    return path


def task_mean(values: np.ndarray, tasks: Sequence[str]) -> float:
    names = np.array(tasks)
    return float(np.mean([values[names == task].mean() for task in dict.fromkeys(tasks)]))


def rounded(data: Any) -> Any:
    if isinstance(data, float):
        return round(data, 4)
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    return [rounded(value) for value in data] if isinstance(data, list) else data


def report(args: argparse.Namespace, calibration: Calibration, items: Sequence[Any]) -> None:
    prompts, tasks = [item.index for item in items], [item.task for item in items]
    methods: dict[str, dict[str, Any]] = {}
    seconds, first = 0.0, None
    for method in METHODS:
        for name in (name for name in args.only if method in methods_of(name)):
            stored = read_json(arm_path(args, method, name))
            seconds += stored["cpu_seconds"]
            first = first or [float(sample["correct"][0]) for sample in stored["samples"]]
            methods.setdefault(method, {})[name] = summary_of(stored["samples"], items, ARMS[name][0], calibration)
        alone = methods[method].get("shapes-clip alone")
        for arm in methods[method].values():
            if alone is not None and arm is not alone:
                difference = paired_difference(arm["returned_right"], alone["returned_right"], prompts, tasks)
                arm["accuracy_against_clip_alone"] = rounded(asdict(difference))
    found = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": f"{args.device} ({torch.get_num_threads()} thread)" if args.device == "cpu" else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "diffalign": diffalign.__version__},
        "cpu_seconds": round(seconds),
        "settings": settings(args, {"prompts": len(items)}),
        "none": rounded(asdict(overall_estimate(first, prompts, tasks))),
        "units": {name: round(calibration.scale(name), 4) for name in REWARDS},
        **({"agreement": read_json(path)} if (path := args.out / "agreement.json").is_file() else {}),
        "methods": methods,
    }
    write_json(args.out / "over_optimisation.json", found)
    write_text(args.out / "over_optimisation.md", text := markdown(found))
    plot(found, args.out / "over_optimisation.png")
    print(text)


def markdown(found: Mapping[str, Any]) -> str:
    parts = []
    for method, arms in found["methods"].items():
        rows = [["none", *["0"] * len(REWARDS), "", interval(found["none"]), "", "", ""]]
        for name, arm in arms.items():
            gains = [f"{arm['gains'][r]['mean']:+.2f}{'' if r in arm['members'] else ' w'}" for r in REWARDS]
            gain, late = arm["accuracy_gain"], arm["accuracy_second_half"]
            gap = f"{arm['panel']['gap'][-1]:+.2f}"
            rows.append([name, *gains, gap, interval(arm["accuracy"]), interval(gain, "+"), f"{gain['p_value']:.2g}", interval(late, "+")])
        head = ["optimised", *REWARDS, "gap", "judge accuracy", "gain over none", "p (sign flips)", "of it, in the second half"]
        parts.append(f"**{method}**\n\n{table(head, rows)}")
    s = found["settings"]
    budget = s["budget"] if "budget" in s else s["evaluations"]  # its name until 2026-11-24
    facts = f"{s['prompts']} {s['split']} prompts, {budget} evaluations, seed {s['seed']}; {found['device']}, {found['date']}"
    return "\n\n".join([*parts, f"w: watched only. {facts}; `{found['command']}`"]) + "\n"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Optimised gain, held-out gain and judge accuracy over evaluations, a line for each arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = ("#d9480f", "#f08c00", "#868e96", "#2563eb", "#0b7285", "#2b8a3e", "#9c36b5")
    titles = ("optimised rewards, mean gain (std. deviations)", f"{HELD_OUT}, held out: gain (std. deviations)", "judge accuracy")
    figure = Figure(figsize=(13, 7), dpi=100, layout="constrained")
    grid = figure.subplots(len(found["methods"]), 3, squeeze=False, sharex=True)
    for line, (method, arms) in zip(grid, found["methods"].items(), strict=True):
        for color, (name, arm) in zip(colors, arms.items(), strict=False):
            held_out = arm["panel"]["watched"][HELD_OUT]
            for axes, curve in zip(line, (arm["panel"]["optimised"], held_out, arm["accuracy_curve"]), strict=True):
                axes.plot(curve, color=color, linewidth=1.7, label=name)
        for axes, title in zip(line, titles, strict=True):
            axes.set_title(f"{method}: {title}", fontsize=9)
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("evaluation", fontsize=9)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    main()
