"""Reward rules on the command line, with a tiny real pipeline: calibrate, then generate and bench with rules and watchers."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from diffalign.cli import main
from diffalign.rewards import Calibration

FIXED = ["--steps", "1", "--guidance-scale", "0", "--device", "cpu"]
PAIR = ["--reward", "brightness", "jpeg-incompressibility"]


@pytest.fixture(scope="module")
def calibration(tiny_folder, tmp_path_factory):
    """A calibration of two rewards on six images."""
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "prompts.txt").write_text("a ring\na star\na ring\ntwo hearts\n")
    out = folder / "made" / "calibration.json"
    arguments = ["calibrate", "--pipeline", str(tiny_folder), *PAIR, "--prompts-file", str(folder / "prompts.txt"), "--samples", "2"]
    assert main([*arguments, *FIXED, "--out", str(out)]) == 0
    return out


def test_calibrate_writes_what_a_mix_can_load(calibration, capsys):
    found = Calibration.load(calibration)
    assert list(found.members) == PAIR[1:]
    assert {member.n for member in found.members.values()} == {6}  # three different prompts, two images of each
    assert all(member.within > 0 for member in found.members.values())
    assert "3 prompts, 2 images of each, seed 0" in found.source


def test_generate_with_a_rule(tiny_folder, calibration, tmp_path):
    """Best-of-N under the worst case: the total recorded is the least calibrated member of the image returned."""
    common = ["generate", "a ring", "--pipeline", str(tiny_folder), *FIXED, "--method", "best-of-n", "--budget", "4", *PAIR]
    rule = ["--reward-rule", "worst-case", "--calibration", str(calibration)]
    assert main([*common, *rule, "--out", str(tmp_path / "a")]) == 0
    trace = json.loads((tmp_path / "a" / "00000-a-ring" / "trace.json").read_text())
    numbers = Calibration.load(calibration)
    for k in range(4):
        units = [(trace["rewards"][name][k] - numbers.members[name].mean) / numbers.members[name].std for name in PAIR[1:]]
        assert trace["rewards"]["total"][k] == pytest.approx(min(units), abs=1e-4)
    assert trace["settings"]["reward_rule"] == "worst-case"
    assert trace["reward_mix"]["calibration"] == numbers.to_json()
    assert main([*common, *rule, "--out", str(tmp_path / "a")]) == 0  # finished already
    assert main([*common, "--out", str(tmp_path / "a")]) == 1  # other settings


def test_generate_shows_the_gap(tiny_folder, calibration, tmp_path):
    arguments = ["generate", "a ring", "--pipeline", str(tiny_folder), *FIXED, "--method", "reno", "--budget", "4"]
    rewards = [
        "--reward",
        "brightness",
        "--watch",
        "jpeg-incompressibility",
        "--reward-gradient",
        "equal",
        "--calibration",
        str(calibration),
    ]
    assert main([*arguments, *rewards, "--out", str(tmp_path)]) == 0
    folder = tmp_path / "00000-a-ring"
    trace = json.loads((folder / "trace.json").read_text())
    assert len(trace["panel"]["gap"]) == len(trace["rewards"]["total"])
    assert trace["panel"]["gap"][0] == 0
    with_panel = Image.open(folder / "rewards.png").height

    from diffalign.reports.plots import rewards_plot

    del trace["panel"]
    assert rewards_plot(trace).height < with_panel


def test_bench_reports_optimised_against_watched(tiny_folder, calibration, tmp_path):
    arguments = ["bench", "shapes", "--pipeline", str(tiny_folder), *FIXED, "--limit", "6", "--budget", "3", "--method", "best-of-n"]
    rewards = ["--reward", "brightness", "--watch", "jpeg-incompressibility", "--out", str(tmp_path / "run")]
    assert main([*arguments, *rewards]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["panel"]["unit"] == "one standard deviation of the run's first images"
    curves = summary["panel"]["methods"]["best-of-n"]
    assert curves["samples"] == 6
    assert curves["optimised"][0] == 0 <= curves["optimised"][-1]
    table = (tmp_path / "run" / "table.md").read_text()
    assert "## Optimised against watched" in table
    assert curves["verdict"] in table
    assert "Optimised against watched" in (tmp_path / "run" / "table.html").read_text()
    assert Image.open(tmp_path / "run" / "panel.png").width > 100
    assert json.loads((tmp_path / "run" / "reward.json").read_text())["members"] == {"brightness": 1.0}

    assert main([*arguments, *rewards, "--calibration", str(calibration), "--overwrite"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["panel"]["unit"] == "one standard deviation of the calibration"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward-rule", "worst-case"], "--reward-rule worst-case compares rewards, so it needs --calibration FILE.json"),
        (["--reward-rule", "soft-min=0.5"], "--reward-rule soft-min compares rewards"),
        (["--calibration", "nowhere.json"], "--calibration nowhere.json does not exist"),
    ],
)
def test_what_is_missing_is_said_before_anything_loads(arguments, message, tmp_path, capsys):
    assert main(["generate", "a ring", *arguments, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward-rule", "worst"], "unknown rule 'worst'; did you mean 'worst-case'"),
        (["--reward-rule", "soft-min=-1"], "beta of rule soft-min must be a finite number above 0"),
        (["--reward-gradient", "mgd"], "unknown gradient rule 'mgd'; did you mean 'mgda'"),
    ],
)
def test_mistyped_rules_are_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "a ring", *arguments])
    assert message in capsys.readouterr().err


def test_what_calibrate_refuses(tmp_path, capsys):
    assert main(["calibrate", "--reward", "brightness", "--logit", "shapes-clip"]) == 1
    assert "--logit names shapes-clip, which is not among --reward" in capsys.readouterr().err
    assert main(["calibrate", "--pipeline", "sd-turbo", "--reward", "brightness"]) == 1
    assert "--prompts-file is needed with --pipeline sd-turbo" in capsys.readouterr().err


def test_default_weights_are_of_native_units():
    from pathlib import Path

    from diffalign.cli.options import DEFAULT_REWARD, Rewards

    assert Rewards().mix("shapes-turbo") == DEFAULT_REWARD
    assert set(Rewards(calibration=Path(__file__)).mix("shapes-turbo").values()) == {1.0}
