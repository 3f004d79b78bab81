"""Where the package's files lie, what a Hub id looks like, JSON that says what is wrong with it, and one home for each of these facts."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import pytest

import diffalign
from diffalign import files, reward_models
from diffalign.files import HUB_ID, packaged_path, read_json
from tests.places import ROOT


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


HOMES = {  # a fact -> the folders in which it is stated once; benchmarks and reward models, siblings, each keep CLIP's mean
    "0.48145466": ["reward_models"],
    "def read_json(": ["diffalign", "pipelines", "reward_models"],
    "def collapse(": ["diffalign", "pipelines", "reward_models"],
    ' = "package:"': ["diffalign", "pipelines", "reward_models"],
    "[A-Za-z0-9][\\w.-]*/[A-Za-z0-9]": ["diffalign", "pipelines", "reward_models"],
    'files("diffalign").joinpath': ["diffalign", "pipelines", "reward_models"],
}


@pytest.mark.parametrize("fact", HOMES)
def test_a_fact_has_one_home(fact):
    found = [path for folder in HOMES[fact] for path in (ROOT / folder).rglob("*.py") if fact in path.read_text()]
    assert len(found) == 1, found


def test_options_are_read_by_name():
    for spec in reward_models.SPECS.values():
        assert isinstance(spec.options, Mapping)
        assert all(isinstance(key, str) for key in spec.options)
    assert reward_models.SPECS["hpsv2.1"].options["file"] == "HPS_v2.1_compressed.pt"


@pytest.mark.parametrize("whole", [files.whole_file, files.whole_folder])
def test_a_full_disk_names_the_path(tmp_path, whole):
    """A write to a descriptor fails without the name of a file."""
    with pytest.raises(OSError, match="No space left") as caught, whole(tmp_path / "wanted"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "wanted")
    with pytest.raises(FileNotFoundError) as caught, whole(tmp_path / "wanted"):
        raise FileNotFoundError(errno.ENOENT, "No such file", "another")
    assert caught.value.filename == "another"


def test_folders_that_stayed_empty_are_removed_and_others_are_not(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "a/b/c", "used/d"):
        files.require_writable(tmp_path / name)
    (tmp_path / "used" / "image.png").write_bytes(b"")
    files.remove_empty()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["image.png", "mine", "used"]
