"""Tables of papers, made again with one command each, the published figures beside.

    python scripts/paper_tables.py reno-geneval --detector mask2former_...-743b7d99.pth          ReNO's four one-step models
    python scripts/paper_tables.py reno-t2i --prompts ~/T2I-CompBench
    python scripts/paper_tables.py best-of-n --detector ...                                        the baseline at equal evaluations
    python scripts/paper_tables.py tuned-geneval --detector ... --tuned dcpo-h=runs/dcpo/lora.safetensors diffusion-dpo=runs/dpo
    python scripts/paper_tables.py tuned-parti --prompts ~/parti --tuned inpo=runs/inpo          win rates against the base model
    python scripts/paper_tables.py reno-geneval --detector ... --pipeline FOLDER --limit 6        dry run on any small model

Needs the models' weights and a GPU: a table is days of work for one, and resumes. What this script does not know is handed to `diffalign
bench` (--device, --batch-size, --shard, --stage ...). Images are those of our seeds, so figures differ by chance as well. Each published
one says where it stands; "unverified" where nobody here has seen the table of its authors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffalign.cli import main as diffalign
from diffalign.files import read_json, read_rows, write_json, write_text
from diffalign.reports.pages import report_page
from diffalign.reports.summary import interval, table

RENO_REWARDS = ("hpsv2.1=5", "image-reward=1", "clip-h14=0.01", "pickscore=0.05")  # the released code's weights, in these units
GENEVAL = ("overall", "single_object", "two_object", "counting", "colors", "position", "color_attr")
T2I = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
HYPERNOISE = "HyperNoise (2025), table 1"
RENO = "ReNO (arXiv 2406.04312)"
DCPO = "DCPO (arXiv 2502.06023), tables 1 and 2"
INPO = "InPO, CVPR 2025 poster"


@dataclass(frozen=True)
class Figure:
    """Published values, by column. documented: read in a table of its authors, if only as others quote it; else second-hand or recalled."""

    values: Mapping[str, float]
    source: str
    documented: bool = True


def geneval(values: Sequence[float], source: str, documented: bool = True) -> Figure:
    return Figure(dict(zip(GENEVAL, values, strict=False)), source, documented)


def t2i(values: Sequence[float]) -> Figure:
    return Figure(dict(zip(T2I, values, strict=True)), f"{RENO}, full prompt lists, one image each", documented=False)


@dataclass(frozen=True)
class Table:
    """One paper table. published: (model, method or tuned label) -> figures. Models are presets of ours."""

    benchmark: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    published: Mapping[tuple[str, str], Figure]
    options: tuple[str, ...] = ()
    rewards: tuple[str, ...] = RENO_REWARDS
    tuned: bool = False
    wins: bool = False  # columns are shares of prompts on which the tuned model's reward is higher
    notes: tuple[str, ...] = field(default=())


TABLES: Mapping[str, Table] = {
    "reno-geneval": Table(
        "geneval",
        ("sd-turbo", "sdxl-turbo", "pixart-dmd", "hyper-sdxl"),
        ("none", "reno-paper"),
        GENEVAL,
        {
            ("sd-turbo", "none"): geneval((0.49, 0.99, 0.51, 0.38, 0.85, 0.07, 0.14), HYPERNOISE),
            ("sd-turbo", "reno-paper"): geneval((0.63, 1.00, 0.84, 0.60, 0.90, 0.11, 0.36), HYPERNOISE),
            ("sdxl-turbo", "none"): geneval((0.55, 1.00, 0.72, 0.49, 0.80, 0.10), "SD3 paper (arXiv 2403.03206)"),
            ("sdxl-turbo", "reno-paper"): geneval((0.65,), RENO, documented=False),
            ("pixart-dmd", "none"): geneval((0.45,), RENO, documented=False),
            ("pixart-dmd", "reno-paper"): geneval((0.59,), RENO, documented=False),
            ("hyper-sdxl", "none"): geneval((0.56, 1.00, 0.76, 0.43, 0.87, 0.10, 0.21), HYPERNOISE),
            ("hyper-sdxl", "reno-paper"): geneval((0.65,), RENO, documented=False),
        },
    ),
    "reno-t2i": Table(
        "t2i-compbench",
        ("sd-turbo", "sdxl-turbo", "pixart-dmd", "hyper-sdxl"),
        ("none", "reno-paper"),
        T2I,
        {
            ("sd-turbo", "none"): t2i((0.55, 0.44, 0.57, 0.17, 0.31, 0.41)),
            ("sd-turbo", "reno-paper"): t2i((0.78, 0.62, 0.75, 0.22, 0.32, 0.48)),
            ("sdxl-turbo", "none"): t2i((0.61, 0.44, 0.60, 0.24, 0.31, 0.43)),
            ("sdxl-turbo", "reno-paper"): t2i((0.78, 0.60, 0.74, 0.26, 0.31, 0.47)),
            ("pixart-dmd", "none"): t2i((0.38, 0.34, 0.47, 0.19, 0.30, 0.36)),
            ("pixart-dmd", "reno-paper"): t2i((0.64, 0.57, 0.72, 0.25, 0.31, 0.46)),
            ("hyper-sdxl", "none"): t2i((0.65, 0.50, 0.65, 0.25, 0.31, 0.46)),
            ("hyper-sdxl", "reno-paper"): t2i((0.79, 0.63, 0.77, 0.26, 0.31, 0.48)),
        },
        options=("--samples", "1", "--category", *T2I),
        notes=(
            "Ours are the 300 val prompts, theirs the full lists: only the step from none to reno-paper compares.",
            "spatial and complex are judged by another detector than UniDet, unless --detections brings its boxes.",
        ),
    ),
    "best-of-n": Table(
        "geneval",
        ("sd-turbo", "sana-sprint"),
        ("none", "best-of-n", "reno-paper"),
        GENEVAL,
        {
            ("sd-turbo", "none"): geneval((0.49, 0.99, 0.51, 0.38, 0.85, 0.07, 0.14), HYPERNOISE),
            ("sd-turbo", "best-of-n"): geneval((0.60,), f"{HYPERNOISE}, 10 s per image"),
            ("sd-turbo", "reno-paper"): geneval((0.63, 1.00, 0.84, 0.60, 0.90, 0.11, 0.36), f"{HYPERNOISE}, 20 s per image"),
            ("sana-sprint", "none"): geneval((0.70, 1.00, 0.80, 0.64, 0.86, 0.41, 0.51), HYPERNOISE),
            ("sana-sprint", "best-of-n"): geneval((0.79,), f"{HYPERNOISE}, 15 s per image"),
            ("sana-sprint", "reno-paper"): geneval((0.81,), f"{HYPERNOISE}, 30 s per image"),
        },
        notes=("Best-of-N has as many evaluations as ReNO, about half the seconds.",),
    ),
    "tuned-geneval": Table(
        "geneval",
        ("sd21",),
        ("none",),
        GENEVAL,
        {
            ("sd21", "none"): geneval((0.4775, 0.96, 0.52, 0.35, 0.80, 0.09, 0.15), DCPO),
            ("sd21", "diffusion-dpo"): geneval((0.4857, 0.99, 0.48, 0.46, 0.83, 0.04, 0.11), DCPO),
            ("sd21", "mapo"): geneval((0.4106,), DCPO),
            ("sd21", "diffusion-kto"): geneval((0.5008,), DCPO),
            ("sd21", "dcpo-h"): geneval((0.5100, 0.99, 0.51, 0.54, 0.84, 0.05, 0.14), DCPO),
        },
        rewards=(),
        tuned=True,
    ),
    "tuned-parti": Table(
        "parti",
        ("sdxl",),
        ("none",),
        ("laion-aesthetic-v2", "pickscore", "hpsv2.1", "clip-h14"),
        {
            ("sdxl", "inpo"): Figure(
                {"laion-aesthetic-v2": 0.6170, "pickscore": 0.7289, "hpsv2.1": 0.7831, "clip-h14": 0.5055}, f"{INPO}, against SDXL"
            ),
        },
        rewards=("laion-aesthetic-v2", "pickscore", "hpsv2.1", "clip-h14"),
        tuned=True,
        wins=True,
        notes=("Win rates: the share of prompts on which the tuned model's image has the higher reward. The poster names no versions.",),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--pipeline", metavar="NAME", help="one model instead of the paper's, for a dry run")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these of the table's models")
    parser.add_argument("--reward", nargs="+", metavar="NAME=WEIGHT", help="other rewards than the paper's")
    parser.add_argument(
        "--tuned", nargs="+", default=[], metavar="LABEL=PATH", help="LoRA weights, or the folder of a whole tuned pipeline"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/paper-tables"), metavar="DIR")
    args, more = parser.parse_known_args(argv)
    chosen = TABLES[args.table]
    tuned = dict(labelled(parser, text) for text in args.tuned)
    if chosen.tuned != bool(tuned):
        parser.error(f"{args.table} {'needs' if chosen.tuned else 'takes no'} --tuned LABEL=PATH")
    unknown = set(args.only or ()) - set(chosen.models)
    if unknown:
        parser.error(f"{args.table} has the models {', '.join(chosen.models)}, not {', '.join(sorted(unknown))}")

    if chosen.wins and args.reward:
        chosen = replace(chosen, columns=tuple(text.partition("=")[0] for text in args.reward))
    lines, results = [], []
    for model in [args.pipeline] if args.pipeline else args.only or chosen.models:
        published_as = model if model in chosen.models else chosen.models[0] if args.pipeline else model
        for label, extra in {"": ["--pipeline", model], **{label: place(model, path) for label, path in tuned.items()}}.items():
            out = args.out / args.table / "-".join(filter(None, (Path(model).name, label)))
            rewards = args.reward or chosen.rewards
            search = ["--method", *chosen.methods, *(("--reward", *rewards) if rewards else ())]
            code = diffalign(["bench", chosen.benchmark, *extra, *search, *chosen.options, *more, "--out", str(out)])
            if code:
                return code
            if not (out / "summary.json").is_file():  # --stage generate, or a shard
                continue
            for method in chosen.methods:
                found = ours(chosen, out, method, args.out / args.table / Path(model).name if label else None)
                figure = chosen.published.get((published_as, label or method))
                name = f"{Path(model).name} {label or method}"
                lines += rows_of(name, found, figure, chosen.columns)
                limited = read_json(out / "summary.json").get("limited")
                made = {"ours": found, **({"limited": limited} if limited else {})}
                results.append({"model": model, "method": label or method, **made, "published": vars(figure) if figure else None})
    if results:
        report(args.out / args.table, args.table, chosen, lines, results, argv)
    return 0


def labelled(parser: argparse.ArgumentParser, text: str) -> tuple[str, Path]:
    label, equals, path = text.partition("=")
    if not equals or not Path(path).exists():
        parser.error(f"--tuned must be LABEL=PATH of something that is there; got {text!r}")
    return label, Path(path)


def place(model: str, path: Path) -> list[str]:
    """A whole pipeline in place of the model, or weights on top of it."""
    return ["--pipeline", str(path)] if (path / "model_index.json").is_file() else ["--pipeline", model, "--lora", str(path)]


def ours(chosen: Table, out: Path, method: str, base: Path | None) -> dict[str, Any]:
    """Column -> estimate with interval; of a tuned model in a table of win rates, the share of prompts it wins against `base`."""
    summary = read_json(out / "summary.json")
    if not chosen.wins:
        found = summary["methods"][method]
        return {column: found["overall"] if column == "overall" else found["tasks"].get(column) for column in chosen.columns}
    if base is None:
        return {}
    mine, theirs = ({row["filename"]: row["values"] for row in read_rows(folder / method / "results.jsonl")} for folder in (out, base))
    wins: dict[str, Any] = {}
    for column in chosen.columns:
        pairs = [(mine[name][column], theirs[name][column]) for name in mine if name in theirs and column in mine[name]]
        if pairs:
            wins[column] = {"mean": sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs), "images": len(pairs)}
    return wins


def rows_of(name: str, found: Mapping[str, Any], figure: Figure | None, columns: Sequence[str]) -> list[list[str]]:
    """Ours, and below it what was published."""
    rows = []
    if found:
        rows.append([name, *(shown(found.get(column)) for column in columns), "ours"])
    if figure:
        tag = figure.source if figure.documented else f"{figure.source}; unverified"
        rows.append([f"{name}, published", *(f"{figure.values[c]:.3g}" if c in figure.values else "" for c in columns), tag])
    return rows


def shown(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return ""
    return interval(estimate) if "low" in estimate else f"{estimate['mean']:.3f}"


def report(folder: Path, name: str, chosen: Table, lines: Sequence[Sequence[str]], results: Sequence[Any], argv: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python scripts/paper_tables.py", *(sys.argv[1:] if argv is None else argv)])
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    notes = [
        *chosen.notes,
        "intervals: 95 %; each run's folder holds its protocol, costs and paired tests",
        f"date: {date}",
        f"command: `{command}`",
    ]
    limits = list(dict.fromkeys(result["limited"] for result in results if "limited" in result))
    title = ", ours ".join([name, *limits])
    text = f"## {title}\n\n{table(['', *chosen.columns, 'source'], lines)}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    write_json(folder / "table.json", {"table": name, "command": command, "date": date, "rows": json.loads(json.dumps(results))})
    write_text(folder / "table.md", text)
    write_text(folder / "table.html", report_page(text, name))
    print(f"\n{text}\ntable.md, table.html and table.json are in {folder}")


if __name__ == "__main__":
    sys.exit(main())
