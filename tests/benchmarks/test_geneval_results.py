"""Rows and summary of GenEval: by hand, and the official summary of recorded rows."""

import json

import pytest

from diffalign.benchmarks.geneval.results import KEYS, result_row, score, summary
from diffalign.files import read_rows
from diffalign.rules import Detection, Verdict
from tests.benchmarks import recorded

DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}


def row(tag: str, prompt: str, correct: bool) -> dict:
    return {"tag": tag, "metadata": prompt, "correct": correct}


def test_a_row_has_upstreams_keys_and_nested_json_strings():
    kept = {"dog": [Detection((1.0, 2.0, 3.0, 4.0), 0.75)], "cat": []}
    made = result_row("00000/samples/00001.png", DOG, Verdict(True, ""), kept)
    assert tuple(made) == KEYS
    assert json.loads(made["details"]) == {"dog": [[1.0, 2.0, 3.0, 4.0, 0.75]]}
    assert json.loads(made["metadata"]) == DOG
    assert (made["correct"], made["reason"]) == (True, "")


def test_overall_is_the_mean_of_task_means_not_of_images():
    """Counting 1 of 4, position 1 of 1: 2 of 5 images, but (1/4 + 1) / 2 overall. Two of three prompts have a correct image."""
    rows = [row("counting", "a", c) for c in (True, False)] + [row("counting", "b", False)] * 2 + [row("position", "c", True)]
    total = score(rows)
    assert (total.correct_images, total.images) == (2, 5)
    assert (total.solved_prompts, total.prompts) == (2, 3)
    assert total.overall == pytest.approx(0.625)
    lines = summary(rows).splitlines()
    assert "% correct images: 40.00%" in lines
    assert "% correct prompts: 66.67%" in lines
    assert "counting         = 25.00% (1 / 4)" in lines
    assert lines[-1] == "Overall score (avg. over tasks): 0.62500"


def test_nothing_to_summarise_is_an_error():
    with pytest.raises(ValueError, match="no results"):
        score([])


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row("counting", "a", True)) + "\n{\n")
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_rows(path)


def test_the_official_summary_of_recorded_rows():
    folder = recorded.path("geneval_summary_golden")
    assert summary(read_rows(folder / "results.jsonl")) == (folder / "expected_summary.txt").read_text()


def test_text_may_hold_line_separators_and_blank_lines_are_nothing(tmp_path):
    """Other programs write Unicode as it is; U+2028 and U+0085 in a prompt end no line."""
    rows = [row("counting", "two\u2028cats\u0085", True), row("counting", "\U0001f408", False)]
    path = tmp_path / "results.jsonl"
    path.write_text("\n\n".join(json.dumps(each, ensure_ascii=False) for each in rows) + "\n\n", encoding="utf-8")
    assert read_rows(path) == rows
