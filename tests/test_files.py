"""Where the package's files lie, what a Hub id looks like, JSON that says what is wrong with it, and one home for each of these facts."""

from __future__ import annotations

from pathlib import Path

import pytest

import diffalign
from diffalign.files import HUB_ID, packaged_path, read_json
from tests.places import sources


def test_places_inside_the_package():
    inside = Path(diffalign.__file__).parent
    assert packaged_path("package:shapes/weights/shapes-clip") == inside / "shapes" / "weights" / "shapes-clip"
    assert packaged_path("org/name") is None
    assert packaged_path("/tmp/package:x") is None


@pytest.mark.parametrize(
    ("text", "matches"),
    [("org/name", True), ("a/b.c-d_e", True), ("name", False), ("a/b/c", False), ("./a/b", False), ("/a/b", False), ("a/b:file.pt", False)],
)
def test_hub_ids(text, matches):
    assert bool(HUB_ID.fullmatch(text)) == matches


def test_json_with_keys(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1, "b": [2]}')
    assert read_json(path) == read_json(path, ("a", "b")) == {"a": 1, "b": [2]}
    with pytest.raises(ValueError, match=r"x\.json must be a JSON object with the keys a, c"):
        read_json(path, ("a", "c"))
    path.write_text("[1]")
    assert read_json(path) == [1]
    with pytest.raises(ValueError, match=r"x\.json must be a JSON object with the keys a"):
        read_json(path, ("a",))
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        read_json(path)


EVERYWHERE = "diffalign/"
HOMES = {  # a fact -> where it is stated once; benchmarks and reward models, siblings, each keep CLIP's mean
    "0.48145466": "diffalign/reward_models/",
    "def read_json(": EVERYWHERE,
    "def collapse(": EVERYWHERE,
    ' = "package:"': EVERYWHERE,
    "[A-Za-z0-9][\\w.-]*/[A-Za-z0-9]": EVERYWHERE,
    'files("diffalign").joinpath': EVERYWHERE,
}


@pytest.mark.parametrize("fact", HOMES)
def test_a_fact_has_one_home(fact):
    found = [place for place, path in sources().items() if place.startswith(HOMES[fact]) and fact in path.read_text()]
    assert len(found) == 1, found
