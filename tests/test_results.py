"""Tables on the page of results are those of the JSON files beside it, to the letter."""

from __future__ import annotations

import json
import re

from diffalign.reports.compare import markdown as compared
from diffalign.reports.summary import markdown
from tests.places import ROOT, linked

DOCS = ROOT / "docs"


def tables(text: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", text, re.M)


def test_every_table_is_made_from_its_file():
    names = ("shapes_reward_50", "shapes_turbo_50", "shapes_curve")
    seeing, full, curve = (json.loads((DOCS / "results" / f"{name}.json").read_text()) for name in names)
    made = [*tables(markdown(seeing))[:2], tables(markdown(full))[0], *tables(compared(curve))]
    assert tables((DOCS / "results.md").read_text()) == made


def test_what_the_page_says_of_the_curve_is_so():
    found = json.loads((DOCS / "results" / "shapes_curve.json").read_text())["measures"]["accuracy"]
    equal = [each for each in found["differences"] if each["from"]]
    assert len(equal) == 3
    assert min(each["p_holm"] for each in equal) > 0.6
    names = [point["line"] for point in found["points"]]
    better = [names[each["to"]] for each in found["differences"] if each["p_holm"] < 0.05]
    assert better == ["reno", "reno"]


def test_where_reno_begins_is_as_measured():
    """The page's rows are the file's, and what the default rests on is so: no interval excludes zero, and half as starts is faster."""
    found = json.loads((DOCS / "results" / "reno_starts.json").read_text())
    page = (DOCS / "reno.md").read_text()
    assert f"on {found['prompts']} validation prompts" in page
    for each in found["results"]:
        mean, low, high = each["against_the_first"]
        against = f"{mean:+.3f} [{low:+.2f}, {high:+.2f}] " if mean or high else " "
        tail = f"| {each['accuracy'][1]:.3f} | {against}| {each['reward'][1]:.2f} | {each['seconds']:.0f} |"
        assert tail in page, tail
        assert low <= 0 <= high
    seconds = {(each["budget"], each["settings"]): each["seconds"] for each in found["results"]}
    assert all(seconds[b, "lr 1/256, half the evaluations as starts"] < seconds[b, "lr 1/256"] for b in (16, 50))


def test_pages_link_to_what_is_there():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" not in target and not target.startswith("#"):
                assert linked(page, target.partition("#")[0]).exists(), f"{page.name}: {target}"
