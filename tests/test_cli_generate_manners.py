"""The manners of `diffalign generate`: what it says and refuses before anything runs, and that a stopped run ends as another does."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from diffalign.cli import main


@pytest.fixture
def generate(tiny_folder, tmp_path, capsys):
    """Runs the command on the tiny pipeline; returns (exit code, stdout, stderr)."""

    def run(*arguments, out=tmp_path / "out", reward=("brightness=1",)):
        code = main(command(tiny_folder, out, *arguments, reward=reward))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def command(folder, out, *arguments, reward=("brightness=1",)):
    fixed = ["--pipeline", str(folder), "--steps", "1", "--guidance-scale", "0", "--budget", "3", "--device", "cpu"]
    rewards = ["--reward", *reward] if reward else []
    return ["generate", *map(str, arguments), *fixed, *rewards, "--out", str(out)]


def traces(out):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/trace.json"))}


def test_comments_in_a_text_file_are_not_drawn(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# prompts of a kind\na star\n  # another\n\na heart\n")
    code, _, err = generate("--prompts-file", file, "--method", "none", reward=())
    assert code == 0
    assert "1 blank lines and 2 comment lines" in err
    assert [trace["prompt"] for trace in traces(tmp_path / "out").values()] == ["a star", "a heart"]


def test_a_prompt_that_is_no_text_is_one_sentence(generate, tmp_path):
    """Python holds an undecodable byte of the command line as a lone surrogate."""
    code, _, err = generate("a caf\udce9", "--method", "none", reward=())
    assert code == 1
    assert "prompt must be text" in err
    assert r"'a caf\udce9'" in err
    assert not (tmp_path / "out").exists()


def test_a_refused_call_leaves_no_empty_folder(tmp_path, tiny_folder, capsys):
    """The output folder is proved writable before the model is loaded."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{}")
    assert main(command(tmp_path / "broken", tmp_path / "a" / "b", "a star")) == 1
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    assert main(command(tmp_path / "broken", tmp_path / "mine", "a star")) == 1
    assert (tmp_path / "mine").is_dir()  # it was there before


def test_it_says_at_once_what_it_loads(generate, monkeypatch, capsys):
    import diffalign.hub

    said = []

    def load(*arguments, **named):
        said.append(capsys.readouterr().err)
        raise OSError("stop here")

    monkeypatch.setattr(diffalign.hub, "load_pipeline", load)
    generate("a star")
    assert "loading the pipeline" in said[0]
    assert "brightness" in said[0]


def test_words_that_the_embedded_model_does_not_know_are_named_before_anything_runs(tmp_path, monkeypatch, capsys):
    from diffalign.cli import parts

    def fails(*arguments):
        raise OSError("stop here")

    monkeypatch.setattr(parts, "load_parts", fails)
    assert main(["generate", "an astronaut", "a red circle", "--out", str(tmp_path / "out")]) == 1
    assert "have never read astronaut" in capsys.readouterr().err
    assert main(["generate", "a photo of a red circle left of two small stars", "--out", str(tmp_path / "out")]) == 1
    assert "never read" not in capsys.readouterr().err


def test_the_words_are_those_of_the_worlds_prompts_and_captions():
    from diffalign.shapes import captions, prompts
    from diffalign.shapes.words import unknown_words

    rng = np.random.default_rng(0)
    scenes = [captions.draw_scene(rng) for _ in range(200)]
    texts = [make(rng, scene) for scene in scenes for make in (captions.short_caption, captions.long_caption)]
    assert not unknown_words([*texts, *(prompt for split in prompts.SPLITS for prompt in prompts.prompts(split))])
    assert unknown_words(["A Red circle, please!"]) == {"A Red circle, please!": ["please"]}


def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(generate, tmp_path):
    """The last batch shrinks where only what is missing is made, and its images then differ in their last digits."""
    prompts = ["a red circle", "two stars", "a heart", "a ring"]
    generate(*prompts, "--batch-size", 3, out=tmp_path / "whole")
    generate(*prompts, "--batch-size", 3, out=tmp_path / "stopped")
    lost = tmp_path / "stopped" / "00001-two-stars"
    kept = (tmp_path / "stopped" / "00000-a-red-circle" / "trace.json").stat().st_mtime_ns
    for path in lost.iterdir():
        path.unlink()
    lost.rmdir()
    code, out, _ = generate(*prompts, "--batch-size", 3, out=tmp_path / "stopped")
    assert code == 0
    assert "3 of 4 prompts are already finished" in out
    for name in ("before.png", "after.png", "noise.safetensors"):
        assert (lost / name).read_bytes() == (tmp_path / "whole" / lost.name / name).read_bytes()
    assert (tmp_path / "stopped" / "00000-a-red-circle" / "trace.json").stat().st_mtime_ns == kept


def test_a_prompt_made_under_another_preset_is_not_taken_for_finished(tmp_path, capsys, monkeypatch):
    from diffalign.pipelines import presets

    arguments = ["generate", "a star", "--method", "none", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    (trace,) = traces(tmp_path / "out").values()
    assert trace["resolved"]["steps"] == 1
    assert trace["settings"]["weights"].startswith("folder ")
    changed = dataclasses.replace(presets.PRESETS["shapes-turbo"], guidance_scale=2.0)
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "shapes-turbo": changed})
    assert main(arguments) == 1
    assert "preset guidance_scale: 0.0 -> 2.0" in capsys.readouterr().err
