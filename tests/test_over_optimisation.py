"""scripts/over_optimisation.py from arms to report at a tiny size, and what it does not do twice."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from tests.places import ROOT, WEIGHTS


@pytest.fixture
def script():
    path = ROOT / "scripts" / "over_optimisation.py"
    spec = importlib.util.spec_from_file_location("over_optimisation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_image_that_would_be_returned(script):
    assert script.best_so_far([1.0, 0.5, 2.0, 2.0, 3.0]) == [0, 0, 2, 2, 4]


def test_a_choice_among_candidates_is_what_best_of_n_would_make(script):
    from diffalign.reward_models import load
    from diffalign.rewards import Calibration, RewardMix

    rewards = {name: [3.0, 1.0, 2.0] for name in script.REWARDS} | {"shapes-clip": [0.0, 9.0, 5.0]}
    mix = RewardMix(
        {"shapes-clip": (load("brightness"), 1.0), "shapes-preference": (load("brightness"), 1.0)},
        rule="worst-case",
        calibration=Calibration.identity(["shapes-clip", "shapes-preference"]),
    )

    class Item:
        prompt = "a ring"

    found = script.chosen({"rewards": rewards, "correct": [True, False, True]}, Item, mix)
    assert found["rewards"]["total"] == [0.0, 1.0, 2.0]
    assert found["best"] == 2


def test_figures_recorded_before_the_budget_had_its_name_are_still_read(script):
    found = json.loads((ROOT / "docs" / "results" / "over_optimisation.json").read_text())
    assert "evaluations" in found["settings"]
    assert "144 test prompts, 25 evaluations, seed 0" in script.markdown(found)


@pytest.mark.slow
def test_the_whole_and_its_resumption(script, tmp_path, monkeypatch, capsys):
    if not (WEIGHTS / "shapes-aesthetic").is_dir():
        pytest.skip("the models are not trained yet: there is no diffalign/shapes/weights")
    arguments = ["--limit", "6", "--budget", "2", "--base-samples", "2", "--split", "validation", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["over_optimisation.py", *arguments])
    threads = torch.get_num_threads()
    script.main()
    first = capsys.readouterr().out
    assert first.count(" s\n") == 13  # seven arms under ReNO, six under best-of-N
    found = json.loads((tmp_path / "over_optimisation.json").read_text())
    arm = found["methods"]["reno"]["worst case (WCO)"]
    assert arm["panel"]["optimised"][0] == 0
    assert len(arm["accuracy_curve"]) == 2
    assert (tmp_path / "over_optimisation.png").stat().st_size > 10_000
    assert "| worst case (WCO) " in (tmp_path / "over_optimisation.md").read_text()

    (tmp_path / "arms" / "reno-worst-case.json").unlink()
    script.main()
    assert capsys.readouterr().out.count(" s\n") == 1
    again = json.loads((tmp_path / "over_optimisation.json").read_text())
    assert again["methods"] == found["methods"]
    torch.set_num_threads(threads)
