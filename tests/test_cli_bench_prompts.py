"""`diffalign bench parti | hpsv2 | drawbench | dpg | geneval2` from command to table: a tiny pipeline, cheap rewards, a tiny judge."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from diffalign.cli import main
from tests.benchmarks.prompt_files import DPG_PROMPTS, write_prompt_files
from tests.reward_models.tiny_vlms import write_judge


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_prompt_files(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    write_judge(folder)
    return folder


@pytest.fixture
def bench(capsys, tiny_folder, folders):
    """Runs the command on a benchmark's prompts; gives exit code, output and errors."""

    def call(name, out, *more, prompts=True):
        fixed = ["--pipeline", tiny_folder, "--steps", 1, "--guidance-scale", 0, "--device", "cpu", "--batch-size", 8, "--budget", 2]
        source = ["--prompts", folders[name]] if prompts and name in folders else []
        code = main(list(map(str, ["bench", name, *fixed, *source, "--out", out, *more])))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_preferences_without_a_search(bench, tmp_path):
    code, out, err = bench("parti", tmp_path, "--method", "none", "--reward", "brightness", "jpeg-compressibility")
    assert code == 0, err
    assert "## Mean brightness, with 95 % intervals" in out
    assert "## Mean jpeg-compressibility, with 95 % intervals" in out
    assert "## By challenge, mean of the first reward" in out
    assert "brightness (mean luminance)" in out  # the scorer, at the foot
    assert "3 prompts, list " in out
    assert set(rows(tmp_path / "none")[0]["values"]) == {"brightness", "jpeg-compressibility"}
    unit = json.loads((tmp_path / "none" / "units.jsonl").read_text().splitlines()[1])
    assert (unit["prompt"], unit["nfe"], unit["reward_calls"], unit["status"], unit["size"]) == ("a dog", 1, 0, "judged", [32, 32])
    assert len(unit["sha256"]) == 64


def test_a_search_is_judged_by_what_it_climbed_and_by_what_it_did_not(bench, tmp_path, capsys):
    search = ["--reward", "brightness", "--watch", "jpeg-incompressibility"]
    assert bench("drawbench", tmp_path, "--method", "none", *search)[0] == 0  # other judges later are other columns, not other images
    code, out, err = bench("drawbench", tmp_path, "--method", "best-of-n", *search)
    assert code == 0, err
    assert out.index("Mean jpeg-incompressibility (watched)") < out.index("Mean brightness (optimised)")  # what nobody climbed comes first
    assert "2 of 4 images are already in" in out
    assert json.loads((tmp_path / "summary.json").read_text())["methods"]["best-of-n"]["cost"]["reward_calls"] == 2
    assert main(["compare", str(tmp_path / "none"), str(tmp_path / "best-of-n"), "--out", str(tmp_path / "compared")]) == 0
    text = capsys.readouterr().out
    assert "## brightness" in text
    assert "## jpeg-incompressibility" in text
    assert (tmp_path / "compared" / "curve-1.png").is_file()


def test_hpsv2_in_its_own_layout(bench, tmp_path):
    code, out, err = bench("hpsv2", tmp_path, "--method", "none", "--reward", "brightness")
    assert code == 0, err
    assert Image.open(tmp_path / "none" / "photo" / "00001.jpg").format == "JPEG"
    lines = (tmp_path / "none" / "hpsv2.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["anime", "concept-art", "paintings", "photo", "average"]
    code, out, err = bench("hpsv2", tmp_path / "report", "--reward", "brightness", "--images", tmp_path / "none")
    assert code == 0, err
    assert "Mean brightness, with" in out


def test_a_jpeg_starts_from_the_same_noise(bench, tmp_path):
    """Its losses are no other start."""
    search = ["--method", "best-of-n", "--reward", "brightness", "--batch-size", 1]
    code, out, err = bench("hpsv2", tmp_path / "jpeg", *search)
    assert code == 0, err
    assert "start elsewhere" not in err
    assert json.loads((tmp_path / "jpeg" / "summary.json").read_text())["methods"]["best-of-n"]["largest_start_difference"] == 0
    assert "cut prompts" not in out


def test_the_end_of_long_prompts_that_the_model_did_not_read_is_reported(bench, tmp_path, caplog):
    (tmp_path / "list.txt").write_text("a dog that is far too long for thirty letters\na dog of a length that does not fit either\na cat\n")
    arguments = ["--prompts", tmp_path / "list.txt", "--method", "none", "--watch", "brightness", "--batch-size", 1]
    code, out, err = bench("drawbench", tmp_path / "run", *arguments, prompts=False)
    assert code == 0, err
    assert "cut prompts: of 2 of 3 images the model did not read the end of the prompt" in out
    assert len([record for record in caplog.records if "longer than the model" in record.msg]) == 1


def test_dpg_with_answers_and_grids(bench, tmp_path):
    answers = {
        f"{item}/samples/{k:05d}.png": {"Is there a thing?": "yes", "Is the thing red?": "yes" if k else "no"}
        for item in DPG_PROMPTS
        for k in range(4)
    }
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    judged = ["--answers", tmp_path / "answers.json"]
    code, out, err = bench("dpg", tmp_path / "run", "--method", "none", *judged)
    assert code == 0, err
    assert "0.875 [" in out  # three of four images 1, one a half
    assert "another scale" in out
    assert "Categories of questions" in out
    folder = tmp_path / "run" / "none"
    assert (folder / "dpg_scores.txt").read_text().startswith("DPG-Bench score: 87.5000")
    assert Image.open(folder / "grids" / "10.png").size == (64, 64)
    code, out, err = bench("dpg", tmp_path / "again", *judged, "--images", folder / "grids")
    assert code == 0, err
    assert rows(tmp_path / "again" / "tiles") == rows(folder)


def test_dpg_and_geneval2_by_a_model(bench, tmp_path, judge):
    code, out, err = bench("dpg", tmp_path / "dpg", "--method", "none", "--judge", judge, "--samples", 1)
    assert code == 0, err
    assert f"vlm-judge {judge}" in out
    code, out, err = bench("geneval2", tmp_path / "geneval2", "--method", "none", "--judge", judge)
    assert code == 0, err
    assert "Mean soft-tifa-gm" in out
    assert "Mean soft-tifa-am" in out
    assert "Skills" in out
    folder = tmp_path / "geneval2" / "none"
    scores = json.loads((folder / "scores.json").read_text())
    (tmp_path / "given.json").write_text(json.dumps(scores))
    code, out, err = bench("geneval2", tmp_path / "given", "--answers", tmp_path / "given.json", "--images", folder)
    assert code == 0, err
    assert [row["values"] for row in rows(folder)] == [row["values"] for row in rows(tmp_path / "geneval2" / "none")]


def test_a_report_loads_no_judge(bench, tmp_path, judge, monkeypatch):
    """After the shards are done somebody sums up, maybe on a machine without room for the judge."""
    dpg, parti = ["dpg", tmp_path / "dpg", "--judge", judge, "--samples", 1], ["parti", tmp_path / "parti", "--watch", "brightness"]
    for command in (dpg, parti):
        assert bench(*command, "--method", "none")[0] == 0

    def refuse(*arguments, **named):
        raise AssertionError("loaded")

    monkeypatch.setattr("diffalign.hub.load_judge", refuse)
    monkeypatch.setattr("diffalign.hub.load_reward", refuse)
    for command in (dpg, parti):
        assert bench(*command, "--method", "none", "--stage", "report")[0] == 0


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("parti", [], "--reward or --watch is needed"),
        ("dpg", [], "--judge (vlm, or a hub id or folder of a Qwen-VL model) or --answers"),
        ("dpg", ["--answers", "nowhere.json"], "--answers nowhere.json does not exist"),
        ("dpg", ["--answers", "nowhere.json", "--judge", "vlm"], "give one of them"),
        ("dpg", ["--judge", "vlm", "--questions", "nowhere.csv"], "name that file with --questions"),
        ("hpsv2", ["--reward", "brightness", "--samples", "2"], "one image per prompt"),
        ("drawbench", ["--reward", "brightness", "--grid", "grid.png"], "drawbench gives scores instead"),
    ],
)
def test_wrong_options_fail_before_anything_is_made(bench, tmp_path, monkeypatch, name, more, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = bench(name, tmp_path / "run", "--method", "none", *more)
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("name", ["parti", "hpsv2", "drawbench", "dpg", "geneval2"])
def test_prompts_must_be_brought(bench, tmp_path, name):
    code, _, err = bench(name, tmp_path / "run", "--method", "none", "--stage", "generate", prompts=False)
    assert code == 1
    assert "--prompts is needed" in err
    code, _, err = bench(
        name, tmp_path / "run", "--method", "none", "--stage", "generate", "--prompts", tmp_path / "nowhere", prompts=False
    )
    assert code == 1
    assert "nowhere" in err
    assert len(err.splitlines()) == 1
