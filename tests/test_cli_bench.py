"""`diffalign bench shapes` from command to table with a tiny real pipeline: same noises for all, resumable, judged from disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from diffalign.benchmarks.geneval_rules import TASKS
from diffalign.cli import main

FILES = {"settings.json", "results.jsonl", "units.jsonl", "protocol.json"}


@pytest.fixture(scope="module")
def options(tiny_folder):
    fixed = "--steps 1 --guidance-scale 0 --budget 3 --device cpu --reward brightness=1 --watch jpeg-incompressibility"
    return ["bench", "shapes", "--pipeline", str(tiny_folder), *fixed.split()]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A finished run of three methods on six prompts, one of each task."""
    out = tmp_path_factory.mktemp("bench") / "run"
    arguments = [
        *options,
        "--method",
        "reno",
        "best-of-n",
        "--limit",
        "6",
        "--out",
        str(out),
        "--grid",
        str(out / "grid.png"),
        "--grid-per-task",
        "1",
    ]
    assert main(arguments) == 0
    return out


def copy(finished, tmp_path):
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def images(out, method):
    return {
        path.relative_to(out / method).as_posix(): np.asarray(Image.open(path)).astype(int)
        for path in sorted(out.glob(f"{method}/0*/samples/*.png"))
    }


def test_files_and_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["methods"]) == ["none", "reno", "best-of-n"]  # none is added, first
    assert list(summary["paired"]["differences"]) == ["reno", "best-of-n"]
    assert list(summary["methods"]["reno"]["tasks"]) == list(TASKS)
    assert summary["optimised"] == ["brightness"]
    assert summary["command"].startswith("diffalign bench shapes --pipeline")
    assert {"device", "date", "versions", "config"} <= set(summary)
    for method in summary["methods"]:
        rows = [json.loads(line) for line in (finished / method / "results.jsonl").read_text().splitlines()]
        assert [row["tag"] for row in rows] == list(TASKS)
        assert len(images(finished, method)) == 6
        assert {path.name for path in (finished / method).iterdir() if path.is_file()} == FILES
    table = (finished / "table.md").read_text()
    assert "brightness (optimised)" in table
    assert "jpeg-incompressibility (watched)" in table


def test_every_method_starts_from_the_same_noise_and_does_not_lose_reward(finished):
    summary = json.loads((finished / "summary.json").read_text())
    before = summary["methods"]["none"]["rewards"]["total"]["before"]
    for method in ("reno", "best-of-n"):
        assert summary["methods"][method]["largest_start_difference"] <= 1
        rewards = summary["methods"][method]["rewards"]["total"]
        assert rewards["before"] == pytest.approx(before, abs=0.01)
        assert rewards["after"] > rewards["before"]
    seeds = {
        m: [json.loads(p.read_text())["seed"] for p in sorted(finished.glob(f"{m}/0*/traces/*.json"))]
        for m in ("none", "reno", "best-of-n")
    }
    assert seeds["none"] == seeds["reno"] == seeds["best-of-n"]
    assert len(set(seeds["none"])) == 6


def test_the_grid_is_drawn(finished):
    grid = Image.open(finished / "grid.png")
    assert grid.width > 1000
    assert grid.height > 400


def test_batch_size_does_not_change_the_images(finished, options, tmp_path):
    assert main([*options, "--method", "reno", "--limit", "6", "--batch-size", "4", "--out", str(tmp_path)]) == 0
    ours, theirs = images(tmp_path, "reno"), images(finished, "reno")
    assert ours.keys() == theirs.keys()
    assert all(np.abs(ours[name] - theirs[name]).max() <= 1 for name in ours)


def test_a_second_run_only_reports_and_a_longer_one_only_adds(finished, options, tmp_path, capsys):
    out = copy(finished, tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/0*/samples/*.png")}
    assert main([*options, "--method", "reno", "best-of-n", "--limit", "6", "--out", str(out)]) == 0
    assert "Judge accuracy" in capsys.readouterr().out
    assert main([*options, "--method", "reno", "--limit", "12", "--out", str(out)]) == 0
    assert "12 of 24 images are already in" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert len(images(out, "reno")) == 12
    summary = json.loads((out / "summary.json").read_text())
    assert summary["methods"]["reno"]["overall"]["prompts"] == 12
    limited = "limited to 2 prompts a task (12 of 312)"
    assert summary["limited"] == json.loads((out / "reno" / "protocol.json").read_text())["limited"] == limited
    assert all(limited in line for line in (out / "table.md").read_text().splitlines() if line.startswith("## "))


def test_a_lost_image_is_made_again_and_is_the_same(finished, options, tmp_path):
    out = copy(finished, tmp_path)
    lost = sorted(out.glob("reno/0*/samples/*.png"))[2]
    before = np.asarray(Image.open(lost)).astype(int)
    lost.unlink()
    assert main([*options, "--method", "reno", "--limit", "6", "--out", str(out)]) == 0
    assert np.abs(np.asarray(Image.open(lost)).astype(int) - before).max() <= 1


def test_ctrl_c_keeps_what_is_finished(finished, options, tmp_path, capsys, monkeypatch):
    from diffalign.methods.reno import ReNO

    search, calls = ReNO.search, []

    def interrupted(self, problem):
        calls.append(problem)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(self, problem)

    monkeypatch.setattr(ReNO, "search", interrupted)
    arguments = [*options, "--method", "reno", "--limit", "6", "--batch-size", "2", "--out", str(tmp_path)]
    assert main(arguments) == 130
    assert "interrupted: 10 of 12 images are finished" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments) == 0
    ours, theirs = images(tmp_path, "reno"), images(finished, "reno")
    assert all(np.abs(ours[name] - theirs[name]).max() <= 1 for name in theirs)


def test_other_settings_are_refused(finished, options, tmp_path, capsys):
    out = copy(finished, tmp_path)
    assert main([*options, "--method", "reno", "--limit", "6", "--seed", "5", "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert "seed: 0 -> 5" in err
    assert "--overwrite" in err


def test_more_evaluations_concern_the_searches_alone(finished, options, tmp_path, capsys):
    """The images of "none" do not depend on the budget, so only the search is refused."""
    out = copy(finished, tmp_path)
    assert main([*options, "--budget", "2", "--method", "reno", "--limit", "6", "--out", str(out)]) == 1
    assert "reno holds images made with other settings (budget: 3 -> 2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--grid", "grid.jpg"], "--grid must name a .png file"), (["--out", "/dev/null/out"], "Not a directory")],
)
def test_bad_outputs_are_one_sentence(options, tmp_path, extra, message, capsys):
    assert main([*options, "--out", str(tmp_path), *extra]) == 1
    assert message in capsys.readouterr().err
