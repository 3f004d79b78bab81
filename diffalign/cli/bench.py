"""`diffalign bench NAME`: generate a benchmark's images with several methods, judge them, and print one table.

Every method starts from the same noises, and "none" (the same noises, no search) is always among them, since it is what the others are
compared with. Generation and judging meet only on disk: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from diffalign.benchmarks.base import Benchmark, Item, Record
from diffalign.cli import parts
from diffalign.cli.bench_images import complete
from diffalign.cli.commands import Bench
from diffalign.evaluation import machine, panels, resolved
from diffalign.evaluation.folders import check_run, require_prompts
from diffalign.evaluation.judging import judge, rows_in_common
from diffalign.evaluation.processes import Share, share_of
from diffalign.evaluation.store import Shard
from diffalign.files import read_json, require_writable, whole_file
from diffalign.images import read_pixels
from diffalign.reports.plots import Pair, grid
from diffalign.reports.run_files import partial, protocol_in_words, write_official, write_units
from diffalign.reports.summary import Judged, summarise_run, write_report

SAME_IMAGE_TOLERANCE = 16  # of 255; a start that differs by more from "none" was not made from the same noise


def run(options: Bench, command: str) -> int:
    """Generates what is missing, judges, reports. Raises ValueError or OSError with the sentence to show, Interrupted at Ctrl-C."""
    share = share_of(Shard.parse(options.run.shard) if options.run.shard else None, options.model.device)
    options = replace(options, model=replace(options.model, device=share.device))
    require_writable(options.run.out)
    if options.run.grid:
        require_writable(options.run.grid.parent)
    benchmark = options.row.load().build(options.own, options.context())
    benchmark.ready()  # fails before hours of generation, not after
    return judge_images(options, benchmark, share) if options.run.images else make_and_judge(options, benchmark, share, command)


def make_and_judge(options: Bench, benchmark: Benchmark, share: Share, command: str) -> int:
    out, stage, mix = options.run.out, options.run.stage, options.mix()
    parts.warn_of_unknown_words(options.model.pipeline, [item.prompt for item in benchmark.items()])
    settings = {name: {**run_settings(options, name, mix), **benchmark.settings()} for name in options.methods}
    known = resolved.before_loading(str(options.model.pipeline), replaced(options))
    makes = stage in ("all", "generate")
    may = (options.run.overwrite and makes, options.run.allow_changed_versions)
    stale = [name for name in settings if check_run(out / name, {**settings[name], **known}, *may)]
    if makes:
        complete(options, settings, known, stale, mix, benchmark.items(), share)
    folders = {name: out / name for name in settings}
    for folder in folders.values():
        benchmark.export(folder)
    if stage == "generate":
        print(f"images are in {out}; --stage score judges them")
        return 0
    benchmark = with_judges(options, benchmark)
    if stage != "report":
        judge(benchmark, list(folders.values()), share.shard)
    share.wait()
    if not share.reports:
        where = f"shard {share.shard.index}/{share.shard.count} is done in {out}"
        print(f"{where}; the same command with --stage report, and no --shard, sums all up")
        return 0
    print(report(options, benchmark, folders, mix, command), end="")
    print(f"\nrows, summary.json and table.md are in {out}")
    return 0


def judge_images(options: Bench, benchmark: Benchmark, share: Share) -> int:
    """Judges --images where they lie: scores/, results.jsonl and the official files go into that folder, the report to --out."""
    folder = benchmark.bring(Path(str(options.run.images)), options.run.out)
    require_prompts(benchmark.items(), folder)
    require_writable(folder)
    benchmark = with_judges(options, benchmark)
    if options.run.stage != "report":
        judge(benchmark, [folder], share.shard)
    share.wait()
    if not share.reports:
        part = f"shard {share.shard.index}/{share.shard.count} is judged"
        print(f"{part}; the same command with --stage report, and no --shard, sums all up")
        return 0
    rows, left_out = rows_in_common(benchmark, {folder.name: folder}, options.run.allow_missing)
    write_official(benchmark, folder, rows[folder.name])
    write_units(benchmark, folder, rows[folder.name], left_out, pipeline=None)
    judged = {folder.name: Judged(rows[folder.name], [{"rewards": {}}] * len(rows[folder.name]))}
    summary = {
        "benchmark": benchmark.name,
        **({"limited": limited} if (limited := benchmark.limited()) else {}),
        **({"partial": list(left_out.values())} if left_out else {}),
        **summarise_run(benchmark, judged, options.row.verdicts, options.row.by_reward),
        "facts": {**partial(left_out), **protocol_in_words(benchmark), "images": str(folder)},
    }
    print(write_report(options.run.out, summary), end="")
    return 0


def with_judges(options: Bench, benchmark: Benchmark) -> Benchmark:
    """With its models, those of rewards from where --source says."""
    judging = options.context().rewards if options.row.by_reward else ()
    places = options.rewards.places(dict.fromkeys(name for name in judging if name not in options.rewards.watch))
    return benchmark.with_judges(parts.judges(machine.best_device(options.model.device), places))


def replaced(options: Bench) -> dict[str, str | float | None]:
    """What takes the place of a preset's own."""
    return {"steps": options.model.steps, "guidance_scale": options.model.guidance_scale, "dtype": options.model.dtype}


def run_settings(options: Bench, method: str, mix: Mapping[str, float]) -> Record:
    """What a method's images and traces depend on. Limit and samples are not in it: a run may be extended by more of either."""
    unoptimised = method == "none" and options.row.by_reward
    guidance = options.guidance.settings(options.model.pipeline)
    return {
        "benchmark": options.benchmark,
        "split": getattr(options.own, "split", None),
        "pipeline": options.model.pipeline,
        **({"lora": parts.lora_identity(options.model.lora)} if options.model.lora else {}),
        **({"guidance": guidance} if guidance else {}),
        "method": method,
        "seed": options.run.seed,
        # Of images that no search made the rewards are notes; where rewards judge, they are not even that.
        "reward": {} if unoptimised else dict(mix),
        "watch": [] if unoptimised else list(options.rewards.watch),
        **parts.search_settings(method, options.budget, options.search),
        **replaced(options),
        **options.rewards.settings(),
    }


def report(options: Bench, benchmark: Benchmark, folders: Mapping[str, Path], mix: Mapping[str, float], command: str) -> str:
    """Reads what was judged, writes results.jsonl, summary.json, table.md and the grid, and returns the tables."""
    items, out = benchmark.items(), options.run.out
    rows, left_out = rows_in_common(benchmark, folders, options.run.allow_missing)
    judged = {}
    for name, folder in folders.items():
        reported = {row["filename"] for row in rows[name]}
        judged[name] = Judged(rows[name], [read_json(item.trace_path(folder)) for item in items if item.name in reported])
        write_official(benchmark, folder, rows[name])
        write_units(benchmark, folder, rows[name], left_out, options.model.pipeline)
    made = {name: read_json(folder / "settings.json") for name, folder in folders.items()}
    seconds = options.search.seconds
    bounds = {"budget": options.budget} if seconds is None else {"budget": None, "seconds": seconds}
    config = {**run_settings(options, list(folders)[-1], mix), "method": list(folders), **bounds}
    of_made = ("resolved", "preset", "weights", "versions", "sessions")
    summary = {
        "benchmark": benchmark.name,
        **({"limited": limited} if (limited := benchmark.limited()) else {}),
        "config": {**config, "samples": options.run.samples, "limit": options.run.limit},
        "made": {name: {key: found.get(key) for key in of_made} for name, found in made.items()},
        "command": command,
        "date": machine.now(),
        **read_json(out / "machine.json"),
        "optimised": list(mix),
        **summarise_run(benchmark, judged, options.row.verdicts, options.row.by_reward, mix),
        **panels.of_methods(
            mix, options.rewards.watch, options.rewards.calibration, {name: result.traces for name, result in judged.items()}
        ),
    }
    panels.draw(out, summary)
    if left_out:
        summary["partial"] = list(left_out.values())
    none = judged["none"].traces
    cut = sum(bool(trace.get("cut_text")) for trace in none)
    spent = f"{options.budget} evaluations" if seconds is None else f"{seconds:g} seconds"
    split = f"{config['split']} split, " if config["split"] else ""
    summary["facts"] = {
        **partial(left_out),
        **protocol_in_words(benchmark),
        **({"cut prompts": f"of {cut} of {len(none)} images the model did not read the end of the prompt"} if cut else {}),
        "pipeline": f"{options.model.pipeline}, {split}seed {options.run.seed}, budget of {spent} per image",
        **({"guidance": options.guidance.guidance} if options.guidance.guidance != "full" else {}),
        **how_made(made),
        "device": summary["device"],
        "date": summary["date"],
        "command": f"`{command}`",
    }
    for name in list(folders)[1:]:
        differences = [trace["start_difference"] for trace in judged[name].traces]
        summary["methods"][name]["largest_start_difference"] = max(differences)
        far = sum(difference > SAME_IMAGE_TOLERANCE for difference in differences)
        if far:
            print(f"warning: {far} images of {name} start elsewhere than none; the comparison is not paired", file=sys.stderr)
    if options.run.grid:
        draw_grid(options, items, judged, options.run.grid)
    return write_report(out, summary)


def how_made(made: Mapping[str, Record]) -> dict[str, str]:
    """The settings that images were made with, and what changed while they were made. made: method -> what its settings.json holds."""
    facts = {}
    if found := made["none"].get("resolved"):
        facts["made with"] = resolved.in_words(found)
    sessions = [session for each in made.values() for session in each.get("sessions", [])]
    devices = list(dict.fromkeys(session["device"] for session in sessions))
    if len(devices) > 1:
        facts["SEVERAL DEVICES"] = "; ".join(devices)
    versions = [{name: version for name, version in session["versions"].items() if version} for session in sessions]
    changed = [name for name in versions[0] if len({str(each.get(name)) for each in versions}) > 1] if versions else []
    if changed:
        of_each = (f"{name} {' and '.join(dict.fromkeys(str(each.get(name)) for each in versions))}" for name in changed)
        facts["CHANGED VERSIONS"] = "; ".join(of_each)
    return facts


def draw_grid(options: Bench, items: Sequence[Item], judged: Mapping[str, Judged], file: Path) -> None:
    """Prompts drawn by the seed, the same number of each task, not chosen by result: "none" beside the last method."""
    rng = np.random.default_rng(options.run.seed)
    last, chosen = options.methods[-1], []
    for task in dict.fromkeys(item.task for item in items):
        candidates = [i for i, item in enumerate(items) if item.task == task and item.sample == 0]
        chosen += sorted(rng.permutation(candidates)[: options.run.grid_per_task].tolist())

    def pair(i: int) -> Pair:
        images = [Image.fromarray(read_pixels(items[i].image_path(options.run.out / name))) for name in ("none", last)]
        return Pair(items[i].prompt, *images, judged["none"].rows[i]["correct"], judged[last].rows[i]["correct"])

    with whole_file(file) as temporary:
        grid([pair(i) for i in chosen], columns=3).save(temporary, format="PNG")
    print(f"{file}: {len(chosen)} prompts, none beside {last}")
