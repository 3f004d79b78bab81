"""`--guidance`: where the second evaluation of classifier-free guidance is spent, by name.

What a name stands for is built when the pipeline is loaded; files it needs are looked for before that.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.commands import options
from diffalign.methods.table import STEP, find_method, names

METHODS = ("full", *names(STEP))  # full: the pipeline's own guidance
FROM_FILE = {"linear": "linear_guidance.json", "searched": "searched_guidance.json"}  # what makes a folder one of these
MAKERS = {"linear": "linear-ag", "searched": "guidance-search"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance",
        type=method_name,
        default="full",
        metavar="NAME",
        help=f"evaluate the unconditional branch only where it matters: {', '.join(METHODS)} (default: %(default)s)",
    )
    source_help = "for linear and searched: the folder that `diffalign train linear-ag` or `guidance-search` wrote"
    parser.add_argument("--guidance-from", type=Path, metavar="DIR", help=source_help)
    threshold_help = "for adaptive: the cosine at which a sample is guided no further (default: the pipeline's calibrated one)"
    parser.add_argument("--guidance-threshold", type=threshold, metavar="X", help=threshold_help)
    refresh_help = "for adaptive: then keep a sample's last guidance and evaluate it anew every N-th step (default: no guidance)"
    parser.add_argument("--guidance-refresh", type=refresh, metavar="N", help=refresh_help)


def method_name(text: str) -> str:
    if text not in METHODS:
        raise argparse.ArgumentTypeError(options.unknown("guidance method", text, METHODS))
    return text


def threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not -1 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a cosine, above -1 and at most 1, as in 0.995; got {text!r}")
    return value


def refresh(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 2, got {text!r}")
    return int(text)


def settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """What an image depends on, for a run's settings; None for full guidance. Raises ValueError for options that do not fit together."""
    name, source = args.guidance, args.guidance_from
    if name in FROM_FILE:
        made = f"make it with `diffalign train {MAKERS[name]} --pipeline {args.pipeline} --out DIR`"
        if source is None:
            raise ValueError(f"--guidance {name} needs --guidance-from DIR; {made}")
        if not (source / FROM_FILE[name]).is_file():
            raise ValueError(f"--guidance-from {source} has no {FROM_FILE[name]}; {made}")
    elif source is not None:
        raise ValueError(f"--guidance-from belongs to --guidance {' and '.join(FROM_FILE)}; leave it out with {name}")
    for option, value in (("--guidance-threshold", args.guidance_threshold), ("--guidance-refresh", args.guidance_refresh)):
        if value is not None and name != "adaptive":
            raise ValueError(f"{option} belongs to --guidance adaptive; leave it out with {name}")
    if name == "full":
        return None
    source = None if source is None else str(source)
    return {"method": name, "from": source, "threshold": args.guidance_threshold, "refresh": args.guidance_refresh}


def build(args: argparse.Namespace) -> Any:
    """The guidance method, or None for full guidance."""
    settings(args)
    if args.guidance == "full":
        return None
    cls = find_method(args.guidance, STEP).load()
    if args.guidance == "linear":
        from diffalign.methods.linear_guidance import LinearCoefficients

        return cls(LinearCoefficients.load(args.guidance_from))
    if args.guidance == "searched":
        return cls.load(args.guidance_from / FROM_FILE["searched"])
    if args.guidance == "adaptive":
        return cls(threshold=args.guidance_threshold, refresh=args.guidance_refresh or 0)
    return cls()


def record(report: Any, sample: int, searching: bool) -> dict[str, Any] | None:
    """What guidance cost for one sample, as JSON data; None without a report.

    A search generates often, and not every sample each time; the share that its last generation saved stands for all.
    """
    if report is None:
        return None
    if searching:
        return {"method": report.method, "saved": report.saved}
    return {
        "method": report.method,
        "saved": 1 - report.evaluations[sample] / (2 * report.steps),
        "evaluations": report.evaluations[sample],
        "evaluations_in_full": 2 * report.steps,
        "diagnostics": {name: series[sample] for name, series in report.diagnostics.items()},
    }


def summary(record: Mapping[str, Any] | None) -> str:
    """What to add to a line about one image, from `record`."""
    if record is None:
        return ""
    if "evaluations" not in record:
        return f", {record['method']} guidance saved {100 * record['saved']:.0f} % of the evaluations"
    return f", {record['evaluations']} evaluations instead of {record['evaluations_in_full']}"
