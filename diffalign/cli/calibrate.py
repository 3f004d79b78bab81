"""`diffalign calibrate`: where rewards' scores lie on images of a model, so that a rule can compare them (docs/reward_mixing.md)."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from diffalign.benchmarks.base import item_seed
from diffalign.cli import parts, prompts
from diffalign.cli.commands import Calibrate
from diffalign.cli.options import Rewards
from diffalign.files import require_writable
from diffalign.rewards.calibration import from_scores
from diffalign.shapes import prompts as shapes_world

SHAPES_BATCH = 32


def run(options: Calibrate, command: str) -> int:
    """Generates, scores, writes. Raises ValueError or OSError with the sentence to show."""
    texts = collect(options)
    require_writable(options.out.parent)
    of_images, scores = measure(options, texts)
    source = f"{options.model.pipeline}, {len(texts)} prompts, {options.samples} images of each, seed {options.seed}"
    transforms = dict.fromkeys(options.logit, "logit")
    calibration = from_scores(scores, of_images, unit=options.unit, transforms=transforms, source=source)
    calibration.save(options.out)
    for name, member in calibration.members.items():
        within = "" if member.within is None else f", {member.within:.4g} within prompts"
        print(f"{name}: mean {member.mean:.4g}, standard deviation {member.std:.4g}{within}, {member.n} images")
    print(f"the calibration is in {options.out}")
    return 0


def collect(options: Calibrate) -> list[str]:
    """The prompts, all different, at most --limit of them."""
    given = prompts.collect((), options.prompts_file) if options.prompts_file else shapes_world.prompts("train")
    texts = list(dict.fromkeys(given))
    count = min(options.limit, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def measure(options: Calibrate, texts: Sequence[str]) -> tuple[list[str], dict[str, list[float]]]:
    """Prompts and scores of every image. Images are not kept."""
    rewards = Rewards(source=options.source)
    pipeline, reward = parts.load_parts(options.model, rewards, dict.fromkeys(options.reward, 1.0))
    jobs = [(text, item_seed(options.seed, i, k)) for i, text in enumerate(texts) for k in range(options.samples)]
    size, of_images, scores = options.model.batch(SHAPES_BATCH), [], {name: [] for name in options.reward}
    for at in tqdm(range(0, len(jobs), size), unit="batch", disable=None):
        batch, seeds = zip(*jobs[at : at + size], strict=True)
        output = pipeline(list(batch), seed=list(seeds), **options.model.arguments())
        for trace in parts.score_images(reward, output.images, batch, pipeline.device):
            for name in options.reward:
                scores[name] += trace[name]
        of_images += batch
    return of_images, scores
