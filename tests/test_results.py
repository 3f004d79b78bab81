"""Tables on the page of results are those of the JSON files beside it, to the letter."""

from __future__ import annotations

import json
import re
from pathlib import Path

from diffalign.benchmarks.report import markdown
from diffalign.commands.compare import markdown as compared

DOCS = Path(__file__).parents[1] / "docs"


def tables(text: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", text, re.M)


def test_every_table_is_made_from_its_file():
    full, curve = (json.loads((DOCS / "results" / f"{name}.json").read_text()) for name in ("shapes_turbo_50", "shapes_curve"))
    assert tables((DOCS / "results.md").read_text()) == [tables(markdown(full))[0], *tables(compared(curve))]


def test_what_the_page_says_of_the_curve_is_so():
    found = json.loads((DOCS / "results" / "shapes_curve.json").read_text())["measures"]["accuracy"]
    equal = [each for each in found["differences"] if each["from"]]
    assert len(equal) == 3
    assert min(each["p_holm"] for each in equal) > 0.6
    names = [point["line"] for point in found["points"]]
    better = [names[each["to"]] for each in found["differences"] if each["p_holm"] < 0.05]
    assert better == ["reno", "reno"]


def test_pages_link_to_what_is_there():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" not in target and not target.startswith("#"):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"
