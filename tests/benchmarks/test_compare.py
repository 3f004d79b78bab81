"""`diffalign bench compare` on runs written by hand, so that every number in the table is known."""

import json

import numpy as np
import pytest
from PIL import Image

from diffalign.cli import main
from diffalign.reports.compare import compare, compare_all, markdown
from diffalign.reports.curves import COLORS

A = [1, 0, 0, 0] + [0, 0, 0, 0]
B = [1, 1, 1, 0] + [1, 0, 0, 0]


def run(folder, values, key="correct", settings=None, protocol=None, prompts=None):
    folder.mkdir(parents=True)
    rows = [
        {"filename": f"{i:05d}/samples/00000.png", "tag": "counting" if i < 4 else "position", "prompt": f"prompt {i}", key: value}
        for i, value in enumerate(values)
        if value is not None
    ]
    if prompts:
        rows = [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, data in (("settings", settings), ("protocol", protocol)):
        if data:
            (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def pair(tmp_path):
    return run(tmp_path / "a", [bool(v) for v in A]), run(tmp_path / "b", [bool(v) for v in B])


def test_means_differences_and_discordance_by_hand(pair):
    result = compare(*pair)
    assert (result["A"]["overall"]["mean"], result["B"]["overall"]["mean"]) == ((1 / 4 + 0) / 2, (3 / 4 + 1 / 4) / 2)
    assert result["difference"]["overall"]["mean"] == pytest.approx(0.375)
    assert result["difference"]["tasks"]["counting"]["mean"] == 0.5
    assert result["discordant"] == {"gained": 3, "lost": 0, "p_value": 0.25}  # 2 x (1/2)^3
    assert result["difference"]["tasks"]["position"]["p_holm"] >= result["difference"]["tasks"]["position"]["p_value"]
    assert result["notes"] == []


def test_table_and_files(pair, tmp_path, capsys):
    assert main(["compare", *map(str, pair), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "+0.375 [" in text
    assert "right in B only 3, in A only 0" in text
    assert "8 images of 8 prompts" in text
    assert text.startswith((tmp_path / "out" / "compare.md").read_text())
    assert "+0.375 [" in (tmp_path / "out" / "compare.html").read_text()
    assert markdown(json.loads((tmp_path / "out" / "compare.json").read_text())) == (tmp_path / "out" / "compare.md").read_text()


def test_scores_are_compared_as_verdicts_are(tmp_path):
    a, b = run(tmp_path / "a", [0.2] * 8, "value"), run(tmp_path / "b", [0.3] * 8, "value")
    result = compare(a, b)
    assert result["difference"]["overall"]["mean"] == pytest.approx(0.1)
    assert "discordant" not in result


def test_images_in_one_run_only_fail_unless_allowed(tmp_path):
    a, b = run(tmp_path / "a", [True] * 8), run(tmp_path / "b", [True] * 7 + [None])
    with pytest.raises(ValueError, match="1 images are in one run only"):
        compare(a, b)
    result = compare(a, b, allow_missing=True)
    assert result["images"] == 7
    assert result["notes"] == ["partial: 1 images are in one run only and were left out"]


def test_a_limited_run_is_not_mixed_with_a_full_one_unless_asked(tmp_path):
    """Even where the images are the same ones: "limited" is what a figure is quoted with."""
    limited = {"limited": "limited to 4 prompts a task (8 of 20)"}
    a, b = run(tmp_path / "a", [True] * 8, protocol=limited), run(tmp_path / "b", [True] * 8)
    with pytest.raises(ValueError, match=r"different prompts .*8 of 20.*all prompts.*--allow-missing"):
        compare_all([a, b])
    result = compare_all([a, b], allow_missing=True)
    assert result["limited"] == "limited to the 8 images that all runs have"
    assert "limited" not in compare_all([b, run(tmp_path / "c", [True] * 8)])
    same = compare_all([a, run(tmp_path / "d", [False] * 8, protocol=limited)])
    assert same["limited"] == limited["limited"]
    headings = [line for line in markdown(same).splitlines() if line.startswith("## ")]
    assert headings
    assert all(limited["limited"] in line for line in headings)


@pytest.mark.parametrize("key", ["scorer", "benchmark", "prompt lists"])
def test_runs_judged_in_other_ways_are_refused(tmp_path, key):
    a, b = run(tmp_path / "a", [True] * 8, protocol={key: "x"}), run(tmp_path / "b", [True] * 8, protocol={key: "y"})
    with pytest.raises(ValueError, match=f"cannot be compared: their {key} differ"):
        compare(a, b)


def test_other_noises_are_said(tmp_path):
    a, b = run(tmp_path / "a", [True] * 8, settings={"seed": 0}), run(tmp_path / "b", [True] * 8, settings={"seed": 1})
    assert compare(a, b)["notes"] == ["the runs differ in seed, so only prompts are paired, not noises"]


def test_other_prompts_under_the_same_names_are_refused(tmp_path):
    a, b = run(tmp_path / "a", [True] * 8), run(tmp_path / "b", [True] * 8, prompts=[f"other {i}" for i in range(8)])
    with pytest.raises(ValueError, match="not of the same benchmark"):
        compare(a, b)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        ('{"filename": "a", "prompt": "p", "tag": "t", "correct": true}\n' * 2, "names an image twice"),
        ('{"tag": "t", "correct": true}\n', "row 1 lacks filename"),
        ("{\n", "line 1 is not a JSON object"),
    ],
)
def test_results_that_are_no_results_are_named(pair, lines, message):
    (pair[1] / "results.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        compare(*pair)


# --- several runs, and what they cost -----------------------------------------------------------------------------------------


def priced(folder, values, method, nfe, seconds, key="correct"):
    """A run with its costs beside."""
    run(folder, values, key, settings={"method": method, "seed": 0})
    unit = {"seconds": seconds, "nfe": nfe, "reward_calls": nfe, "peak_memory_mb": 2048}
    (folder / "units.jsonl").write_text("".join(json.dumps(unit) + "\n" for _ in values))
    return folder


@pytest.fixture
def ladder(tmp_path):
    """Doing nothing, and two methods at 10 and at 40 and 41 evaluations."""
    return [
        priced(tmp_path / "none", [False] * 8, "none", 1, 0.1),
        priced(tmp_path / "bon10", [bool(v) for v in A], "best-of-n", 10, 1.0),
        priced(tmp_path / "bon40", [bool(v) for v in B], "best-of-n", 40, 4.0),
        priced(tmp_path / "reno40", [True] * 8, "reno", 41, 9.0),
    ]


def test_several_runs_are_compared_with_the_first_and_at_equal_cost(ladder):
    """40 and 41 evaluations are equal within 5 %; 10 and 40 are not, and one method is not compared with itself."""
    found = compare_all(ladder)["measures"]["accuracy"]
    assert [(each["from"], each["to"]) for each in found["differences"]] == [(0, 1), (0, 2), (0, 3), (2, 3)]
    assert [each["mean"] for each in found["differences"]] == pytest.approx([0.125, 0.5, 1.0, 0.5])
    assert all(each["p_holm"] >= each["p_value"] for each in found["differences"])
    assert [point["cost"]["nfe"] for point in found["points"]] == [1, 10, 40, 41]
    assert [point["line"] for point in found["points"]] == ["none", "best-of-n", "best-of-n", "reno"]
    assert "difference" not in found


def test_curves_are_drawn_and_linked(ladder, tmp_path, capsys):
    assert main(["compare", *map(str, ladder), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| D: reno - C: best-of-n | equal evaluations | +0.500" in text
    assert "| D: reno      | 1.000 [0.68, 1.00] | 9       | 41 " in text
    assert "![accuracy against cost](curve.png)" in text
    assert '<img class="plot" src="curve.png"' in (tmp_path / "out" / "compare.html").read_text()
    with Image.open(tmp_path / "out" / "curve.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    lines = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in COLORS[:3]]
    assert all((pixels == line).all(axis=1).any() for line in lines)  # three methods, three colours
    assert "![" not in capsys.readouterr().out  # a terminal shows no pictures


def test_without_costs_there_is_no_curve(pair, tmp_path):
    assert main(["compare", *map(str, pair), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "curve.png").exists()
    assert "![" not in (tmp_path / "out" / "compare.md").read_text()


def test_each_measure_is_compared_that_both_runs_have(tmp_path):
    a, b = run(tmp_path / "a", [0] * 8, "value"), run(tmp_path / "b", [0] * 8, "value")
    for folder, measures in ((a, ("clip", "taste")), (b, ("taste", "pick"))):
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        for row in rows:
            del row["value"]
            row["values"] = dict.fromkeys(measures, 1.0 if folder == a else 3.0)
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare_all([a, b])["measures"]
    assert list(found) == ["taste"]
    assert found["taste"]["difference"]["overall"]["mean"] == 2.0


def test_scorers_that_both_runs_have_must_agree(tmp_path):
    a = run(tmp_path / "a", [True] * 8, protocol={"scorers": {"clip": "v1", "taste": "v1"}})
    b = run(tmp_path / "b", [True] * 8, protocol={"scorers": {"clip": "v1", "pick": "v1"}})
    c = run(tmp_path / "c", [True] * 8, protocol={"scorers": {"clip": "v2"}})
    compare(a, b)
    with pytest.raises(ValueError, match="their scorers differ"):
        compare(a, c)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "compare takes two or more runs"),
        (["a"], "compare takes two or more runs"),
        (["a", "./a"], "given a run twice"),
        (["a", "b"], "is not a judged run"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
