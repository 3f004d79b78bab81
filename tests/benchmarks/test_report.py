"""The summary and its tables on results made by hand, so that every number in them is known."""

import json

import pytest

from diffalign.reports.summary import Judged, markdown, summarise, table, write_report

TASKS = ["counting"] * 4 + ["position"] * 4
BEFORE = [1, 0, 0, 0, 0, 0, 0, 0]
AFTER = [1, 1, 1, 0, 1, 0, 0, 0]


def rows(correct):
    return [
        {"filename": f"{i:05d}/samples/00000.png", "tag": task, "prompt": f"prompt {i}", "correct": bool(c)}
        for i, (c, task) in enumerate(zip(correct, TASKS, strict=True))
    ]


def judged():
    searched = {"seconds": 0.5, "best": 1, "rewards": {"total": [1.0, 3.0, 2.0], "clip": [0.5, 1.5, 1.0], "taste": [4.0, 2.0, 9.0]}}
    plain = {"seconds": 0.1, "best": 0, "rewards": {"total": [1.0], "clip": [0.5], "taste": [4.0]}}
    return {"none": Judged(rows(BEFORE), [plain] * 8), "reno": Judged(rows(AFTER), [searched] * 8)}


def test_accuracy_rewards_and_seconds_by_hand():
    methods = summarise(judged())["methods"]
    assert methods["none"]["overall"]["mean"] == pytest.approx((1 / 4 + 0) / 2)
    assert methods["reno"]["overall"]["mean"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert methods["reno"]["tasks"]["counting"]["mean"] == 0.75
    assert methods["reno"]["rewards"]["taste"] == {"before": 4.0, "after": 2.0, "images": 8}  # the chosen one, not the highest
    assert methods["reno"]["seconds_per_image"] == 0.5


def test_paired_difference_by_hand():
    paired = summarise(judged())["paired"]
    assert paired["baseline"] == "none"
    assert list(paired["differences"]) == ["reno"]
    reno = paired["differences"]["reno"]
    assert reno["overall"]["mean"] == pytest.approx(0.5 - 0.125)
    assert (reno["tasks"]["counting"]["mean"], reno["tasks"]["position"]["mean"]) == (0.5, 0.25)


def test_tables_say_what_the_summary_holds():
    summary = {**summarise(judged()), "optimised": ["clip"], "facts": {"device": "cpu"}}
    text = markdown(summary)
    accuracy, gain = [line for line in text.splitlines() if line.startswith("| reno") and "0.500 [" in line]
    assert "0.750 [0.19, 0.99]" in accuracy  # Clopper and Pearson, 3 of 4
    assert "+0.250 [" in gain
    assert "+0.375 [" in text
    assert "total (optimised)" in text
    assert "clip (optimised)" in text
    assert "taste (watched)" in text
    assert "4 -> 2" in text
    assert "- device: cpu" in text


def test_p_values_are_corrected_for_the_methods_of_the_table():
    results = {**judged(), "best-of-n": Judged(rows([1, 1, 0, 0, 0, 0, 0, 0]), judged()["none"].traces)}
    found = summarise(results)["paired"]["differences"]
    p = {name: each["overall"]["p_value"] for name, each in found.items()}
    assert p["reno"] < p["best-of-n"]
    assert found["reno"]["overall"]["p_holm"] == pytest.approx(min(2 * p["reno"], 1))
    assert "| p (sign flips) | p (Holm) |" in markdown(summarise(results))


def test_too_few_prompts_are_named():
    summary = summarise(judged())
    assert "every task: 4 prompts" in summary["few_prompts"]
    assert "- TOO FEW PROMPTS: every task" in markdown(summary)
    many = [{"filename": f"{i}", "tag": "a" if i < 10 else "b", "prompt": f"{i}", "correct": True} for i in range(14)]
    trace = {"seconds": 1.0, "best": 0, "rewards": {}}
    assert "b: 4 prompts" in summarise({"none": Judged(many, [trace] * 14)})["few_prompts"]
    assert "few_prompts" not in summarise({"none": Judged(many[:10], [trace] * 10)})


def test_every_table_of_a_limited_result_says_so():
    limited = "limited to 4 prompts a task (8 of 20)"
    summary = {**summarise(judged()), "breakdown": {"title": "Skills", "methods": {"none": {"a": 1.0}}}, "limited": limited}
    headings = [line for line in markdown(summary).splitlines() if line.startswith("## ")]
    assert len(headings) >= 4
    assert all(limited in line for line in headings)


def test_scores_that_are_not_finite_are_left_out_and_counted():
    results = judged()
    broken = {"seconds": 0.5, "best": 1, "rewards": {"total": [None, 5.0], "clip": [None, None], "taste": [1.0, 2.0]}}
    results["reno"] = Judged(results["reno"].rows, [*results["reno"].traces[:7], broken])
    rewards = summarise(results)["methods"]["reno"]["rewards"]
    assert rewards["total"] == {"before": 1.0, "after": 3.0, "images": 7}
    results["reno"] = Judged(results["reno"].rows, [broken] * 8)
    assert summarise(results)["methods"]["reno"]["rewards"]["clip"] == {"before": None, "after": None, "images": 0}
    assert markdown(summarise(results))


def test_methods_judged_on_other_images_are_not_compared():
    results = judged()
    results["reno"] = Judged(results["reno"].rows[::-1], results["reno"].traces)
    with pytest.raises(ValueError, match="not judged on the same images"):
        summarise(results)


def test_one_method_alone_has_no_comparison():
    text = markdown(summarise({"none": judged()["none"]}))
    assert "Gain over" not in text


def test_report_files(tmp_path):
    text = write_report(tmp_path, summarise(judged()))
    assert (tmp_path / "table.md").read_text() == text
    assert json.loads((tmp_path / "summary.json").read_text())["methods"]["none"]["overall"]["images"] == 8


def test_table_is_padded_to_equal_columns():
    assert table(["a", "long"], [["wide", "x"]]).splitlines() == ["| a    | long |", "|------|------|", "| wide | x    |"]
