"""Prompt lists and file names of T2I-CompBench, on made-up lists, then on upstream's where they are at hand."""

import pytest

from diffalign.benchmarks.t2i_compbench.prompts import CATEGORIES, KNOWN_LISTS, PromptList, file_name, read_lines, read_prompts
from tests.benchmarks import recorded


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "examples" / "dataset"
    folder.mkdir(parents=True)
    (folder / "color_val.txt").write_text("a red cup \n\nA green bench and a blue bowl.\n")
    return tmp_path


def test_prompts_keep_their_full_stops_and_lose_blank_lines(clone):
    found = read_prompts(clone, "color")
    assert found.prompts == ("a red cup", "A green bench and a blue bowl.")
    assert not found.is_official
    assert found.version.startswith("unknown list ")


def test_a_clone_its_folder_and_a_url_are_the_same(clone):
    folder = clone / "examples" / "dataset"
    assert read_prompts(clone, "color") == read_prompts(folder, "color") == read_prompts(folder.as_uri(), "color")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("colour",), "category must be one of"), (("color", "test"), "split must be one of"), (("shape",), "neither at")],
)
def test_what_is_not_there_is_named(clone, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_prompts(clone, *arguments)


def test_a_url_that_does_not_answer(clone):
    with pytest.raises(FileNotFoundError, match=r"shape_val\.txt \(<urlopen error"):
        read_prompts((clone / "examples" / "dataset").as_uri(), "shape")


@pytest.mark.parametrize("prompt", ["a red_cup", "a red/blue cup"])
def test_prompts_that_cannot_be_file_names_are_refused(clone, prompt):
    (clone / "examples" / "dataset" / "color_val.txt").write_text(prompt + "\n")
    with pytest.raises(ValueError, match="file names"):
        read_prompts(clone, "color")


def test_names():
    assert file_name("A red cup.", 12) == "A red cup._000012.png"


def test_upstreams_lists_are_known_by_their_hash():
    folder = recorded.path("t2i_compbench")
    for category in CATEGORIES:
        found = read_prompts(folder, category)
        assert (len(found.prompts), found.is_official) == (300, True)
        assert found.version.startswith(f"{category} val")


def test_the_two_colour_lists_are_told_apart(tmp_path):
    older = recorded.path("t2i_compbench/color_val_before_2025-09-03.txt")
    (tmp_path / "color_val.txt").write_bytes(older.read_bytes())
    found = read_prompts(tmp_path, "color")
    assert found == PromptList(found.prompts, "color val before 2025-09-03")
    newer = read_prompts(recorded.path("t2i_compbench"), "color")
    changed = [i for i, (a, b) in enumerate(zip(found.prompts, newer.prompts, strict=True)) if a != b]
    assert changed == [227, 228, 271, 287, 299]
    assert found.version in KNOWN_LISTS.values()


def test_other_lists_are_read_the_same_way(clone):
    assert read_lines(clone, "color_val.txt")[0] == "a red cup"
