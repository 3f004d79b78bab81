"""Measures what cheaper guidance costs on the shapes model: `python scripts/guidance_table.py --out outputs/guidance`.

For each number of steps: calibrates Adaptive Guidance, fits LinearAG and searches a policy, all on validation prompts; then makes the
images of the test prompts with every method from the same noises, and compares them with full guidance: evaluations, seconds, the judge's
verdicts with a paired interval, SSIM and an LPIPS-like distance. Writes guidance.json, table.md and two figures. Images and everything
fitted are kept, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffalign.benchmarks.shapes import ShapesBenchmark
from diffalign.benchmarks.similarity import perceptual_distance, ssim
from diffalign.benchmarks.statistics import paired_difference
from diffalign.commands import options
from diffalign.files import read_json, whole_file, write_json, write_text
from diffalign.hub import load_pipeline
from diffalign.methods.adaptive_guidance import AdaptiveGuidance, calibrate
from diffalign.methods.guidance_rivals import DeltaReuse, FixedFraction, IntervalGuidance
from diffalign.methods.guidance_search import SearchedGuidance, SearchSettings, search
from diffalign.methods.linear_guidance import LinearCoefficients, LinearGuidance, LinearSettings
from diffalign.methods.linear_guidance_fit import LinearFit
from pipelines import inputs, state

SAVINGS = (0.25, 0.375)  # Adaptive Guidance's goal, and what LinearAG's plan saves at 20 steps


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    pipeline = load_pipeline(args.pipeline, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    if args.guidance_scale is not None:
        pipeline.defaults = {**pipeline.defaults, "guidance_scale": args.guidance_scale}
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "scripts/guidance_table.py", *(sys.argv[1:] if argv is None else argv)]),
        "device": options.device_name(pipeline),
        "versions": options.versions(),
        "config": {name: value if not isinstance(value, Path) else value.name for name, value in vars(args).items()},
        "guidance_scale": pipeline.defaults["guidance_scale"],
        "steps": {str(steps): measure(pipeline, steps, args) for steps in args.steps},
    }
    write_json(args.out / "guidance.json", result)
    write_text(args.out / "table.md", markdown(result))
    figures(result, args.out)
    print(markdown(result))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="shapes")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--limit", type=int, help="test prompts, spread evenly over the tasks (default: all)")
    parser.add_argument("--samples", type=int, default=1, help="images per prompt")
    parser.add_argument("--fit-samples", type=int, default=200, help="validation trajectories for calibration and LinearAG")
    parser.add_argument("--search-iterations", type=int, default=80)
    parser.add_argument("--search-batch", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=30)
    parser.add_argument("--timing-batch", type=int, default=8, help="images per timed call")
    parser.add_argument("--timing-repeats", type=int, default=5, help="timed calls of each method, taken in turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--out", type=Path, default=Path("outputs/guidance"))
    return parser.parse_args(argv)


# ---- one number of steps -------------------------------------------------------------------------------------------------------------


def measure(pipeline: Any, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    folder = args.out / f"{steps:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(pipeline, steps, args, folder)
    items = ShapesBenchmark("test", args.samples, args.limit, args.seed).items()
    runs = methods(steps, prepared, folder)
    made = {name: generate(pipeline, items, own, method, args, folder / f"{slug(name)}.npz") for name, (own, method) in runs.items()}
    seconds = timings(pipeline, items, runs, args, folder / "timings.json")
    verdicts = {name: judge(each["images"], items) for name, each in made.items()}
    full = made["full"]["images"]
    rows = {}
    for name, each in made.items():
        difference = paired_difference(verdicts[name], verdicts["full"], [item.index for item in items], [item.task for item in items])
        likeness, distance = ssim(each["images"], full), perceptual_distance(pipeline.vae.encoder, each["images"], full)
        evaluations = each["evaluations"].astype(float)
        rows[name] = {
            "evaluations": float(evaluations.mean()),
            "saved": 1 - float(evaluations.mean()) / (2 * steps),
            "accuracy": by_task(verdicts[name], items),
            "accuracy_difference": {"mean": difference.mean, "low": difference.low, "high": difference.high, "p": difference.p_value},
            "ssim": {"mean": float(likeness.mean()), "low_5_percent": float(np.quantile(likeness, 0.05))},
            "lpips_like": float(distance.mean()),
            **seconds[name],
        }
        promised, kept = rows[name]["saved"], 1 - seconds[name]["denoising"] / seconds["full"]["denoising"]
        rows[name]["kept_of_promise"] = kept / promised if promised > 0.01 else None
    return {"images": len(items), "methods": rows, **{name: prepared[name] for name in ("curves", "threshold", "policy", "residuals")}}


def methods(steps: int, prepared: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, Any]]:
    """Name -> (steps, method)."""
    runs: dict[str, tuple[int, Any]] = {
        "full": (steps, None),
        "adaptive": (steps, AdaptiveGuidance(threshold=prepared["threshold"])),
        "searched": (steps, SearchedGuidance.load(folder / "searched_guidance.json")),
        "linear": (steps, LinearGuidance(LinearCoefficients.load(folder / "linear"))),
        "interval": (steps, IntervalGuidance()),
    }
    for saving in SAVINGS:
        share = 1 - 2 * saving
        runs[f"fixed {share:g}"] = (steps, FixedFraction(fraction=share))
        runs[f"reuse {share:g}"] = (steps, DeltaReuse(fraction=share))
        fewer = round(steps * (1 - saving))
        runs[f"{fewer} steps"] = (fewer, None)
    return runs


def prepare(pipeline: Any, steps: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Calibration, fit and search on validation prompts, kept in `folder`."""
    done = folder / "prepared.json"
    if done.is_file():
        return read_json(done)
    items = ShapesBenchmark("validation", 1, args.fit_samples, args.seed).items()
    curves, fit = {}, LinearFit(LinearSettings())
    for space in ("x0", "model_output"):
        cosines: list[list[float]] = []
        for start in tqdm(range(0, len(items), args.batch_size), desc=f"{steps} steps, recording {space}", disable=None):
            out = call(pipeline, items[start : start + args.batch_size], steps, AdaptiveGuidance(threshold=math.inf, space=space), "latent")
            cosines += out.guidance.diagnostics["cosine"]
        curves[space] = np.quantile(np.array(cosines), [0.1, 0.5, 0.9], axis=0).round(6).tolist()
        if space == "x0":
            threshold = calibrate(cosines, share=0.5)
    for start in tqdm(range(0, len(items), args.batch_size), desc=f"{steps} steps, fitting LinearAG", disable=None):
        call(pipeline, items[start : start + args.batch_size], steps, fit, "latent")
    coefficients = fit.solve()
    coefficients.save(folder / "linear")
    policy = find_policy(pipeline, items, steps, args)
    policy.save(folder / "searched_guidance.json")
    residuals = {str(step): value for step, value in coefficients.residuals.items()}
    write_json(done, {"curves": curves, "threshold": threshold, "policy": list(policy.strengths), "residuals": residuals})
    return read_json(done)


def find_policy(pipeline: Any, items: Sequence[Any], steps: int, args: argparse.Namespace) -> SearchedGuidance:
    def sample(i: int, method: Any) -> torch.Tensor:
        batch = [items[(i * args.search_batch + j) % len(items)] for j in range(args.search_batch)]
        conditioning = pipeline.encode([item.prompt for item in batch])
        noise = pipeline.draw_noise(inputs.make_generators([item.seed for item in batch]))
        with ExitStack() as stack:
            if method is not None:
                stack.enter_context(pipeline.guide(method))
            return pipeline.noise_to_images(noise, conditioning, {"num_inference_steps": steps}, output_type="latent")

    settings = SearchSettings(iterations=args.search_iterations)
    with ExitStack() as stack, tqdm(total=settings.iterations, desc=f"{steps} steps, searching", disable=None) as bar:
        for change in (state.frozen, state.own_scheduler):
            stack.enter_context(change(pipeline))
        return search(sample, steps, pipeline.defaults["guidance_scale"], settings, lambda i, values: bar.update())


def call(pipeline: Any, items: Sequence[Any], steps: int, method: Any, output_type: str = "pil") -> Any:
    return pipeline(
        [item.prompt for item in items],
        seed=[item.seed for item in items],
        num_inference_steps=steps,
        plugins=[method] if method is not None else (),
        output_type=output_type,
    )


def generate(pipeline: Any, items: Sequence[Any], steps: int, method: Any, args: argparse.Namespace, file: Path) -> dict[str, np.ndarray]:
    """Images "b h w 3" uint8 and evaluations of every item, from `file` where it has them."""
    if file.is_file():
        found = dict(np.load(file))
        if len(found["images"]) == len(items):
            return found
    images, evaluations = [], []
    for start in tqdm(range(0, len(items), args.batch_size), desc=file.stem, disable=None):
        batch = items[start : start + args.batch_size]
        out = call(pipeline, batch, steps, method)
        images += [np.asarray(image.convert("RGB")) for image in out.images]
        evaluations += out.guidance.evaluations if out.guidance else [2 * steps] * len(batch)
    made = {"images": np.stack(images), "evaluations": np.array(evaluations)}
    with whole_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **made)
    return made


def timings(
    pipeline: Any, items: Sequence[Any], runs: Mapping[str, tuple[int, Any]], args: argparse.Namespace, file: Path
) -> dict[str, Any]:
    """Median seconds per image of whole calls and of denoising alone; methods take turns, so that a slow minute falls on all."""
    if file.is_file() and set(read_json(file)) == set(runs):
        return read_json(file)
    batch = items[: args.timing_batch]
    measured: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "denoising": []} for name in runs}
    for turn in tqdm(range(args.timing_repeats + 1), desc="timing", disable=None):
        for name, (steps, method) in runs.items():
            for kind, output_type in (("seconds", "pil"), ("denoising", "latent")):
                began = time.perf_counter()
                call(pipeline, batch, steps, method, output_type)
                if turn:  # the first warms up
                    measured[name][kind].append((time.perf_counter() - began) / len(batch))
    medians = {name: {kind: float(np.median(values)) for kind, values in kinds.items()} for name, kinds in measured.items()}
    write_json(file, medians)
    return medians


def judge(images: np.ndarray, items: Sequence[Any]) -> list[float]:
    from diffalign.shapes.detector import judge_images

    return [float(verdict.correct) for verdict in judge_images(images, [item.metadata for item in items])]


def by_task(verdicts: Sequence[float], items: Sequence[Any]) -> dict[str, float]:
    """The mean of each task, and their unweighted mean as "overall"."""
    tasks: dict[str, list[float]] = {}
    for verdict, item in zip(verdicts, items, strict=True):
        tasks.setdefault(item.task, []).append(verdict)
    means = {task: float(np.mean(values)) for task, values in tasks.items()}
    return {**means, "overall": float(np.mean(list(means.values())))}


def slug(name: str) -> str:
    return name.replace(" ", "-").replace(".", "_")


# ---- reports -------------------------------------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    lines = [f"{result['date']}, {result['device']}, guidance scale {result['guidance_scale']:g}, `{result['command']}`", ""]
    for steps, part in result["steps"].items():
        lines += [
            f"**{steps} steps, {part['images']} test images.** Adaptive Guidance stops at a cosine of {part['threshold']:.5g}.",
            "",
            "| method | evaluations | saved | seconds | of what was promised | judge accuracy | difference (95 %) | SSIM | LPIPS-like |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in part["methods"].items():
            change = row["accuracy_difference"]
            kept = "" if row["kept_of_promise"] is None else f"{row['kept_of_promise']:.2f}"
            interval = "" if name == "full" else f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
            lines.append(
                f"| {name} | {row['evaluations']:.1f} | {100 * row['saved']:.1f} % | {row['seconds']:.3f} | {kept} | "
                f"{row['accuracy']['overall']:.3f} | {interval} | {row['ssim']['mean']:.3f} | {row['lpips_like']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines)


def figures(result: Mapping[str, Any], out: Path) -> None:
    """Cosine over steps in both spaces, and evaluations saved against difference from full guidance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(result["steps"]), 3.6), layout="constrained")
    for axes, (steps, part) in zip(np.atleast_1d(figure.subplots(1, len(result["steps"]))), result["steps"].items(), strict=True):
        for space, label, color in (("x0", "of x0", "#2563eb"), ("model_output", "of epsilon", "#d9480f")):
            low, middle, high = part["curves"][space]
            axes.plot(middle, color=color, label=label)
            axes.fill_between(range(len(middle)), low, high, color=color, alpha=0.2)
        axes.axhline(part["threshold"], color="#868e96", linestyle="--", label="threshold")
        axes.set(title=f"{steps} steps", xlabel="step", ylabel="cosine of the two branches")
        axes.legend()
    FigureCanvasAgg(figure).print_png(out / "guidance_cosine.png")
    figure = Figure(figsize=(5 * len(result["steps"]), 3.6), layout="constrained")
    for axes, (steps, part) in zip(np.atleast_1d(figure.subplots(1, len(result["steps"]))), result["steps"].items(), strict=True):
        for name, row in part["methods"].items():
            if name != "full":
                axes.scatter(100 * row["saved"], 1 - row["ssim"]["mean"], color="#2563eb")
                axes.annotate(name, (100 * row["saved"], 1 - row["ssim"]["mean"]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set(title=f"{steps} steps", xlabel="evaluations saved, %", ylabel="1 - SSIM to full guidance")
    FigureCanvasAgg(figure).print_png(out / "guidance_tradeoff.png")


if __name__ == "__main__":
    main()
