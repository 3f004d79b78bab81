"""`diffalign compare RUN_A RUN_B ...`: judged runs image by image, with intervals, paired tests, and what each gain cost.

A run is the folder of one method, holding results.jsonl. All must be of one benchmark, judged in the same way, on the same images. Two runs
are compared task by task, with Holm's correction over the tasks; more against the first and, where methods have as many evaluations, with
one another, with Holm's correction over those tests. Scores against costs are drawn as curves.
"""

from __future__ import annotations

from diffalign.cli.commands import Compare
from diffalign.evaluation.machine import now
from diffalign.files import require_writable, write_json, write_text
from diffalign.reports.compare import compare_all, draw, markdown
from diffalign.reports.pages import report_page


def run(options: Compare, command: str) -> int:
    """Prints the tables; writes compare.json, compare.md, compare.html and curves to --out where it is given."""
    if options.out:
        require_writable(options.out)
    result = {**compare_all(options.runs, options.allow_missing), "command": command, "date": now()}
    plots = draw(result, options.out) if options.out else {}
    print(markdown(result), end="")
    if options.out:
        text = markdown(result, plots)
        write_json(options.out / "compare.json", result)
        write_text(options.out / "compare.md", text)
        write_text(options.out / "compare.html", report_page(text, "Comparison"))
        print(f"\ncompare.json, compare.md, compare.html{' and curves' if plots else ''} are in {options.out}")
    return 0
