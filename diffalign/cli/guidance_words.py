"""What guidance cost, as a record of an image keeps it and as a line says it."""

from __future__ import annotations

from diffalign.benchmarks.base import Record
from diffalign.guidance import GuidanceReport


def record(report: GuidanceReport | None, sample: int, searching: bool) -> Record | None:
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


def summary(record: Record | None) -> str:
    """What to add to a line about one image, from `record`."""
    if record is None:
        return ""
    if "evaluations" not in record:
        return f", {record['method']} guidance saved {100 * record['saved']:.0f} % of the evaluations"
    return f", {record['evaluations']} evaluations instead of {record['evaluations_in_full']}"
