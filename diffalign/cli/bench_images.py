"""The images of `diffalign bench`: what each method's folder lacks, made from the same noises, "none" first."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffalign.benchmarks.base import Item, Record
from diffalign.cli import parts
from diffalign.cli.commands import Bench
from diffalign.evaluation import machine, resolved
from diffalign.evaluation.cost import Meter
from diffalign.evaluation.folders import open_run, record_session
from diffalign.evaluation.generation import Generated, encoded, generate_missing, to_make
from diffalign.evaluation.processes import Interrupted, Share
from diffalign.files import write_json
from diffalign.images import read_pixels
from diffalign.pipelines.aligned import AlignedPipeline
from diffalign.rewards import RewardMix
from diffalign.types import NoiseMethod

SHAPES_BATCH = 32


def complete(
    options: Bench,
    settings: Mapping[str, Record],
    known: Record,
    stale: Sequence[str],
    mix: Mapping[str, float],
    items: Sequence[Item],
    share: Share,
) -> None:
    """Makes the images that are not there yet. settings: method -> its own. stale: methods whose images are to be deleted first.

    Folders are opened, and images deleted, when the models are there: a call that cannot make images leaves everything as it was.
    Raises Interrupted at Ctrl-C.
    """
    out, run = options.run.out, options.run
    items, total = share.shard.of(items), len(share.shard.of(items)) * len(settings)
    missing = {name: [item for item in items if name in stale or not item.is_done(out / name)] for name in settings}
    lacking = sum(map(len, missing.values()))
    if 0 < lacking < total:
        print(f"{total - lacking} of {total} images are already in {out}; continuing")
    loaded = None
    try:
        if lacking:
            loaded = parts.load_parts(options.model, options.rewards, mix)
        made = {"resolved": resolved.after_loading(loaded[0], options.model.arguments())} if loaded else {}

        def start(main: bool) -> None:
            for name in settings:
                open_run(out / name, {**settings[name], **known, **made}, run.overwrite and main, run.allow_changed_versions)
                if loaded and missing[name]:
                    record_session(out / name, {**resolved.session(loaded[0].device), "versions": known["versions"]})

        share.main_first(start)
        if loaded:
            generate(options, *loaded, {name: items for name, lacks in missing.items() if lacks})
    except KeyboardInterrupt as stop:
        done = sum(item.is_done(out / name) for name in settings for item in items)
        raise Interrupted(f"interrupted: {done} of {total} images are finished in {out}; the same command continues") from stop


def generate(options: Bench, pipeline: AlignedPipeline, reward: RewardMix | None, wanted: Mapping[str, Sequence[Item]]) -> None:
    """Makes what is missing of each method's items, "none" first: the others record how far their start is from its image."""
    out = options.run.out
    write_json(out / "machine.json", machine.machine(pipeline.device))
    if reward:
        write_json(out / "reward.json", reward.settings())
    size = options.model.batch(SHAPES_BATCH)
    for name, items in wanted.items():
        method = parts.search_method(name, reward, options.budget, options.search)
        budget = options.budget if method else 1
        images = sum(map(len, to_make(items, out / name, size)))
        total = None if method and options.search.seconds is not None else images * budget
        with tqdm(total=total, unit="evaluation", desc=name, disable=None) as bar, one_warning_of_cut_text():
            generate_missing(items, out / name, maker(options, pipeline, reward, method, budget, bar), size)


@contextmanager
def one_warning_of_cut_text() -> Iterator[None]:
    """Lists of long prompts would warn with every batch; the report says how many were cut."""
    seen: list[str] = []

    def first(record: logging.LogRecord) -> bool:
        cut = "are longer than the model" in record.msg
        seen.extend([record.msg] * cut)
        return not cut or len(seen) == 1

    logger = logging.getLogger("diffalign.pipelines.inputs")
    logger.addFilter(first)
    try:
        yield
    finally:
        logger.removeFilter(first)


def maker(
    options: Bench, pipeline: AlignedPipeline, reward: RewardMix | None, method: NoiseMethod | None, budget: int, bar: tqdm
) -> Callable[[Sequence[Item]], list[Generated]]:
    """The function from a batch of items to their images and traces."""
    steps = parts.guidance_method(options.guidance)

    def make(batch: Sequence[Item]) -> list[Generated]:
        finished = bar.n + len(batch) * budget
        with Meter(pipeline) as meter:
            output = pipeline(
                [item.prompt for item in batch],
                seed=[item.seed for item in batch],
                plugins=[plugin for plugin in (parts.of_batch(method, options.search, len(batch)), steps) if plugin],
                progress=lambda event: bar.update(len(event.rows)),
                **options.model.arguments(),
            )
        if method is None:
            prompts = [item.prompt for item in batch]
            scores = parts.score_images(reward, output.images, prompts, pipeline.device) if reward else [{} for _ in batch]
            traces = [{"method": "none", "best": 0, "rewards": rewards} for rewards in scores]
            costs = meter.costs(len(batch))
        else:
            traces = [output.trace.sample(i) for i in range(len(batch))]
            backward = [cost.backward_passes for cost in output.cost] if output.cost else None
            costs = meter.costs(len(batch), [len(trace["rewards"]["total"]) for trace in traces], backward)
            for item, trace, image in zip(batch, traces, output.initial_images, strict=True):
                without = read_pixels(item.image_path(options.run.out / "none")).astype(int)
                start = np.asarray(Image.open(io.BytesIO(encoded(item, image))).convert("RGB"))  # with a JPEG's losses, where it is one
                trace["start_difference"] = int(np.abs(start - without).max())
        bar.update(finished - bar.n if bar.total else 0)  # samples that stopped early count as done
        return [
            Generated(image, machine.finite_or_none({**cost, "cut_text": cut, **trace}))
            for image, cost, cut, trace in zip(output.images, costs, output.truncated, traces, strict=True)
        ]

    return make
