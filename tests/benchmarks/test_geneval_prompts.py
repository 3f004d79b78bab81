"""GenEval's rows: the counts of the release, its spelling, and where it is at hand the released file itself."""

import json
from collections import Counter

import pytest

from diffalign.benchmarks.geneval import prompts as geneval_prompts
from diffalign.benchmarks.geneval.benchmark import GenEvalBenchmark
from diffalign.benchmarks.geneval.prompts import OBJECTS, article, jsonl, metadata, plural
from diffalign.cli import main
from diffalign.rules import COLORS, RELATIONS, TASKS
from tests.benchmarks import recorded


def test_553_distinct_prompts_in_six_tasks():
    rows = metadata()
    assert Counter(row["tag"] for row in rows) == dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))
    assert list(dict.fromkeys(row["tag"] for row in rows)) == list(TASKS)
    assert len({row["prompt"] for row in rows}) == len(rows) == 553


def test_the_released_spread_of_counts_and_relations():
    rows = metadata()
    counts = Counter(row["include"][0]["count"] for row in rows if row["tag"] == "counting")
    relations = Counter(row["include"][1]["position"][0] for row in rows if row["tag"] == "position")
    assert counts == {2: 26, 3: 28, 4: 26}
    assert [relations[name] for name in RELATIONS] == [19, 27, 26, 28]


def test_what_every_row_of_a_task_looks_like():
    for row in metadata():
        assert {clause["class"] for clause in row["include"]} <= set(OBJECTS)
        assert ("exclude" in row) == (row["tag"] == "counting")
        if row["tag"] == "counting":
            (include,), (exclude,) = row["include"], row["exclude"]
            assert exclude == {"class": include["class"], "count": include["count"] + 1}
        if row["tag"] in ("colors", "color_attr"):
            assert all(clause["color"] in COLORS and clause["class"] != "person" for clause in row["include"])
        if row["tag"] == "position":
            target, subject = row["include"]
            assert subject["position"][1] == 0
            spoken = f"{subject['class']} {subject['position'][0]} {article(target['class'])} {target['class']}"
            assert row["prompt"] == f"a photo of {article(subject['class'])} {spoken}"


@pytest.mark.parametrize(("word", "expected"), [("apple", "an"), ("umbrella", "an"), ("orange", "an"), ("hair drier", "a")])
def test_article_goes_by_the_first_letter(word, expected):
    assert article(word) == expected


@pytest.mark.parametrize(("name", "expected"), [("knife", "knifes"), ("bus", "buses"), ("scissors", "scissorses"), ("bench", "benchs")])
def test_plural_is_the_releases(name, expected):
    assert plural(name) == expected


def test_rows_are_the_callers_own():
    metadata()[0]["include"][0]["count"] = 7
    assert metadata()[0]["include"][0]["count"] == 1


@pytest.fixture
def other_stream(monkeypatch):
    """A NumPy that draws other numbers from a seed."""
    monkeypatch.setattr(geneval_prompts, "SEED", 44)
    geneval_prompts._checked_rows.cache_clear()
    yield
    geneval_prompts._checked_rows.cache_clear()


def test_other_random_numbers_are_an_error_not_other_prompts(other_stream):
    with pytest.raises(ValueError, match=r"draws other GenEval prompts.*evaluation_metadata\.jsonl.*--prompts"):
        metadata()


def test_the_command_says_so_in_a_sentence(other_stream, tiny_folder, tmp_path, capsys):
    command = [
        "bench",
        "geneval",
        "--pipeline",
        str(tiny_folder),
        "--method",
        "none",
        "--stage",
        "generate",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 1
    assert "draws other GenEval prompts" in capsys.readouterr().err


def test_the_users_own_copy_takes_the_place_of_the_stream_and_is_checked(tmp_path, monkeypatch):
    file = tmp_path / "prompts" / "evaluation_metadata.jsonl"
    file.parent.mkdir()
    file.write_text(jsonl(metadata()))
    drawn = metadata()
    monkeypatch.setattr(geneval_prompts, "_checked_rows", None)  # nothing is drawn
    assert metadata(file) == metadata(tmp_path) == drawn
    assert GenEvalBenchmark(source=tmp_path).items()[0].prompt == drawn[0]["prompt"]
    file.write_text(jsonl(drawn[:-1]))
    with pytest.raises(ValueError, match="is not the released"):
        metadata(file)
    with pytest.raises(FileNotFoundError, match="geneval"):
        metadata(tmp_path / "nowhere")


def test_the_released_file_to_the_byte():
    assert jsonl(metadata()).encode() == recorded.path("geneval/evaluation_metadata.jsonl").read_bytes()
    assert "\n".join(OBJECTS) == recorded.path("geneval/object_names.txt").read_text().strip()
    prompts = recorded.path("geneval/generation_prompts.txt").read_text().splitlines()
    assert [row["prompt"] for row in metadata()] == prompts
    assert [json.loads(line) for line in jsonl(metadata()).splitlines()] == metadata()
