"""`diffalign bench compare` on runs written by hand, so that every number in the table is known."""

import json

import pytest

from diffalign.cli import main
from diffalign.commands.compare import compare, markdown

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
    assert main(["bench", "compare", *map(str, pair), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "+0.375 [" in text
    assert "right in B only 3, in A only 0" in text
    assert "8 images of 8 prompts" in text
    assert (tmp_path / "out" / "compare.md").read_text() == text
    assert markdown(json.loads((tmp_path / "out" / "compare.json").read_text())) == text


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
    ("arguments", "message"),
    [
        (["compare"], "compare takes two runs"),
        (["compare", "a", "b", "c"], "compare takes two runs"),
        (["compare", "a", "b"], "is not a judged run"),
        (["shapes", "a"], "only compare takes runs"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
