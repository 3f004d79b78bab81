"""What bounds a search on the command line, and the noise policy that it may use: --seconds, --policy, `train find`."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from diffalign.cli import main, parse, parts
from diffalign.cli.options import POLICY_FILE, Search
from diffalign.methods import BestOfN, build_method
from diffalign.methods.table import METHODS, NOISE
from diffalign.noise_policy import CONFIG
from tests.places import WEIGHTS

SEARCHES = [row for row in METHODS if row.kind == NOISE]


def read(*words):
    return parse([str(word) for word in words])[1]


@pytest.mark.parametrize("row", SEARCHES, ids=lambda row: row.name)
def test_seconds_are_taken_by_the_methods_that_can_stop_and_refused_for_others(row):
    assert row.by_seconds == ("seconds" in {field.name for field in fields(row.load())})
    options = read("generate", "a star", "--method", row.name, "--seconds", "2")
    if row.by_seconds:
        options.check()
    else:
        with pytest.raises(ValueError, match=f"--seconds cannot stop {row.name}"):
            options.check()
        with pytest.raises(ValueError, match=f"--seconds cannot stop {row.name}"):
            read("bench", "shapes", "--method", "best-of-n", row.name, "--seconds", "2").check()


@pytest.mark.parametrize("given", ["0", "-1", "nan", "soon"])
def test_seconds_are_a_number_above_zero(given, capsys):
    with pytest.raises(SystemExit):
        read("generate", "a star", "--seconds", given)
    assert "--seconds" in capsys.readouterr().err


def test_options_of_a_search_that_do_not_fit_get_a_sentence(tmp_path):
    assert POLICY_FILE == CONFIG
    for words, said in (
        (["--method", "none", "--seconds", "1"], "--method none makes none"),
        (["--policy", tmp_path], "--policy belongs to --method amortised"),
        (["--method", "amortised", "--policy", tmp_path], "has no noise_policy.json; make it with `diffalign train find"),
        (["--method", "amortised", "--pipeline", "sd-turbo", "--reward", "brightness=1"], "needs --policy DIR with --pipeline sd-turbo"),
    ):
        with pytest.raises(ValueError, match=said):
            read("generate", "a star", *words).check()


def test_a_batch_has_the_seconds_of_its_images(brightness):
    search = Search(seconds=2.0)
    method = parts.search_method("best-of-n", brightness, 50, search)
    assert parts.of_batch(method, search, 3).seconds == 6.0
    unbounded = parts.search_method("best-of-n", brightness, 50, Search())
    assert parts.of_batch(unbounded, Search(), 3) is unbounded
    assert unbounded.seconds is None
    assert parts.search_method("none", None, 50, search) is None


@pytest.fixture
def brightness():
    from diffalign import hub

    return hub.load_reward({"brightness": 1.0})


def test_a_policy_is_for_the_methods_that_use_one(brightness, tmp_path):
    with pytest.raises(ValueError, match="best-of-n uses no trained policy"):
        build_method("best-of-n", brightness, 5, policy=tmp_path)
    assert isinstance(build_method("best-of-n", brightness, 5), BestOfN)


def test_a_run_in_seconds_says_so_and_other_seconds_are_refused(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["generate", "a red circle", "a blue square", "--batch-size", "2", "--pipeline", str(tiny_folder), "--steps",
               "1", "--guidance-scale", "0", "--device", "cpu", "--reward", "brightness=1", "--method", "best-of-n",
               "--out", str(out)]  # fmt: skip
    assert main([*command, "--seconds", "0.000001"]) == 0
    trace = json.loads((out / "00000-a-red-circle" / "trace.json").read_text())
    assert (trace["settings"]["budget"], trace["settings"]["seconds"]) == (None, 1e-6)
    assert trace["method_settings"]["seconds"] == 2e-6  # of the batch of two
    assert len(trace["rewards"]["total"]) < 50  # the time was up after the first batch of candidates
    assert main([*command, "--seconds", "2"]) == 1
    assert "seconds" in capsys.readouterr().err


def test_a_bench_in_seconds_says_so(tiny_folder, tmp_path):
    out = tmp_path / "out"
    command = ["bench", "shapes", "--pipeline", str(tiny_folder), "--steps", "1", "--guidance-scale", "0", "--device", "cpu", "--limit",
               "6", "--reward", "brightness=1", "--method", "best-of-n", "--batch-size", "6", "--out", str(out)]  # fmt: skip
    assert main([*command, "--seconds", "0.000001"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["config"]["budget"], summary["config"]["seconds"]) == (None, 1e-6)
    assert "budget of 1e-06 seconds per image" in summary["facts"]["pipeline"]
    assert "seconds" not in json.loads((out / "none" / "settings.json").read_text())
    assert json.loads((out / "best-of-n" / "settings.json").read_text())["seconds"] == 1e-6


@pytest.mark.skipif(not (WEIGHTS / "shapes-turbo").is_dir(), reason="the embedded model is not here")
def test_a_policy_from_training_to_use(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    folder, out = tmp_path / "policy", tmp_path / "out"
    train = ["train", "find", "--prompts-file", str(prompts), "--reward", "brightness=1", "--out", str(folder), "--batch-size", "2",
             "--width", "8", "--blocks", "1", "--schedule", "constant", "--device", "cpu"]  # fmt: skip
    assert main([*train, "--steps", "1"]) == 0
    assert f"--method amortised --policy {folder}" in capsys.readouterr().out
    assert main([*train, "--steps", "2"]) == 1
    assert "resume" in capsys.readouterr().err
    assert main([*train, "--steps", "2", "--resume"]) == 0
    card = json.loads((folder / "card.json").read_text())
    assert (card["steps"], card["command"].partition(" --")[0]) == (2, "diffalign train find")
    use = ["generate", "a red circle", "--method", "amortised", "--policy", str(folder), "--budget", "2", "--reward", "brightness=1",
           "--device", "cpu", "--out", str(out)]  # fmt: skip
    assert main(use) == 0, capsys.readouterr().err
    trace = json.loads((out / "00000-a-red-circle" / "trace.json").read_text())
    assert trace["settings"]["policy"].startswith("noise_policy.safetensors ")
    assert trace["method_settings"]["folder"] == str(folder)
    assert len(trace["rewards"]["total"]) == 2
    flat = [*train[:4], "--reward", "jpeg-incompressibility"]
    assert main(flat) == 1
    assert "has no gradient, which a noise policy learns from" in capsys.readouterr().err
