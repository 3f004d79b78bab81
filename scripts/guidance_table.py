"""Measures what cheaper guidance costs on the shapes model: `python scripts/guidance_table.py --out outputs/guidance`.

For each number of steps: calibrates Adaptive Guidance, fits LinearAG and searches a policy, all on validation prompts; then makes the
images of test prompts with every method from the same noises, batch by batch and the methods in turns, and compares them with full
guidance: evaluations, seconds, the judge's verdicts with a paired interval, SSIM and an LPIPS-like distance. Writes guidance.json,
table.md (with what guidance_overhead.py wrote, if it did) and two figures; `--publish docs` puts them into the documents. Whatever has
been made is kept, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from diffalign.benchmarks.shapes.benchmark import ShapesBenchmark
from diffalign.evaluation import machine
from diffalign.evaluation.similarity import perceptual_distance, ssim
from diffalign.files import read_json, whole_file, write_json, write_text
from diffalign.hub import load_pipeline
from diffalign.methods.adaptive_guidance import AdaptiveGuidance, calibrate
from diffalign.methods.guidance import Guidance, PlannedPolicy
from diffalign.methods.guidance_rivals import DeltaReuse, FixedFraction, IntervalGuidance
from diffalign.methods.guidance_search import SearchedGuidance, SearchSettings, search
from diffalign.methods.linear_guidance import LinearCoefficients, LinearGuidance, LinearSettings
from diffalign.methods.linear_guidance_fit import LinearFit
from diffalign.pipelines.batches import fixed_batches
from diffalign.pipelines.presets import get_preset
from diffalign.reports.statistics import paired_difference
from diffalign.shapes.detector import judge_images

REFRESH = (3, 4)
SAVINGS = (0.25, 0.35)  # the two goals
LINEAR = {  # the paper's plan with either tail, where no prediction is worse than none; and the plans that the fit chooses
    "linear, paper's plan": LinearSettings(limit=1.0),
    "linear, paper's plan, tail predicted": LinearSettings(limit=1.0, tail="estimate"),
    **{f"linear, chosen {1 - saving:g}": LinearSettings(budget=1 - saving) for saving in SAVINGS},
}

COLORS = {"adaptive": "#2563eb", "linear": "#2f9e44", "searched": "#9c36b5", "interval": "#868e96", "fixed": "#868e96", "reuse": "#868e96",
          "steps": "#d9480f"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    pipeline = load_pipeline(args.pipeline, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    result = {
        "date": now(),
        "command": shlex.join(["python", "scripts/guidance_table.py", *(sys.argv[1:] if argv is None else argv)]),
        **machine.machine(pipeline.device),
        "config": {name: value if not isinstance(value, Path) else value.name for name, value in vars(args).items()},
        "guidance_scale": pipeline.defaults["guidance_scale"],
        "steps": {
            str(steps): measure(pipeline, steps, args.limit[i], args.turns[i] if args.turns else 0, args)
            for i, steps in enumerate(args.steps)
        },
    }
    if (overhead := args.out / "guidance_overhead.json").is_file():
        result["overhead"] = read_json(overhead)
    write_json(args.out / "guidance.json", result)
    write_text(args.out / "table.md", markdown(result))
    figures(result, args.out)
    if args.publish:
        write_json(args.publish / "results" / "guidance_shapes.json", result)
        figures(result, args.publish / "images")
        publish(args.publish / "adaptive_guidance.md", "results", markdown(result))
    print(markdown(result))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="shapes")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--limit", type=int, nargs="+", default=[312, 104], help="test prompts for each of --steps, spread over the tasks")
    parser.add_argument("--fit-samples", type=int, default=200, help="validation trajectories for calibration and LinearAG")
    parser.add_argument("--search-iterations", type=int, default=40)
    parser.add_argument("--search-batch", type=int, default=8)
    parser.add_argument("--search-prompts", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=26)
    parser.add_argument("--turns", type=int, nargs="+", help="for each of --steps: time the methods anew on one batch, in so many turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/guidance"))
    parser.add_argument("--publish", type=Path, metavar="DOCS", help="the documents' folder, to replace what it shows")
    args = parser.parse_args(argv)
    for name, values in (("limit", args.limit), ("turns", args.turns or args.steps)):
        if len(values) != len(args.steps):
            parser.error(f"--{name} must be given once for each of --steps; got {len(values)} for {len(args.steps)}")
    return args


# ---- on validation prompts ---------------------------------------------------------------------------------------------------------


class Together(Guidance):
    """Full guidance under which several methods that only record look on, so that one pass serves all."""

    name: ClassVar[str] = "together"

    def __init__(self, methods: Sequence[Guidance]) -> None:
        self.methods, self.policies = methods, []

    def settings(self) -> dict[str, Any]:
        return {}

    def begin(self, run: Any) -> PlannedPolicy:
        policies = [method.begin(run) for method in self.methods]

        class Watched(PlannedPolicy):
            def observe(self, step: int, x: Any, c: Any, u: Any) -> None:
                for policy in policies:
                    policy.complete(step, x, c, u)

        self.policies.append(policies)
        return Watched(run, ["both"] * run.steps)


def prepare(pipeline: Any, steps: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Calibration, fits and search, kept in `folder`."""
    recorded, policy = folder / "recorded.json", folder / "searched_guidance.json"
    if not recorded.is_file():
        items = ShapesBenchmark("validation", 1, args.fit_samples, args.seed).items()
        fit, spaces = LinearFit(), ("x0", "model_output")  # the curve in epsilon is for the figure alone
        watch = Together([*(AdaptiveGuidance(threshold=math.inf, space=space) for space in spaces), fit])
        for start in tqdm(range(0, len(items), args.batch_size), desc=f"{steps} steps, recording", disable=None):
            call(pipeline, items[start : start + args.batch_size], steps, watch, "latent")
        series = {space: [each for run in watch.policies for each in run[i].diagnostics["cosine"]] for i, space in enumerate(spaces)}
        residuals = {}
        for name, settings in LINEAR.items():
            coefficients = fit.solve(settings)
            coefficients.save(folder / slug(name))
            residuals[name] = {str(step): value for step, value in coefficients.residuals.items()}
        write_json(recorded, {"cosines": series, "residuals": residuals})
    cosines, residuals = (read_json(recorded)[name] for name in ("cosines", "residuals"))
    refreshed = {f"adaptive, refresh {refresh}": calibrate(cosines["x0"], refresh=refresh) for refresh in REFRESH}
    if not policy.is_file():
        prompts = [item.prompt for item in ShapesBenchmark("validation", 1, args.search_prompts, args.seed).items()]
        settings = SearchSettings(iterations=args.search_iterations)
        shuffled = [prompts[i] for i in np.random.default_rng(args.seed).permutation(len(prompts))]  # they are sorted by task
        batches = fixed_batches(pipeline, shuffled, args.search_batch, args.seed, {"num_inference_steps": steps})
        with batches as sample, tqdm(total=settings.iterations, desc=f"{steps} steps, searching", disable=None) as bar:
            found = search(sample, steps, pipeline.defaults["guidance_scale"], settings, lambda i, values: bar.update())
        found.save(policy)
    return {
        "trajectories": len(cosines["x0"]),
        "curves": {space: np.quantile(np.array(each), [0.1, 0.5, 0.9], axis=0).round(6).tolist() for space, each in cosines.items()},
        "thresholds": {"adaptive, preset": get_preset(args.pipeline).cosine_threshold, "adaptive": calibrate(cosines["x0"]), **refreshed},
        "residuals": residuals,
        "policy": list(SearchedGuidance.load(policy).strengths),
    }


def methods(steps: int, prepared: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, Any]]:
    """Name -> (steps, method)."""
    thresholds = prepared["thresholds"]
    runs: dict[str, tuple[int, Any]] = {
        "full": (steps, None),
        "adaptive, preset": (steps, AdaptiveGuidance(threshold=thresholds["adaptive, preset"])),
        "adaptive": (steps, AdaptiveGuidance(threshold=thresholds["adaptive"])),
        **{
            f"adaptive, refresh {each}": (steps, AdaptiveGuidance(threshold=thresholds[f"adaptive, refresh {each}"], refresh=each))
            for each in REFRESH
        },
        **{name: (steps, LinearGuidance(LinearCoefficients.load(folder / slug(name)))) for name in LINEAR},
        "searched": (steps, SearchedGuidance.load(folder / "searched_guidance.json")),
        "interval": (steps, IntervalGuidance()),
    }
    for saving in SAVINGS:
        share = round(1 - 2 * saving, 6)
        runs[f"fixed {share:g}"] = (steps, FixedFraction(fraction=share))
        runs[f"reuse {share:g}"] = (steps, DeltaReuse(fraction=share))
        runs[f"{round(steps * (1 - saving))} steps"] = (round(steps * (1 - saving)), None)
    return runs


# ---- on test prompts -----------------------------------------------------------------------------------------------------------------


def call(pipeline: Any, items: Sequence[Any], steps: int, method: Any, output_type: str = "pil") -> Any:
    return pipeline(
        [item.prompt for item in items],
        seed=[item.seed for item in items],
        num_inference_steps=steps,
        plugins=[method] if method is not None else (),
        output_type=output_type,
    )


def generate(pipeline: Any, items: Sequence[Any], runs: Mapping[str, tuple[int, Any]], size: int, folder: Path) -> dict[str, Any]:
    """Name -> images "b h w 3" uint8, evaluations of every item, seconds and CPU seconds of every batch; from `folder` where it has them.

    Batch by batch, and within a batch one method after the other, from another one each time: a slow minute falls on all.
    """
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in runs}
    names = list(runs)
    with tqdm(total=math.ceil(len(items) / size) * len(runs), desc=folder.name, disable=None) as bar:
        for number, start in enumerate(range(0, len(items), size)):
            batch = items[start : start + size]
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                parts[name].append(one_batch(pipeline, batch, *runs[name], folder / f"{slug(name)}-{start:04d}-{len(batch)}.npz"))
                bar.update()
    return {name: {key: np.concatenate([part[key] for part in made]) for key in made[0]} for name, made in parts.items()}


def one_batch(pipeline: Any, batch: Sequence[Any], steps: int, method: Any, file: Path) -> dict[str, np.ndarray]:
    if file.is_file():
        return dict(np.load(file))
    began, began_cpu = time.perf_counter(), time.process_time()
    out = call(pipeline, batch, steps, method)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    made = {
        "images": np.stack([np.asarray(image.convert("RGB")) for image in out.images]),
        "evaluations": np.array(out.guidance.evaluations if out.guidance else [2 * steps] * len(batch)),
        "seconds": np.array([seconds]),
        "cpu": np.array([cpu]),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **made)
    return made


def timings(pipeline: Any, items: Sequence[Any], runs: Mapping[str, tuple[int, Any]], turns: int, file: Path) -> dict[str, Any] | None:
    """Seconds and CPU seconds of every turn, of the same batch under every method, from `file` where there are none to be made."""
    if not turns:
        return read_json(file) if file.is_file() else None
    found: dict[str, Any] = {name: {"seconds": [], "cpu": []} for name in runs}
    for turn in tqdm(range(turns + 1), desc="timing", disable=None):
        for name, (steps, method) in sorted(runs.items(), reverse=bool(turn % 2)):
            began, began_cpu = time.perf_counter(), time.process_time()
            call(pipeline, items, steps, method)
            if turn:  # the first warms up
                found[name]["seconds"].append(time.perf_counter() - began)
                found[name]["cpu"].append(time.process_time() - began_cpu)
    result = {"batch": len(items), "turns": turns, "date": now(), "methods": found}
    write_json(file, result)
    return result


def measure(pipeline: Any, steps: int, limit: int, turns: int, args: argparse.Namespace) -> dict[str, Any]:
    folder = args.out / f"{steps:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(pipeline, steps, args, folder)
    items = ShapesBenchmark("test", 1, limit, args.seed).items()
    # another order than by task, so that every batch holds all tasks
    items = [items[i] for i in np.random.default_rng(args.seed).permutation(len(items))]
    runs = methods(steps, prepared, folder)
    made = generate(pipeline, items, runs, args.batch_size, folder / "images")
    timed = timings(pipeline, items[: args.batch_size], runs, turns, folder / "timings.json")
    times = made if timed is None else {name: {kind: np.array(each[kind]) for kind in each} for name, each in timed["methods"].items()}
    per_call = len(items) / len(made["full"]["cpu"]) if timed is None else timed["batch"]
    metadata, full = [item.metadata for item in items], made["full"]
    verdicts = {name: [float(each.correct) for each in judge_images(made[name]["images"], metadata)] for name in made}
    rows = {}
    for name, each in made.items():
        difference = paired_difference(verdicts[name], verdicts["full"], [item.index for item in items], [item.task for item in items])
        likeness = ssim(each["images"], full["images"])
        saved = 1 - float(each["evaluations"].mean()) / (2 * steps)
        rows[name] = {
            "evaluations": float(each["evaluations"].mean()),
            "saved": saved,
            **{kind: float(np.median(times[name][kind])) / per_call for kind in ("cpu", "seconds")},
            # each is compared with the call under full guidance of its own batch or turn, which was made within minutes
            **{f"{kind}_saved": float(np.median(1 - times[name][kind] / times["full"][kind])) for kind in ("cpu", "seconds")},
            "accuracy": by_task(verdicts[name], items),
            "accuracy_difference": {"mean": difference.mean, "low": difference.low, "high": difference.high, "p": difference.p_value},
            "verdicts_changed": int(np.sum(np.array(verdicts[name]) != np.array(verdicts["full"]))),
            "ssim": {"mean": float(likeness.mean()), "low_5_percent": float(np.quantile(likeness, 0.05))},
            "lpips_like": float(perceptual_distance(pipeline.vae.encoder, each["images"], full["images"]).mean()),
        }
    return {"images": len(items), "methods": rows, **prepared, "timings": timed}


def by_task(verdicts: Sequence[float], items: Sequence[Any]) -> dict[str, float]:
    """The mean of each task, and their unweighted mean as "overall"."""
    tasks: dict[str, list[float]] = {}
    for verdict, item in zip(verdicts, items, strict=True):
        tasks.setdefault(item.task, []).append(verdict)
    means = {task: float(np.mean(values)) for task, values in sorted(tasks.items())}
    return {**means, "overall": float(np.mean(list(means.values())))}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name)


# ---- reports -------------------------------------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    lines = [f"{result['date']}, {result['device']}, guidance scale {result['guidance_scale']:g}, `{result['command']}`", ""]
    for steps, part in result["steps"].items():
        thresholds = ", ".join(f"{value:.4f} ({name})" for name, value in part["thresholds"].items())
        lines += [
            f"**{steps} steps, {part['images']} test prompts.** Adaptive Guidance stops at a cosine of {thresholds}.",
            "",
            "| method | evaluations | saved | CPU s | of it saved | kept | judge | difference (95 %) | changed | SSIM | LPIPS-like |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in part["methods"].items():
            change, kept = row["accuracy_difference"], f"{row['cpu_saved'] / row['saved']:.2f}" if row["saved"] > 0.01 else ""
            interval = "" if name == "full" else f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
            lines.append(
                f"| {name} | {row['evaluations']:.1f} | {100 * row['saved']:.1f} % | {row['cpu']:.3f} | "
                f"{100 * row['cpu_saved']:.1f} % | {kept} | {row['accuracy']['overall']:.3f} | {interval} | "
                f"{row['verdicts_changed']} | {row['ssim']['mean']:.4f} | {row['lpips_like']:.4f} |"
            )
        lines.append("")
    if overhead := result.get("overhead"):
        lines += [
            f"**The hook while it guides in full, and the first half of the steps guided**: {overhead['steps']} steps, "
            f"{overhead['device']}, {overhead['date']}, `{overhead['command']}`.",
            "",
            "| batch | CPU s a call | overhead of the hook | wall | saved by 25 % fewer evaluations | wall |",
            "|---|---|---|---|---|---|",
        ]
        for size, row in overhead["batch_sizes"].items():
            parts = [f"{100 * row[f'{kind}_{what}']:+.1f} %" for what in ("overhead", "saved_by_half") for kind in ("cpu", "wall")]
            lines.append(f"| {size} | {row['cpu_seconds']['without']:.3f} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def publish(page: Path, mark: str, text: str) -> None:
    """Replaces what stands between the page's marks of that name."""
    parts = re.split(rf"(<!-- {mark}:begin.*?-->\n|<!-- {mark}:end -->)", page.read_text(encoding="utf-8"))
    if len(parts) != 5:
        raise ValueError(f"{page} must have one pair of marks <!-- {mark}:begin --> and <!-- {mark}:end -->")
    write_text(page, "".join([parts[0], parts[1], text.rstrip() + "\n", parts[3], parts[4]]))


def figures(result: Mapping[str, Any], out: Path) -> None:
    """Cosine over steps in both spaces, and evaluations saved against difference from full guidance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def panels() -> tuple[Figure, Any]:
        figure = Figure(figsize=(5.5 * len(result["steps"]), 4), layout="constrained")
        return figure, zip(np.atleast_1d(figure.subplots(1, len(result["steps"]))), result["steps"].items(), strict=True)

    out.mkdir(parents=True, exist_ok=True)
    figure, pairs = panels()
    for axes, (steps, part) in pairs:
        for space, label, color in (("x0", "of x0", "#2563eb"), ("model_output", "of epsilon", "#d9480f")):
            low, middle, high = part["curves"][space]
            axes.plot(middle, color=color, label=f"{label}: median, 10 % to 90 %")
            axes.fill_between(range(len(middle)), low, high, color=color, alpha=0.2)
        axes.axhline(part["thresholds"]["adaptive"], color="#868e96", linestyle="--", label="threshold for 25 % fewer evaluations")
        axes.set(title=f"{steps} steps", xlabel="step", ylabel="cosine of the two branches", ylim=(None, 1.005))
        axes.legend(fontsize=8, loc="lower right")
    FigureCanvasAgg(figure).print_png(out / "guidance_cosine.png")
    figure, pairs = panels()
    for axes, (steps, part) in pairs:
        for name, row in part["methods"].items():
            if name == "full":
                continue
            kind = next(kind for kind in COLORS if kind in name)
            x, y = 100 * row["saved"], 1 - row["ssim"]["mean"]
            axes.scatter(x, y, color=COLORS[kind], s=18)
            axes.annotate(name, (x, y), fontsize=7, xytext=(4, 2), textcoords="offset points")
        axes.axhline(0.03, color="#868e96", linestyle="--", linewidth=1)
        axes.set(title=f"{steps} steps, {part['images']} test prompts", xlabel="evaluations saved, %", ylabel="1 - SSIM to full guidance",
                 xlim=(10, 46), ylim=(0, None))  # fmt: skip
    FigureCanvasAgg(figure).print_png(out / "guidance_tradeoff.png")


if __name__ == "__main__":
    main()
