"""The command line before anything heavy loads: help, names, numbers, and options from a file."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffalign import __version__, hub
from diffalign.benchmarks.table import BENCHMARKS
from diffalign.cli import commands, main, options, parse, parts
from diffalign.cli.table import COMMANDS
from diffalign.evaluation import machine
from diffalign.methods.table import METHODS
from diffalign.options import options_of
from tests.places import ROOT

HEAVY = ("torch", "diffusers", "transformers", "numpy", "matplotlib", "gradio")


def read(*arguments):
    """The settings that a command line stands for."""
    return parse([str(argument) for argument in arguments])[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["bench", "--help"],
        ["demo", "--help"],
        ["score", "--help"],
        ["score", "x", "--reward", "shapes-clap"],
        ["score", "no/such/folder", "--reward", "brightness"],
        ["rewards", "shapes-clap"],
        ["generate", "a star", "--pipeline", "shapes-trubo"],
        ["generate", "a star", "--reward", "shapes-clap=1"],
        ["generate"],
    ],
)
def test_help_and_mistakes_answer_before_anything_heavy_is_imported(arguments):
    code = f"""
import sys
from diffalign.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "[]"


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"diffalign {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", "shapes-trubo"], "did you mean 'shapes-turbo'?"),
        (["--reward", "shapes-clap=1"], "unknown reward 'shapes-clap'; did you mean 'shapes-clip'?"),
        (["--watch", "britghness"], "did you mean 'brightness'?"),
        (["--method", "ren0"], "unknown method 'ren0'; did you mean 'reno'?"),
        (["--method", "zzz"], "known: none, reno, reno-paper, best-of-n"),
        (["--reward", "shapes-clip=nan"], "must be a finite number other than 0"),
        (["--reward", "shapes-clip=inf"], "must be a finite number other than 0"),
        (["--reward", "shapes-clip=0"], "must be a finite number other than 0"),
        (["--reward", "shapes-clip="], "must be a finite number other than 0"),
        (["--reward", "shapes-clip=much"], "got 'much'"),
        (["--seed", "-1"], "must be a whole number, between 0"),
        (["--seed", "1.5"], "must be a whole number, between 0"),
        (["--budget", "0"], "must be a whole number, at least 1; got '0'"),
        (["--batch-size", "none"], "must be a whole number, at least 1; got 'none'"),
        (["--steps", "-3"], "at least 1"),
        (["--guidance-scale", "nan"], "must be a finite number of at least 0; got 'nan'"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--sed", "1"], "unrecognized arguments: --sed 1"),
    ],
)
def test_wrong_arguments_are_one_line_that_says_what_to_do(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "a star", *arguments])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["bench", "shape"], ["bnch"], []])
def test_unknown_commands_and_benchmarks(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_rewards_add_up_over_repeated_options():
    options = read(
        "generate",
        "a star",
        "--reward",
        "shapes-clip=2",
        "brightness",
        "--reward",
        "shapes-aesthetic=-0.5",
        "--watch",
        "jpeg-compressibility",
    )
    assert options.mix() == {"shapes-clip": 2.0, "brightness": 1.0, "shapes-aesthetic": -0.5}
    assert options.rewards.watch == ("jpeg-compressibility",)


@pytest.mark.parametrize(
    "extra", [["--reward", "brightness=1", "--reward", "brightness=2"], ["--reward", "brightness", "--watch", "brightness"]]
)
def test_a_reward_given_twice_is_an_error(extra):
    with pytest.raises(ValueError, match="brightness is given more than once"):
        read("generate", "a star", *extra).check()


def test_default_reward_is_for_the_shapes_alone():
    assert read("generate", "a star").mix() == options.DEFAULT_REWARD
    with pytest.raises(ValueError, match="--reward is needed with --pipeline sd-turbo"):
        read("generate", "a star", "--pipeline", "sd-turbo").mix()


def test_a_hub_id_and_a_folder_pass_as_pipelines(tmp_path):
    assert read("generate", "a", "--pipeline", "org/model").model.pipeline == "org/model"
    assert read("generate", "a", "--pipeline", tmp_path).model.pipeline == str(tmp_path)


def test_batch_size_defaults_to_one_except_for_the_small_models():
    assert read("generate", "a").model.batch(16) == 16
    assert read("generate", "a", "--pipeline", "sd-turbo").model.batch(16) == 1
    assert read("generate", "a", "--batch-size", "3").model.batch(16) == 3


def test_finite_or_none_reaches_every_number():
    nan = float("nan")
    assert machine.finite_or_none({"a": [1.0, nan], "b": {"c": (float("inf"), 2)}, "d": "nan"}) == {
        "a": [1.0, None],
        "b": {"c": [None, 2]},
        "d": "nan",
    }


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_config_gives_options_and_the_command_line_overrides_them(tmp_path):
    file = write(
        tmp_path / "c.yaml",
        "limit: 12\nreward: {shapes-clip: 1.0, brightness: -0.5}\nmethod: [none, reno]\noverwrite: true\nwatch: null\nseed: 4\n",
    )
    found = read("bench", "shapes", "--config", file, "--seed", "9", "--method", "best-of-n")
    assert (found.run.limit, found.run.seed, found.method, found.run.overwrite) == (12, 9, ("best-of-n",), True)
    assert found.rewards.watch == ()
    assert dict(found.rewards.reward) == {"shapes-clip": 1.0, "brightness": -0.5}
    assert not read("bench", "shapes", "--config", file, "--no-overwrite").run.overwrite


@pytest.mark.parametrize("old", ["iterations", "evaluations"])
@pytest.mark.parametrize("command", [["generate", "a star"], ["bench", "shapes"]])
def test_the_old_words_for_the_budget_say_the_new_one(old, command, tmp_path, capsys):
    configured = ["bench", "shapes", "--config", write(tmp_path / "c.yaml", f"{old}: 10\n")]
    for arguments in ([*command, f"--{old}", "10"], [*command, f"--{old}=10"], configured):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        err = capsys.readouterr().err
        assert code == (1 if arguments is configured else 2)
        assert f"--{old}" in err
        assert "--budget 10" in err
        assert len(err.splitlines()) == 1


def test_the_budget_is_fifty_unless_given(tmp_path):
    assert read("generate", "a star").budget == 50
    file = write(tmp_path / "c.yaml", "budget: 10\n")
    assert read("bench", "shapes", "--config", file).budget == 10
    assert read("bench", "shapes", "--config", file, "--budget", "5").budget == 5


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_help_lists_every_method_with_its_summary(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    for row in METHODS:
        if row.kind == "noise":
            assert f"{row.name} " in text
            assert row.summary in text


def test_the_module_is_the_program():
    done = subprocess.run([sys.executable, "-m", "diffalign", "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"diffalign {__version__}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limt: 3", "unknown option 'limt'; did you mean 'limit'?"),
        ("overwrite: 1", "overwrite must be true or false; got 1"),
        ("limit: [1, 2]", "limit takes one value"),
        ("stage: judging", "stage must be one of all, generate, score, report; got 'judging'"),
        ("limit: many", "must be a whole number"),
        ("- a\n- b", "must be a mapping of options"),
        ("a: [", "is not valid YAML"),
        ("reward: [{a: 1}]", "must be a value, a list or a flat mapping"),
        ("config: other.yaml", "cannot name another config"),
    ],
)
def test_a_bad_config_is_named(tmp_path, text, message, capsys):
    file = write(tmp_path / "c.yaml", text)
    try:
        code = main(["bench", "shapes", "--config", file])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert message in capsys.readouterr().err


def test_a_missing_config_is_named(capsys):
    assert main(["bench", "shapes", "--config", "absent.yaml"]) == 1
    assert "absent.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "bench").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_bench_config_is_valid(file):
    found = read("bench", "shapes", "--config", file)
    found.check()
    assert found.mix()


def test_the_app_is_missed_politely(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("diffalign.app")]:  # another test may have opened it
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("diffalign.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 1
    assert "pip install 'diffalign[app]'" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    process = subprocess.Popen([sys.executable, "-m", "diffalign", "rewards"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


def test_memory_options_say_what_load_pipeline_is_told(monkeypatch):
    told = []

    def load(name, **arguments):
        told.append((name, arguments))
        raise OSError("stop here")

    monkeypatch.setattr(hub, "load_pipeline", load)
    for more in (["--memory", "checkpointing", "offload-text", "--attention", "xformers"], []):
        with pytest.raises(OSError, match="stop here"):
            parts.load_pipeline(read("generate", "x", *more).model)
    fixed = {"device": None, "dtype": None}
    assert told[0] == (
        "shapes-turbo",
        {**fixed, "attention": "xformers", "gradient_checkpointing": True, "sliced_decoder": False, "offload": "text"},
    )
    assert told[1][1]["offload"] is None
    with pytest.raises(ValueError, match="not both"):
        read("generate", "x", "--memory", "offload-text", "offload-all").check()


def test_a_video_model_is_refused_before_anything_is_drawn(monkeypatch):
    class Video:
        output_field = "frames"

    monkeypatch.setattr(hub, "load_pipeline", lambda *_, **__: Video())
    with pytest.raises(ValueError, match="makes videos"):
        parts.load_pipeline(read("generate", "x", "--pipeline", "wan2.1-1.3b").model)


LONGEST_HELP, MOST_SHOWN = 48, 25


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: " ".join(row.words))
def test_help_fits_on_two_screens_and_hides_what_few_need(row, capsys, monkeypatch):
    """The list of methods that `generate` ends with is not counted."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*row.words, "--help"])
    text = capsys.readouterr().out.partition("\nmethods:")[0]
    assert stop.value.code == 0
    assert len(text.splitlines()) <= LONGEST_HELP
    shown = [each for each in options_of(type(row.takes), instance=row.takes) if not each.option.advanced]
    assert len(shown) <= MOST_SHOWN
    with pytest.raises(SystemExit):
        main([*row.words, "--help-advanced" if "--help-advanced" in text else "--help"])
    everything = capsys.readouterr().out
    for each in options_of(type(row.takes), instance=row.takes):
        name = (each.option.metavar or "NAME") if each.option.positional else f"--{each.name.replace('_', '-')}"
        assert name in everything
        assert name in text or each.option.advanced


def test_a_benchmark_takes_its_own_options_and_no_others(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "geneval", "--help-advanced"])
    text = capsys.readouterr().out
    assert "--detector" in text
    for foreign in ("--questions", "--judge", "--phrases", "--depth", "--split"):
        assert f"{foreign} " not in text


def test_every_command_takes_what_means_something_to_it():
    """`--config` everywhere; `--source`, `--lora`, `--guidance`, `--budget` wherever images are made or rewards asked."""
    taken = {" ".join(row.words): {each.name for each in options_of(type(row.takes), instance=row.takes)} for row in COMMANDS}
    for name in ("generate", "bench shapes", "bench geneval"):
        assert {"source", "lora", "guidance", "budget", "pipeline", "reward", "watch"} <= taken[name]
    assert {"source", "lora", "pipeline"} <= taken["calibrate"]
    assert "source" in taken["score"]


def test_the_table_of_benchmarks_is_listed(capsys):
    assert main(["bench", "ls"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in BENCHMARKS)


def test_settings_are_the_same_in_python_yaml_and_on_the_command_line(tmp_path):
    typed = read("generate", "a star", "--budget", "7", "--reward", "brightness=2", "--guidance", "adaptive")
    file = write(tmp_path / "c.yaml", "budget: 7\nreward: {brightness: 2}\nguidance: adaptive\n")
    assert typed == read("generate", "a star", "--config", file)
    assert typed == commands.Generate(
        ("a star",),
        budget=7,
        rewards=options.Rewards(reward=(("brightness", 2.0),)),
        guidance=options.Guidance(guidance="adaptive"),
    )
