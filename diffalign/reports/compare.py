"""Judged runs image by image, with intervals, paired tests, and what each gain cost.

A run is the folder of one method, holding results.jsonl. All must be of one benchmark, judged in the same way, on the same images. Two runs
are compared task by task, with Holm's correction over the tasks; more against the first and, where methods have as many evaluations, with
one another, with Holm's correction over those tests. Scores against costs are drawn as curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from diffalign.benchmarks.base import Record
from diffalign.files import read_json, read_rows, whole_file
from diffalign.reports.curves import Point, equal_pairs, plot
from diffalign.reports.statistics import discordance, holm, overall_estimate, paired_difference, paired_task_differences
from diffalign.reports.summary import (
    P_VALUES,
    columns,
    cost_table,
    estimates,
    few_prompts,
    interval,
    mean_cost,
    measures,
    p_values,
    stamped,
    strata,
    table,
)

MUST_AGREE = ("benchmark", "split", "prompt list", "prompt lists", "samples", "scorer", "scorers", "limits")
SAME_NOISES = ("pipeline", "seed")


def compare_all(folders: Sequence[Path], allow_missing: bool = False) -> Record:
    """The comparison as plain JSON data, measure by measure. Raises ValueError where runs cannot be compared, naming what differs."""
    rows, facts = [_rows(folder) for folder in folders], [_facts(folder) for folder in folders]
    kept, notes = _shared(folders, rows, facts, allow_missing)
    common = [measure for measure in measures(kept[0]) if all(measure in measures(of_run) for of_run in kept)]
    if not common:
        raise ValueError(f"{folders[0]} and the others have no measure in common; it has {', '.join(map(str, measures(kept[0])))}")
    made = [{"settings": _read(folder / "settings.json"), "machine": _read(folder.parent / "machine.json")} for folder in folders]
    limits = list(dict.fromkeys(each.get("limited") for each in facts))
    result: dict[str, object] = {
        **_limited(limits, len(kept[0])),
        "runs": list(map(str, folders)),
        "made": made,
        "images": len(kept[0]),
        "notes": notes,
        "measures": {},
    }
    for measure in common:
        key = measure or ("accuracy" if "correct" in kept[0][0] else "score")
        found = _pair(kept[0], kept[1], measure) if len(folders) == 2 else {}
        result["measures"][key] = {**found, **_curve(folders, kept, facts, measure)}
    if few := few_prompts(estimates(kept[0], common[0])):
        result["few_prompts"] = few
    return result


def _limited(limits: Sequence[str | None], images: int) -> dict[str, str]:
    """What a comparison of limited runs must be quoted with. limits: what each run is limited to, every one once."""
    if limits == [None]:
        return {}
    return {"limited": str(limits[0]) if len(limits) == 1 else f"limited to the {images} images that all runs have"}


def compare(a: Path, b: Path, allow_missing: bool = False) -> Record:
    """How much B's scores exceed A's, of the first measure."""
    result = compare_all([a, b], allow_missing)
    return {**result, **next(iter(result["measures"].values()))}


def _pair(a: Sequence[Record], b: Sequence[Record], measure: str | None) -> Record:
    """Two runs task by task."""
    x, prompts, tasks = columns(a, measure)
    y, _, _ = columns(b, measure)
    result = {
        "A": {"overall": _overall(a, measure), "tasks": estimates(a, measure)},
        "B": {"overall": _overall(b, measure), "tasks": estimates(b, measure)},
        "difference": {
            "overall": _difference(b, a, measure),
            "tasks": {task: asdict(found) for task, found in paired_task_differences(y, x, prompts, tasks).items()},
        },
    }
    if "correct" in a[0]:
        result["discordant"] = asdict(discordance(y, x))
    return result


def _curve(folders: Sequence[Path], rows: Sequence[Sequence[Record]], facts: Sequence[Record], measure: str | None) -> Record:
    """Every run as a point of score and cost; of more than two, what each gains over the first, and over others at equal evaluations."""
    names = _lines(facts, folders)
    points = [
        Point(str(folder), name, _overall(of_run, measure), _cost(folder))
        for folder, name, of_run in zip(folders, names, rows, strict=True)
    ]
    result: dict[str, object] = {"points": [point.to_json() for point in points]}
    if len(folders) > 2:
        tests = [(0, j) for j in range(1, len(folders))]
        tests += [pair for pair in equal_pairs(points) if pair not in tests]
        differences = [{"from": i, "to": j, **_difference(rows[j], rows[i], measure)} for i, j in tests]
        corrected = holm({str(n): each["p_value"] for n, each in enumerate(differences)})
        result["differences"] = [{**each, "p_holm": corrected[str(n)]} for n, each in enumerate(differences)]
    return result


def _lines(facts: Sequence[Record], folders: Sequence[Path]) -> list[str]:
    """Each run's method, with what else tells the runs apart: pipeline and tuned weights."""
    differing = [name for name in ("pipeline", "lora") if len({str(each.get(name)) for each in facts}) > 1]
    return [
        " ".join([each.get("method", folder.name), *(Path(str(each[name])).name for name in differing if each.get(name))])
        for each, folder in zip(facts, folders, strict=True)
    ]


def _cost(folder: Path) -> dict[str, float | None]:
    path = folder / "units.jsonl"
    return mean_cost(read_rows(path) if path.is_file() else [])


def _overall(rows: Sequence[Record], measure: str | None) -> Record:
    values, prompts, tasks = columns(rows, measure)
    return asdict(overall_estimate(values, prompts, strata(tasks, pooled=measure is not None)))


def _difference(to: Sequence[Record], of: Sequence[Record], measure: str | None) -> Record:
    (y, prompts, tasks), (x, _, _) = columns(to, measure), columns(of, measure)
    return asdict(paired_difference(y, x, prompts, strata(tasks, pooled=measure is not None)))


# ---- words -----------------------------------------------------------------------------------------------------------------------


def markdown(result: Record, plots: Mapping[str, str] | None = None) -> str:
    """The comparison as tables. plots: measure -> the file its curve is in."""
    parts = []
    for name, found in result["measures"].items():
        parts += [f"## {name}", _pair_table(found)] if "difference" in found else [f"## {name}"]
        parts.append(_points_table(found["points"]))
        if "differences" in found:
            parts.append(_differences_table(found))
        if plots and name in plots:
            parts.append(f"![{name} against cost]({plots[name]})")
    return "\n\n".join([*stamped(parts, result.get("limited")), "\n".join(_facts_lines(result))]) + "\n"


def _facts_lines(result: Record) -> list[str]:
    lines = [f"- TOO FEW PROMPTS: {result['few_prompts']}"] if result.get("few_prompts") else []
    lines += [f"- {_letter(i)}: {folder}" for i, folder in enumerate(result["runs"])]
    first = next(iter(result["measures"].values()))
    prompts = first["points"][0]["score"]["prompts"]
    lines.append(f"- {result['images']} images of {prompts} prompts; 95 % intervals, the prompt being the unit")
    if "discordant" in first:
        found = first["discordant"]
        only = f"right in B only {found['gained']}, in A only {found['lost']}"
        lines.append(f"- {only}; exact McNemar p = {found['p_value']:.2g} (descriptive: takes images of a prompt as independent)")
    lines += [f"- {note}" for note in result["notes"]]
    devices = dict.fromkeys(each["machine"]["device"] for each in result["made"] if each["machine"])
    lines += [f"- device: {' and '.join(devices)}"] if devices else []
    return lines + [f"- {name}: {result[name]}" for name in ("date", "command") if name in result]


def _pair_table(found: Record) -> str:
    lines = []
    tasks = list(found["difference"]["tasks"])
    for name in ["overall", *(tasks if len(tasks) > 1 else [])]:
        parts = {key: found[key]["overall"] if name == "overall" else found[key]["tasks"][name] for key in ("A", "B", "difference")}
        gain = parts["difference"]
        lines.append([name, interval(parts["A"]), interval(parts["B"]), interval(gain, "+"), *p_values(gain)])
    return table(["task", "A", "B", "B - A", *P_VALUES], lines)


def _points_table(points: Sequence[Record]) -> str:
    heads, cells = cost_table([point["cost"] for point in points])
    lines = [[f"{_letter(i)}: {point['line']}", interval(point["score"]), *cells[i]] for i, point in enumerate(points)]
    return table(["run", "overall", *heads], lines)


def _differences_table(found: Record) -> str:
    names = [f"{_letter(i)}: {point['line']}" for i, point in enumerate(found["points"])]
    lines = [
        [
            f"{names[each['to']]} - {names[each['from']]}",
            "" if each["from"] == 0 else "equal evaluations",
            interval(each, "+"),
            *p_values(each),
        ]
        for each in found["differences"]
    ]
    return table(["difference", "", "overall", *P_VALUES], lines)


def _letter(i: int) -> str:
    """A, B, ..., Z, run 27, ..."""
    return chr(ord("A") + i) if i < 26 else f"run {i + 1}"


def draw(result: Record, folder: Path) -> dict[str, str]:
    """A curve of each measure for which costs are known, as PNG. Measure -> file name."""
    files = {}
    for number, (name, found) in enumerate(result["measures"].items()):
        picture = plot([Point(**point) for point in found["points"]], name)
        if picture is None:
            continue
        files[name] = "curve.png" if number == 0 else f"curve-{number}.png"
        with whole_file(folder / files[name]) as temporary:
            picture.save(temporary, format="PNG")
    return files


# ---- reading ---------------------------------------------------------------------------------------------------------------------


def _rows(folder: Path) -> list[Record]:
    path = folder / "results.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a judged run: it has no results.jsonl; give the folder of one method, such as RUN/none")
    rows = read_rows(path)
    wrong = next((n for n, row in enumerate(rows, 1) if not {"filename", "prompt", "tag"} <= row.keys()), None)
    if wrong:
        raise ValueError(f"{path} row {wrong} lacks filename, prompt or tag; it is not what `diffalign bench` writes")
    if not rows or len({row["filename"] for row in rows}) < len(rows):
        raise ValueError(f"{path} {'names an image twice' if rows else 'is empty'}; judge the run again")
    return rows


def _facts(folder: Path) -> Record:
    return {**_read(folder / "settings.json"), **_read(folder / "protocol.json")}


def _read(file: Path) -> Record:
    return read_json(file) if file.is_file() else {}


def _both(one: object, two: object) -> tuple[object, object]:
    """Facts to compare: of two mappings what they both know, since a run may have been judged by more scorers than another."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        shared = one.keys() & two.keys()
        return {name: one[name] for name in shared}, {name: two[name] for name in shared}
    return one, two


def _shared(
    folders: Sequence[Path], rows: Sequence[Sequence[Record]], facts: Sequence[Record], allow_missing: bool
) -> tuple[list[list[Record]], list[str]]:
    """The rows of the images that all runs have, in the first run's order, and notes on what weakens the comparison.

    Raises ValueError where runs were judged in different ways, or are not of the same images.
    """
    for other in facts[1:]:
        for name in MUST_AGREE:
            one, two = _both(facts[0].get(name), other.get(name))
            if None not in (one, two) and one != two:
                raise ValueError(f"the runs cannot be compared: their {name} differ ({one!r} and {two!r})")
    limits = [each.get("limited") for each in facts]
    if len(set(limits)) > 1 and not allow_missing:
        said = "; ".join(f"{folder} {limit or 'has all prompts'}" for folder, limit in zip(folders, limits, strict=True))
        raise ValueError(f"the runs are of different prompts ({said}); judge the same in all, or --allow-missing to compare what all have")
    different = [name for name in SAME_NOISES if len({str(each[name]) for each in facts if name in each}) > 1]
    notes = [f"the runs differ in {' and '.join(different)}, so only prompts are paired, not noises"] if different else []
    named = [{row["filename"]: row for row in of_run} for of_run in rows]
    shared = [name for name in named[0] if all(name in other for other in named[1:])]
    alone = len(set().union(*named)) - len(shared)
    which = "one run" if len(folders) == 2 else "some runs"
    if alone and not allow_missing:
        what = f"{alone} images are in {which} only"
        raise ValueError(f"{what}; judge the same in all, or --allow-missing to compare the {len(shared)} that all have")
    if not shared:
        raise ValueError(f"{folders[0]} and {folders[1]} have no image in common, so nothing can be compared")
    if alone:
        notes.append(f"partial: {alone} images are in {which} only and were left out")
    kept = [[of_run[name] for name in shared] for of_run in named]
    for folder, of_run in zip(folders[1:], kept[1:], strict=True):
        if [row["prompt"] for row in kept[0]] != [row["prompt"] for row in of_run]:
            raise ValueError(
                f"{folders[0]} and {folder} have images of the same names for other prompts; they are not of the same benchmark"
            )
    return kept, notes
