"""`diffalign train linear-ag` and `guidance-search`: fit guidance that costs less to a pipeline."""

from __future__ import annotations

import random
from collections.abc import Mapping

from tqdm import tqdm

from diffalign.cli import parts
from diffalign.cli.options import FROM_FILE
from diffalign.cli.prompts import read as read_prompts
from diffalign.cli.train_commands import TrainLinear, TrainSearched, Trajectories
from diffalign.files import require_writable
from diffalign.methods.guidance_search import SearchSettings, search
from diffalign.methods.linear_guidance import LinearSettings
from diffalign.methods.linear_guidance_fit import HELD_OUT_EVERY, LinearFit
from diffalign.pipelines.batches import fixed_batches
from diffalign.shapes.prompts import prompts as shapes_prompts

SHAPES_BATCH, SHAPES_SEARCH_BATCH = 20, 8


def run_linear(options: TrainLinear, command: str) -> int:
    """Fits LinearAG and prints how well every step is predicted."""
    prompts, seed = training_prompts(options.on), options.on.seed
    require_writable(options.out.parent)
    if options.samples < HELD_OUT_EVERY:
        raise ValueError(f"--samples must be at least {HELD_OUT_EVERY}, of which one is held out; got {options.samples}")
    settings = LinearSettings(tail=options.tail, budget=options.budget)
    pipeline = parts.load_pipeline(options.model, videos=True)
    fit = LinearFit(settings)
    size = options.model.batch(SHAPES_BATCH)
    with tqdm(total=options.samples, unit="trajectory", disable=None) as bar:
        for start in range(0, options.samples, size):
            numbers = range(start, min(start + size, options.samples))
            pipeline(
                [prompts[i % len(prompts)] for i in numbers],
                seed=[seed + i for i in numbers],
                plugins=[fit],
                output_type="latent",
                **negative(options.on),
                **options.model.arguments(),
            )
            bar.update(len(numbers))
    coefficients = fit.solve()
    coefficients.save(options.out)
    evaluations = sum(2 if branch == "both" else 1 for branch in coefficients.branches)
    print(f"{coefficients.samples} trajectories fitted, {coefficients.held_out} held out")
    print("error of the predicted guidance, as a share of its size, on what was held out:")
    for step, residual in sorted(coefficients.residuals.items()):
        print(f"  step {step:3d}  {residual:.4f}{'' if step in coefficients.by_step else '  (too large: not guided)'}")
    print("steps that evaluate both branches: " + " ".join(str(i) for i, branch in enumerate(coefficients.branches) if branch == "both"))
    print(f"{evaluations} evaluations instead of {2 * len(coefficients.branches)}; saved in {options.out}")
    return 0


def run_search(options: TrainSearched, command: str) -> int:
    """Searches a policy and prints it."""
    prompts = training_prompts(options.on)
    require_writable(options.out)
    settings = SearchSettings(budget=options.budget, iterations=options.iterations)
    pipeline = parts.load_pipeline(options.model, videos=True)
    given = options.model.arguments()
    arguments = {**pipeline.defaults, **given}
    missing = [name for name in ("num_inference_steps", "guidance_scale") if name not in arguments]
    if missing:
        raise ValueError(f"--{' and --'.join(name.replace('num_inference_', '').replace('_', '-') for name in missing)} must be given with "
                         f"--pipeline {options.model.pipeline}, which has no defaults of its own")  # fmt: skip
    size = options.model.batch(SHAPES_SEARCH_BATCH)
    batches = fixed_batches(pipeline, prompts, size, options.on.seed, given, options.on.negative_prompt)
    with batches as sample, tqdm(total=settings.iterations, disable=None) as bar:

        def progress(iteration: int, figures: Mapping[str, float]) -> None:
            bar.update()
            bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)

        policy = search(sample, arguments["num_inference_steps"], arguments["guidance_scale"], settings, progress)
    policy.save(options.out / FROM_FILE["searched"])
    evaluations = sum(1 if strength in (0.0, 1.0) else 2 for strength in policy.strengths)
    print("strength of guidance at every step (0: unconditional alone, 1: conditional alone):")
    print("  " + " ".join(f"{strength:g}" for strength in policy.strengths))
    print(f"{evaluations} evaluations instead of {2 * len(policy.strengths)}; saved in {options.out}")
    return 0


def training_prompts(on: Trajectories) -> list[str]:
    """Those of the file, or of the shapes world's validation split."""
    if on.prompts_file is not None:
        return read_prompts(on.prompts_file)
    ordered = shapes_prompts("validation")
    return random.Random(0).sample(ordered, len(ordered))  # the split is sorted by task, and the first few should hold all


def negative(on: Trajectories) -> dict[str, str]:
    return {} if on.negative_prompt is None else {"negative_prompt": on.negative_prompt}
