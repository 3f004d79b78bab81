"""`generate --guidance` and `train linear-ag | guidance-search` with a tiny real pipeline."""

from __future__ import annotations

import json

import pytest

from diffalign.cli import main
from diffalign.cli.guidance_words import summary
from diffalign.cli.options import FROM_FILE
from diffalign.methods.guidance_search import SearchedGuidance
from diffalign.methods.linear_guidance import LinearCoefficients

SAMPLER = ["--steps", "4", "--guidance-scale", "3", "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\ntwo blue squares\na green star\n")
    return file


@pytest.fixture
def generate(tiny_folder, tmp_path, capsys):
    def run(*arguments, out="out"):
        fixed = ["--pipeline", str(tiny_folder), "--method", "none", *SAMPLER, "--out", str(tmp_path / out)]
        code = main(["generate", "a red circle", *map(str, arguments), *fixed])
        captured = capsys.readouterr()
        traces = [json.loads(path.read_text()) for path in (tmp_path / out).glob("*/trace.json")]
        return code, captured.err, traces[0] if traces else None

    return run


@pytest.fixture
def train(tiny_folder, prompts, tmp_path, capsys):
    def run(what, *arguments):
        fixed = ["--pipeline", str(tiny_folder), "--prompts-file", str(prompts), *SAMPLER, "--out", str(tmp_path / what)]
        code = main(["train", what, *map(str, arguments), *fixed])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, tmp_path / what

    return run


@pytest.mark.parametrize(("name", "evaluations"), [("full", None), ("fixed", 6), ("reuse", 6), ("interval", None), ("adaptive", None)])
def test_generate_with_each_method(name, evaluations, generate):
    code, err, trace = generate("--guidance", name)
    assert code == 0, err
    if name == "full":
        assert trace["guidance"] is None
        assert trace["settings"]["guidance"] is None
        return
    assert trace["guidance"]["method"] == name == trace["settings"]["guidance"]["method"]
    assert trace["guidance"]["evaluations_in_full"] == 8
    assert 4 < trace["guidance"]["evaluations"] <= 8
    if evaluations:
        assert trace["guidance"]["evaluations"] == evaluations
        assert trace["guidance"]["saved"] == 0.25


def test_a_threshold_is_taken(generate):
    _, _, trace = generate("--guidance", "adaptive", "--guidance-threshold", "-0.9")
    assert trace["guidance"]["evaluations"] == 5
    assert len(trace["guidance"]["diagnostics"]["cosine"]) == 1


def test_a_refresh_is_taken(generate):
    """Settled after the first of 4 steps, and evaluated anew at the third."""
    _, err, trace = generate("--guidance", "adaptive", "--guidance-threshold", "-0.9", "--guidance-refresh", "2")
    assert trace["guidance"]["evaluations"] == 6, err
    assert trace["settings"]["guidance"]["refresh"] == 2


def test_the_user_is_told_what_was_saved(generate, monkeypatch):
    told = []
    monkeypatch.setattr("diffalign.cli.generate.tqdm.write", told.append)
    generate("--guidance", "fixed")
    assert told[-1].endswith(" s, 6 evaluations instead of 8")
    generate(out="plain")
    assert told[-1].endswith(" s")
    assert summary({"method": "fixed", "saved": 0.25}) == ", fixed guidance saved 25 % of the evaluations"


def test_linear_within_a_budget(train, generate):
    code, out, err, folder = train("linear-ag", "--samples", "10", "--batch-size", "5", "--budget", "0.75")
    assert code == 0, err
    assert "6 evaluations instead of 8" in out
    assert "steps that evaluate both branches: 0 " in out
    _, err, trace = generate("--guidance", "linear", "--guidance-from", folder)
    assert trace["guidance"]["evaluations"] == 6, err


def test_linear_from_training_to_use(train, generate):
    code, out, err, folder = train("linear-ag", "--samples", "10", "--batch-size", "4")
    assert code == 0, err
    assert "8 trajectories fitted, 2 held out" in out
    assert LinearCoefficients.load(folder).identity["guidance_scale"] == 3.0
    code, err, trace = generate("--guidance", "linear", "--guidance-from", folder)
    assert code == 0, err
    assert trace["guidance"]["method"] == "linear"


def test_a_fit_for_other_settings_is_refused_with_the_reason(train, tiny_folder, tmp_path, capsys):
    _, _, _, folder = train("linear-ag", "--samples", "5", "--batch-size", "5")
    command = ["generate", "a red circle", "--pipeline", str(tiny_folder), "--method", "none", "--steps", "4", "--guidance-scale", "5",
               "--device", "cpu", "--out", str(tmp_path / "out"), "--guidance", "linear", "--guidance-from", str(folder)]  # fmt: skip
    assert main(command) == 1
    assert "guidance_scale: 3.0 when it was made, 5.0 now" in capsys.readouterr().err


def test_searched_from_training_to_use(train, generate):
    code, out, err, folder = train("guidance-search", "--iterations", "2", "--batch-size", "2")
    assert code == 0, err
    policy = SearchedGuidance.load(folder / FROM_FILE["searched"])
    assert len(policy.strengths) == 4
    assert "evaluations instead of 8" in out
    code, err, trace = generate("--guidance", "searched", "--guidance-from", folder)
    assert code == 0, err
    assert trace["guidance"]["evaluations"] <= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance", "linear"], "--guidance linear needs --guidance-from DIR; make it with `diffalign train linear-ag"),
        (["--guidance", "searched", "--guidance-from", "nowhere"], "has no searched_guidance.json; make it with"),
        (["--guidance", "fixed", "--guidance-from", "x"], "--guidance-from belongs to --guidance linear and searched"),
        (["--guidance-threshold", "0.9"], "--guidance-threshold belongs to --guidance adaptive"),
        (["--guidance", "fixed", "--guidance-refresh", "3"], "--guidance-refresh belongs to --guidance adaptive"),
    ],
)
def test_options_that_do_not_fit_get_a_sentence(arguments, message, generate):
    code, err, trace = generate(*arguments)
    assert code == 1
    assert message in err
    assert trace is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance", "adaptiv"], "did you mean 'adaptive'?"),
        (["--guidance-threshold", "2"], "must be a cosine"),
        (["--guidance-threshold", "x"], "must be a cosine"),
        (["--guidance", "adaptive", "--guidance-refresh", "1"], "must be a whole number of at least 2, got '1'"),
    ],
)
def test_wrong_values_get_a_sentence(arguments, message, generate, capsys):
    with pytest.raises(SystemExit) as stop:
        generate(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_training_is_refused_where_it_cannot_be(tiny_folder, train, capsys):
    assert main(["train", "linear-ag", "--pipeline", str(tiny_folder)]) == 1
    assert "--prompts-file is needed" in capsys.readouterr().err
    code, _, err, _ = train("linear-ag", "--samples", "3")
    assert code == 1
    assert "--samples must be at least 5" in err
    code, _, err, _ = train("guidance-search", "--budget", "0.4")
    assert code == 1
    assert "budget must be" in err


def test_without_guidance_there_is_nothing_to_save(tiny_folder, tmp_path, capsys):
    command = ["generate", "a red circle", "--pipeline", str(tiny_folder), "--method", "none", "--steps", "1", "--guidance-scale", "0",
               "--device", "cpu", "--out", str(tmp_path / "out"), "--guidance", "fixed"]  # fmt: skip
    assert main(command) == 1
    assert "runs without classifier-free guidance (guidance_scale is 0)" in capsys.readouterr().err
