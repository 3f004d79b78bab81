"""`diffalign bench shapes` from command to table with a tiny real pipeline: same noises for all, resumable, judged from disk."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from diffalign.cli import main
from diffalign.rules import TASKS

FILES = {"settings.json", "results.jsonl", "units.jsonl", "protocol.json", "LIMITED.txt", "failures.html"}


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
    limited = "limited to 2 prompts a task (12 of 604)"
    assert summary["limited"] == json.loads((out / "reno" / "protocol.json").read_text())["limited"] == limited
    assert all(limited in line for line in (out / "table.md").read_text().splitlines() if line.startswith("## "))


def test_a_lost_image_is_made_again_and_is_the_same(finished, options, tmp_path):
    out = copy(finished, tmp_path)
    lost = sorted(out.glob("reno/0*/samples/*.png"))[2]
    before = lost.read_bytes()
    lost.unlink()
    assert main([*options, "--method", "reno", "--limit", "6", "--out", str(out)]) == 0
    assert lost.read_bytes() == before  # made in the same batch


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


def test_a_run_says_what_it_was_made_with(finished):
    made = json.loads((finished / "reno" / "settings.json").read_text())
    assert made["resolved"]["steps"] == 1
    assert made["resolved"]["guidance_scale"] == 0
    assert made["resolved"]["dtype"] == "float32"
    assert {"class", "height", "width", "scheduler"} <= set(made["resolved"])
    assert made["weights"].startswith("folder ")
    assert {"diffalign", "torch", "diffusers", "transformers"} <= set(made["versions"])
    (session,) = made["sessions"]
    assert session["device"].startswith("cpu")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["made"]["reno"]["resolved"] == made["resolved"]
    assert "- made with: 1 steps, guidance 0" in (finished / "table.md").read_text()


@pytest.fixture(scope="module")
def of_a_preset(tmp_path_factory):
    """A finished run of the preset shapes-turbo, and its command."""
    out = tmp_path_factory.mktemp("preset") / "run"
    command = ["bench", "shapes", "--method", "none", "--limit", "2", "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    return out, command


def test_a_run_resumed_under_a_changed_preset_is_refused(of_a_preset, tmp_path, capsys, monkeypatch):
    """Also where nothing is left to make: the report would speak of settings that the images were not made with."""
    from diffalign.pipelines import presets

    command = [*of_a_preset[1][:-1], str(copy(of_a_preset[0], tmp_path))]
    changed = dataclasses.replace(presets.PRESETS["shapes-turbo"], steps=2, scheduler="DDIMScheduler", notes="other words")
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "shapes-turbo": changed})
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "preset steps: 1 -> 2" in error
    assert "preset scheduler: None -> 'DDIMScheduler'" in error
    assert "notes" not in error
    assert main([*command, "--overwrite"]) == 0


def test_a_run_resumed_under_other_versions_is_refused_unless_allowed(of_a_preset, tmp_path, capsys, monkeypatch):
    from diffalign.evaluation import machine

    command = [*of_a_preset[1][:-1], str(copy(of_a_preset[0], tmp_path))]
    now = machine.versions()
    monkeypatch.setattr(machine, "versions", lambda: {**now, "diffusers": "99.0"})
    command[command.index("--limit") + 1] = "4"
    assert main(command) == 1
    assert f"versions diffusers: '{now['diffusers']}' -> '99.0'" in capsys.readouterr().err
    assert main([*command, "--allow-changed-versions"]) == 0
    assert f"CHANGED VERSIONS: diffusers {now['diffusers']} and 99.0" in capsys.readouterr().out


def test_a_call_that_cannot_load_leaves_what_was_there(of_a_preset, tmp_path, capsys, monkeypatch):
    """--overwrite deletes when the models are there, not before."""
    from diffalign.cli import parts

    def fails(*arguments):
        raise OSError("no such model")

    out = copy(of_a_preset[0], tmp_path)
    before = images(out, "none")
    monkeypatch.setattr(parts, "load_parts", fails)
    assert main([*of_a_preset[1][:-1], str(out), "--seed", "3", "--overwrite"]) == 1
    assert images(out, "none").keys() == before.keys()


def test_the_main_process_deletes_while_the_others_wait():
    """The order of calls in two processes of a launcher."""
    from diffalign.evaluation.processes import Share

    calls = []
    for main_process in (True, False):
        share = Share(None, opens=main_process, wait=lambda: calls.append("wait"))
        share.main_first(lambda opens: calls.append(f"act {opens}"))
    assert calls == ["wait", "act True", "wait", "wait", "wait", "act False"]
    calls.clear()

    def fails(opens):
        raise ValueError("made with other settings")

    with pytest.raises(ValueError, match="other settings"):
        Share(None, wait=lambda: calls.append("wait")).main_first(fails)
    assert calls == ["wait", "wait"]  # the others are let go


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
