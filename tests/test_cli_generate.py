"""`diffalign generate` with a tiny real pipeline and a real reward: what it writes, what it refuses, and how it goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.cli.generate import SLUG_LENGTH, slug

FILES = {"before.png", "after.png", "strip.png", "rewards.png", "noise.safetensors", "trace.json"}


@pytest.fixture
def generate(tiny_folder, tmp_path, capsys):
    """Runs the command on the tiny pipeline; returns (exit code, stdout, stderr)."""

    def run(*arguments, out=tmp_path / "out", reward=("brightness=1",), budget=3):
        code = main(command(tiny_folder, out, *arguments, reward=reward, budget=budget)[1:])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def command(folder, out, *arguments, reward=("brightness=1",), budget=3):
    fixed = ["--pipeline", str(folder), "--steps", "1", "--guidance-scale", "0", "--budget", str(budget), "--device", "cpu"]
    rewards = ["--reward", *reward] if reward else []
    return ["diffalign", "generate", *map(str, arguments), *fixed, *rewards, "--out", str(out)]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def traces(out):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/trace.json"))}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red circle, left of a BLUE square!", "a-red-circle-left-of-a-blue-square"),
        ("../../etc/passwd", "etc-passwd"),
        ("café übergroß", "cafe-ubergro"),
        ("🎨🖌️", "prompt"),
        ("///", "prompt"),
        ("", "prompt"),
        ("con\x00\n\t", "con"),
        ("x" * 10_000, "x" * SLUG_LENGTH),
        ("a" * 39 + " b", "a" * 39),
    ],
)
def test_slugs_are_safe_short_and_never_empty(prompt, expected):
    assert slug(prompt) == expected


def test_a_prompt_becomes_a_folder_with_everything(generate, tmp_path):
    code, out, _ = generate("a red circle")
    folder = tmp_path / "out" / "00000-a-red-circle"
    assert code == 0
    assert {path.name for path in folder.iterdir()} == FILES
    assert str(folder) in out
    trace = json.loads((folder / "trace.json").read_text())
    assert (trace["prompt"], trace["seed"], trace["method"], trace["truncated"]) == ("a red circle", 0, "reno", None)
    assert trace["settings"]["reward"] == {"brightness": 1.0}
    assert trace["rewards"]["total"][trace["best"]] == max(trace["rewards"]["total"]) > trace["rewards"]["total"][0]
    assert {"diffalign", "torch", "diffusers"} <= set(trace["versions"])
    assert trace["seconds"] > 0
    assert pixels(folder / "after.png").mean() > pixels(folder / "before.png").mean()
    assert load_file(folder / "noise.safetensors")["noise"].shape == (1, 4, 16, 16)  # as latents= takes it


def test_the_strip_shows_both_images_enlarged(generate, tmp_path):
    generate("a red circle")
    folder = tmp_path / "out" / "00000-a-red-circle"
    strip, before = pixels(folder / "strip.png"), pixels(folder / "before.png")
    assert before.shape == (32, 32, 3)
    large = before.repeat(8, axis=0).repeat(8, axis=1)  # 32 pixels shown as 256
    windows = [strip[y : y + 256, x : x + 256] for y in range(strip.shape[0] - 255) for x in range(20)]
    assert any(np.array_equal(window, large) for window in windows)


def test_the_saved_noise_makes_the_image_after(generate, tmp_path, tiny_folder):
    from diffalign import load_pipeline

    generate("a red circle")
    folder = tmp_path / "out" / "00000-a-red-circle"
    noise = load_file(folder / "noise.safetensors")["noise"]
    again = load_pipeline(tiny_folder, device="cpu")("a red circle", latents=noise, num_inference_steps=1, guidance_scale=0.0)
    assert np.abs(np.asarray(again.images[0]).astype(int) - pixels(folder / "after.png")).max() <= 1


def test_results_depend_neither_on_batch_nor_on_order(generate, tmp_path):
    prompts = ["a red circle", "two stars", "a heart"]
    generate(*prompts, "--batch-size", 3, out=tmp_path / "together")
    generate(*prompts[::-1], "--batch-size", 1, out=tmp_path / "alone")
    for i, prompt in enumerate(prompts):
        together = tmp_path / "together" / f"{i:05d}-{slug(prompt)}"
        alone = tmp_path / "alone" / f"{2 - i:05d}-{slug(prompt)}"
        for name in ("before.png", "after.png"):
            assert np.abs(pixels(together / name) - pixels(alone / name)).max() <= 1
        one, other = (json.loads((folder / "trace.json").read_text())["rewards"]["total"] for folder in (together, alone))
        assert one == pytest.approx(other, abs=1e-4)


def test_one_seed_for_all_and_another_seed_is_another_image(generate, tmp_path):
    generate("a star", "a star", "--method", "none")
    generate("a star", "--method", "none", "--seed", 1, out=tmp_path / "other")
    first, second = (pixels(tmp_path / "out" / f"{i:05d}-a-star" / "before.png") for i in (0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, pixels(tmp_path / "other" / "00000-a-star" / "before.png"))


def test_every_method_starts_from_the_same_image(generate, tmp_path):
    for method in ("none", "best-of-n", "reno", "reno-paper"):
        assert generate("a star", "--method", method, out=tmp_path / method)[0] == 0
    images = [pixels(tmp_path / method / "00000-a-star" / "before.png") for method in ("none", "best-of-n", "reno", "reno-paper")]
    assert all(np.abs(image - images[0]).max() <= 1 for image in images)
    assert next(iter(traces(tmp_path / "reno-paper").values()))["method_settings"]["regularizer"] == 0.01


def test_without_a_method_there_is_one_image_and_scores_only_where_asked(generate, tmp_path):
    generate("a star", "--method", "none", reward=())
    generate("a star", "--method", "none", out=tmp_path / "scored")
    (plain,), (scored,) = traces(tmp_path / "out").values(), traces(tmp_path / "scored").values()
    assert {path.name for path in (tmp_path / "out" / "00000-a-star").iterdir()} == {"before.png", "trace.json"}
    assert plain["rewards"] == {}
    assert scored["rewards"].keys() == {"total", "brightness"}
    assert len(scored["rewards"]["total"]) == 1


def test_watched_rewards_are_reported_and_not_optimised(generate, tmp_path):
    generate("a star", "--watch", "jpeg-incompressibility")
    (trace,) = traces(tmp_path / "out").values()
    assert trace["rewards"]["total"] == pytest.approx(trace["rewards"]["brightness"])
    assert len(trace["rewards"]["jpeg-incompressibility"]) == len(trace["rewards"]["total"])


def test_finished_prompts_are_skipped_and_missing_ones_made(generate, tmp_path):
    generate("a star", "a heart")
    stamp = (tmp_path / "out" / "00000-a-star" / "trace.json").stat().st_mtime_ns
    _, out, _ = generate("a star", "a heart", "a cross")
    assert "2 of 3 prompts are already finished" in out
    assert (tmp_path / "out" / "00000-a-star" / "trace.json").stat().st_mtime_ns == stamp
    assert len(traces(tmp_path / "out")) == 3


def test_other_settings_are_an_error_unless_overwritten(generate, tmp_path):
    generate("a star")
    code, _, err = generate("a star", "--seed", 7)
    assert code == 1
    assert "seed: 0 -> 7" in err
    assert "--overwrite" in err
    assert generate("a star", "--seed", 7, "--overwrite")[0] == 0
    assert next(iter(traces(tmp_path / "out").values()))["seed"] == 7


def test_batch_size_is_not_a_setting(generate):
    generate("a star", "--batch-size", 1)
    assert "already finished" in generate("a star", "--batch-size", 4)[1]


def test_a_folder_that_is_not_ours_is_not_replaced(generate, tmp_path):
    folder = tmp_path / "out" / "00000-a-star"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    code, _, err = generate("a star")
    assert code == 1
    assert "was not made here" in err
    assert (folder / "thesis.tex").exists()


def test_long_prompts_say_what_is_cut(generate, tmp_path):
    prompt = "a red circle " + "and more " * 1200
    code, _, _ = generate(prompt)
    (trace,) = traces(tmp_path / "out").values()
    assert code == 0
    assert trace["truncated"]
    assert prompt.endswith(trace["truncated"])


def test_strange_prompts_get_safe_folders(generate, tmp_path):
    assert generate("a/b\\c", "🎨 paint", "..", "--method", "none", reward=())[0] == 0
    assert list(traces(tmp_path / "out")) == ["00000-a-b-c", "00001-paint", "00002-prompt"]
    assert traces(tmp_path / "out")["00001-paint"]["prompt"] == "🎨 paint"


def test_prompts_come_from_a_text_file(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a star\n\n  \na heart\n", encoding="utf-8-sig")
    code, _, err = generate("a cross", "--prompts-file", file, "--method", "none", reward=())
    assert code == 0
    assert "2 blank lines" in err
    assert [trace["prompt"] for trace in traces(tmp_path / "out").values()] == ["a cross", "a star", "a heart"]


def test_prompts_come_from_json_lines(generate, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a star", "tag": "single_object"}\n{"prompt": "a heart"}\n')
    generate("--prompts-file", file, "--method", "none", reward=())
    assert [trace["prompt"] for trace in traces(tmp_path / "out").values()] == ["a star", "a heart"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"caf\xe9", "is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 must be a JSON object"),
        ("p.jsonl", b"[1]\n", "line 1 must be a JSON object"),
        ("p.jsonl", b"{\n", "line 1 must be a JSON object"),
        ("p.jsonl", b'{"prompt": 3}\n', "must be text that is not blank; got 3"),
    ],
)
def test_bad_prompt_files_are_named(generate, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    code, _, err = generate("--prompts-file", tmp_path / name)
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no prompt"),
        (("",), "prompt 1 on the command line is empty"),
        (("--prompts-file", "no/such/file.txt"), "no/such/file.txt does not exist"),
    ],
)
def test_no_prompt_is_an_error(generate, arguments, message):
    code, _, err = generate(*arguments)
    assert code == 1
    assert message in err


def test_an_out_that_cannot_be_a_folder_is_one_sentence(generate, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = generate("a star", out=tmp_path / "file" / "out")
    assert code == 1
    assert "Not a directory" in err
    assert len(err.splitlines()) == 1


def test_a_full_disk_leaves_nothing_half_written(generate, tmp_path):
    """A limit on file sizes stands for the full disk: the write itself fails with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    generate("a star")
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        code, _, err = generate("a star", "a heart")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert "File too large" in err.splitlines()[-1]
    assert str(tmp_path / "out" / "00001-a-heart") in err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000-a-star"]
    assert generate("a star", "a heart")[0] == 0
    assert len(traces(tmp_path / "out")) == 2


def test_reno_refuses_a_reward_without_gradient(generate, tmp_path):
    code, _, err = generate("a star", reward=("jpeg-incompressibility=1",))
    assert code == 1
    assert "'jpeg-incompressibility' has no gradient" in err
    assert not (tmp_path / "out").exists()


def test_best_of_n_takes_a_reward_without_gradient(generate, tmp_path):
    assert generate("a star", "--method", "best-of-n", reward=("jpeg-incompressibility",))[0] == 0
    (trace,) = traces(tmp_path / "out").values()
    assert len(trace["rewards"]["total"]) == 3


def test_other_pipelines_must_be_told_the_reward(generate):
    code, _, err = generate("a star", reward=())
    assert code == 1
    assert "--reward is needed with --pipeline" in err


def test_an_error_in_a_later_batch_keeps_the_earlier_ones(generate, tmp_path, monkeypatch):
    """Stopped between prompts, the run goes on where it was and ends as if never stopped."""
    prompts = ["a star", "a heart", "a cross"]
    generate(*prompts, "--batch-size", 1, out=tmp_path / "straight")
    import diffalign.cli.generate as module

    save, count = module.save, [0]

    def fail_at_the_third(*arguments):
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(module, "save", fail_at_the_third)
    code, _, err = generate(*prompts, "--batch-size", 1)
    assert code == 1
    assert err.splitlines()[-1] == "diffalign: No space left on device"
    assert len(traces(tmp_path / "out")) == 2
    monkeypatch.undo()
    assert generate(*prompts, "--batch-size", 1)[0] == 0
    for name, trace in traces(tmp_path / "straight").items():
        assert traces(tmp_path / "out")[name]["rewards"] == trace["rewards"]
        assert np.array_equal(pixels(tmp_path / "out" / name / "after.png"), pixels(tmp_path / "straight" / name / "after.png"))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_run_killed_in_the_middle_goes_on(generate, tiny_folder, tmp_path, sign):
    """Killed for real while it works; nothing is half-written, and the same command finishes the rest."""
    prompts = [f"{i} stars" for i in range(6)]
    arguments = [*prompts, "--batch-size", "1", "--method", "best-of-n"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "diffalign", *command(tiny_folder, tmp_path / "out", *arguments, budget=60)[1:]]
    # a shell's background jobs ignore Ctrl-C, and what they start inherits that; the command must not, to be interrupted here
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    while process.poll() is None and not list((tmp_path / "out").glob("0*")):
        time.sleep(0.005)
    process.send_signal(sign)
    _, err = process.communicate(timeout=200)
    finished = traces(tmp_path / "out")
    assert 1 <= len(finished) < 6
    assert all({path.name for path in folder.iterdir()} == FILES for folder in (tmp_path / "out").glob("0*"))
    if sign == signal.SIGINT:
        assert process.returncode == 130
        assert f"interrupted: {len(finished)} of 6 prompts are finished" in err
        assert "the same command continues" in err
        assert "Traceback" not in err
    code, out, _ = generate(*arguments, budget=60)
    assert code == 0
    assert f"{len(finished)} of 6 prompts are already finished" in out
    assert len(traces(tmp_path / "out")) == 6
    assert not list((tmp_path / "out").glob(".partial-*"))
