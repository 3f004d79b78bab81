"""`diffalign score` on real files with the rewards that ship: what it writes, what it refuses, and how it goes on."""

from __future__ import annotations

import csv
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from diffalign import load_reward
from diffalign.cli import main
from diffalign.commands import score_run
from diffalign.commands.image_files import list_images
from diffalign.files import appending, read_lines
from diffalign.images import read_image

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "diffalign" / "shapes" / "weights"
PROMPTS = {"a.png": "a red circle", "b.jpg": "two blue squares", "sub/c.png": "a green star above a red cross", "wide.png": "a red circle"}
CHEAP = ("brightness", "jpeg-compressibility")
SHAPES = ("shapes-clip", "shapes-preference", "shapes-aesthetic")

needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the shapes rewards are not trained yet")


@pytest.fixture
def folder(tmp_path):
    """Two images of one size, one larger, one wide, in two folders, with their prompts beside them."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    sizes = {"a.png": (64, 64), "b.jpg": (64, 64), "sub/c.png": (96, 96), "wide.png": (40, 100)}
    for name, size in sizes.items():
        path = tmp_path / "images" / name
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(PROMPTS[name])
    return tmp_path / "images"


@pytest.fixture
def score(tmp_path, capsys):
    """Runs the command; returns (exit code, stdout, stderr)."""

    def run(folder, *arguments, reward=CHEAP, out=tmp_path / "out"):
        code = main(["score", str(folder), "--reward", *reward, "--device", "cpu", "--out", str(out), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def results(out):
    return json.loads((out / "results.json").read_text())


def scores(out, reward):
    """File -> score, as results.csv has it."""
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: float(row[reward]) for row in csv.DictReader(file) if row[reward]}


def lines(out, reward):
    return read_lines(out / "scores" / f"{reward}.jsonl")


# --- what comes out -----------------------------------------------------------------------------------------------------------


@needs_weights
def test_scores_are_those_of_the_rewards_called_one_by_one(folder, score, tmp_path):
    code, out, err = score(folder, reward=(*SHAPES, *CHEAP))
    assert (code, err.count("diffalign:")) == (0, 0)
    assert "prompts: 4 from NAME.txt" in out
    for reward in (*SHAPES, *CHEAP):
        model = load_reward(reward, device="cpu")
        found = scores(tmp_path / "out", reward)
        assert list(found) == sorted(PROMPTS)
        for name, prompt in PROMPTS.items():
            with torch.no_grad():
                alone = model(read_image(folder / name)[None], [prompt]).total.item()
            assert found[name] == pytest.approx(alone, abs=2e-4)


def test_the_files_and_the_summary(folder, score, tmp_path):
    score(folder)
    out = tmp_path / "out"
    wanted = {"settings.json", "machine.json", "results.csv", "results.json", "distributions.png", "scores"}
    assert {path.name for path in out.iterdir()} == wanted
    data = results(out)
    assert {"command", "date", "device", "versions", "settings", "rewards", "images"} <= set(data)
    for reward in CHEAP:
        values = np.array([image["scores"][reward] for image in data["images"]])
        found = data["rewards"][reward]
        assert (found["n"], found["failed"]) == (4, 0)
        assert found["mean"] == pytest.approx(values.mean())
        assert found["std"] == pytest.approx(values.std(ddof=1))
        assert found["quantiles"]["25%"] == pytest.approx(np.quantile(values, 0.25))
        assert found["licence"] == "Apache-2.0"
        assert dict(zip(sorted(PROMPTS), values, strict=True)) == scores(out, reward)
    with Image.open(out / "distributions.png") as plot:
        assert plot.width > 500


def test_one_image_has_no_deviation(folder, score, tmp_path):
    assert score(folder, "--match", "a.png")[0] == 0
    found = results(tmp_path / "out")["rewards"]["brightness"]
    assert (found["n"], found["std"]) == (1, None)
    assert found["mean"] == found["min"] == found["quantiles"]["5%"]


@needs_weights
def test_scores_depend_neither_on_batch_nor_on_order(folder, score, tmp_path):
    """Enough images of one size for whole batches, under names that sort the other way round in a second folder."""
    rng = np.random.default_rng(1)
    (tmp_path / "turned").mkdir()
    for i in range(5):
        image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        for path in (folder / f"n{i}.png", tmp_path / "turned" / f"n{9 - i}.png"):
            image.save(path)
            path.with_suffix(".txt").write_text(f"{i + 2} red stars")
    for size, out in ((1, "one"), (3, "three")):
        assert score(folder, "--batch-size", size, reward=SHAPES, out=tmp_path / out)[0] == 0
    assert score(tmp_path / "turned", "--batch-size", 64, reward=SHAPES, out=tmp_path / "back")[0] == 0
    for reward in SHAPES:
        alone, back = scores(tmp_path / "one", reward), scores(tmp_path / "back", reward)
        assert scores(tmp_path / "three", reward) == pytest.approx(alone, abs=2e-4)
        assert [back[f"n{9 - i}.png"] for i in range(5)] == pytest.approx([alone[f"n{i}.png"] for i in range(5)], abs=2e-4)
        assert len(set(alone.values())) > 3


def test_a_table_holds_any_prompt(folder, score, tmp_path):
    awkward = {
        "a.png": 'commas, "quotes", and; semicolons',
        "b.jpg": "lines\nof\r\ntwo kinds\rand \u2028 a third",
        "sub/c.png": "🎨 émoji \x00 and a tab\t",
        "wide.png": "long " * 2000,
    }
    (tmp_path / "p.json").write_text(json.dumps(awkward))
    assert score(folder, "--prompts", tmp_path / "p.json")[0] == 0
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8", newline="") as file:
        assert {row["file"]: row["prompt"] for row in csv.DictReader(file)} == awkward
    frame = pandas.read_csv(tmp_path / "out" / "results.csv")
    assert list(frame["file"]) == sorted(awkward)
    assert frame["brightness"].dtype == np.float64
    assert {image["file"]: image["prompt"] for image in results(tmp_path / "out")["images"]} == awkward


@needs_weights
def test_a_calibration_is_written_for_other_commands(folder, score, tmp_path):
    from diffalign.rewards import Calibration

    assert score(folder, "--calibrate", tmp_path / "new" / "calibration.json", reward=("shapes-clip", "brightness"))[0] == 0
    calibration = Calibration.load(tmp_path / "new" / "calibration.json")
    for reward in ("shapes-clip", "brightness"):
        values = np.array(list(scores(tmp_path / "out", reward).values()))
        assert calibration.members[reward].mean == pytest.approx(values.mean())
        assert calibration.scale(reward) == pytest.approx(values.std(ddof=1))


# --- what goes wrong ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "gone.png").symlink_to("nowhere")
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / "clear.png")
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    return folder


def test_damaged_images_are_listed_and_the_others_scored(damaged, score, tmp_path):
    code, _, err = score(damaged)
    assert code == 1
    assert "4 of 9 images could not be scored" in err
    for line in (
        "cut.png: not a whole image (image file is truncated)",
        "empty.png: not a whole image (the file is empty)",
        "text.jpg: not a whole image (of no known format)",
        "gone.png: cannot be read (No such file or directory)",
    ):
        assert f"  {line}" in err.splitlines()
    assert "transparent parts laid on white: clear.png" in err
    assert scores(tmp_path / "out", "brightness").keys() == {*PROMPTS, "clear.png"}
    assert scores(tmp_path / "out", "brightness")["clear.png"] == pytest.approx(1)
    data = results(tmp_path / "out")
    assert data["rewards"]["brightness"]["failed"] == 4
    problems = {image["file"]: image["problems"] for image in data["images"] if image["problems"]}
    assert problems.keys() == {"cut.png", "empty.png", "gone.png", "text.jpg"}
    assert problems["empty.png"].keys() == set(CHEAP)


def test_failures_may_be_allowed_and_mended(damaged, score, tmp_path):
    assert score(damaged, "--allow-failed")[0] == 0
    before = lines(tmp_path / "out", "brightness")
    for name in ("cut.png", "empty.png", "text.jpg"):
        Image.new("RGB", (64, 64), "lime").save(damaged / name)
    (damaged / "gone.png").unlink()
    code, out, _ = score(damaged)
    assert code == 0
    assert "10 of 16 scores are already in" in out
    assert lines(tmp_path / "out", "brightness")[: len(before)] == before
    assert len(scores(tmp_path / "out", "brightness")) == 8


def test_nothing_but_damaged_images(tmp_path, score):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_text("no")
    assert score(tmp_path / "images")[0] == 1
    assert results(tmp_path / "out")["rewards"]["brightness"]["mean"] is None


def test_what_a_reward_refuses_does_not_take_its_batch_mates_along(folder, tmp_path):
    """The real loop with a reward that refuses one image, and gives another no finite score."""
    dark, images = read_image(folder / "a.png"), list_images(folder).images
    for name in ("a2.png", "a3.png"):
        Image.open(folder / "a.png").rotate(90 if name == "a2.png" else 180).save(folder / name)

    def reward(batch, prompts):
        if any(torch.equal(image, dark) for image in batch if image.shape == dark.shape):
            raise ValueError("reward 'x': images[0] is not\n to its taste")
        values = batch[:, 0, 0, 0].clone()
        values[values == read_image(folder / "b.jpg")[0, 0, 0]] = float("nan")
        return values

    images = list_images(folder).images
    work = score_run.open_work("x", tmp_path / "out", images, None, score_run.Digests())
    score_run.score_pending(work, reward, "cpu", 8, lambda n: None)
    assert work.scores.keys() == {"a2.png", "a3.png", "sub/c.png", "wide.png"}
    assert work.problems == {"a.png": "reward 'x': images[0] is not to its taste", "b.jpg": "the score is not finite (nan)"}
    assert len(lines(tmp_path / "out", "x")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "nowhere does not exist"),
        (["{tmp}/images/a.png"], "is a file; give its folder, and --match for this file alone"),
        (["{tmp}/void"], "there is no image in"),
        (["{tmp}/images", "--match", "x*"], "matches --match 'x*'"),
        (["{tmp}/images", "--out", "{tmp}/images"], "holds other files and no scores"),
        (["{tmp}/images", "--out", "{tmp}/images/a.png"], "is a file; name a folder"),
        (["{tmp}/images", "--out", "{tmp}/images/a.png/out"], "Not a directory"),
        (["{tmp}/images", "--prompts", "{tmp}/p.csv"], "p.csv does not exist"),
        (["{tmp}/images", "--prompts", "{tmp}/images/a.txt"], "must be .csv, .tsv, .json or .jsonl"),
        (["{tmp}/images", "--prompt", " "], "--prompt is empty"),
        (["{tmp}/images", "--source", "brightness=here"], "brightness, which has no weights"),
        (["{tmp}/images", "--source", "shapes-clip=here"], "not among the rewards to score (brightness)"),
        (["{tmp}/images", "--reward", "shapes-clip", "--source", "shapes-clip:head=x"], "has no part 'head'; its parts are model"),
        (["{tmp}/images", "--reward", "shapes-clip", "--source", "shapes-clip=x", "shapes-clip:model=y"], "two places for its model"),
        (["{tmp}/images", "--reward", "shapes-clip", "--source", "shapes-clip={tmp}/void"], "void/open_clip_config.json is missing"),
        (["{tmp}/images", "--device", "mps"], "--device mps cannot be used here"),
    ],
)
def test_mistakes_are_one_sentence(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "void").mkdir()
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    code = main(["score", *given, *(() if "--reward" in given else ("--reward", "brightness"))])
    err = capsys.readouterr().err
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "the following arguments are required: --reward"),
        (["x", "--reward", "brightnes"], "did you mean 'brightness'?"),
        (["x", "--reward", "brightness=2"], "takes no weight"),
        (["--reward", "brightness", "/"], "/ is a folder; it comes first"),
        (["x", "--reward", "brightness", "--source", "brightness"], "must be NAME=PLACE"),
        (["x", "--reward", "brightness", "--batch-size", "0"], "at least 1"),
        (["x", "--reward", "brightness", "--prompt", "a", "--prompts", "b.csv"], "not allowed with argument"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["score", *arguments])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


# --- going on -----------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """What a bar raises here in the middle of the work."""


def test_a_stopped_run_goes_on_and_ends_as_if_never_stopped(folder, score, tmp_path):
    assert score(folder, out=tmp_path / "straight")[0] == 0
    images, digests = list_images(folder).images, score_run.Digests()
    work = score_run.open_work("brightness", tmp_path / "out", images, None, digests)
    mix, done = load_reward("brightness", device="cpu"), []

    def progress(n):
        done.append(n)
        if sum(done) == 2:
            raise Stop

    with pytest.raises(Stop):
        score_run.score_pending(work, lambda *call: mix(*call).total, "cpu", 1, progress)
    kept = lines(tmp_path / "out", "brightness")
    assert len(kept) == 2
    with (tmp_path / "out" / "scores" / "brightness.jsonl").open("a") as file:
        file.write('{"item": "wide.png", "sc')  # as a kill in the middle of a write leaves it
    # the run that was stopped here had no command line; its settings are those of the one that was not
    (tmp_path / "out" / "settings.json").write_bytes((tmp_path / "straight" / "settings.json").read_bytes())
    code, out, _ = score(folder)
    assert code == 0
    assert "2 of 8 scores are already in" in out
    assert lines(tmp_path / "out", "brightness")[:2] == kept
    assert len(lines(tmp_path / "out", "brightness")) == 4
    assert results(tmp_path / "out")["images"] == results(tmp_path / "straight")["images"]


def test_a_finished_run_loads_nothing_and_writes_the_same(folder, score, tmp_path, monkeypatch):
    score(folder)
    before = results(tmp_path / "out")["images"]
    monkeypatch.setattr("diffalign.hub.load_reward", lambda *call, **options: pytest.fail("a reward was loaded"))
    code, out, _ = score(folder, "--batch-size", 1)
    assert code == 0
    assert "8 of 8 scores are already in" in out
    assert results(tmp_path / "out")["images"] == before


@needs_weights
def test_images_and_prompts_that_changed_are_scored_again_and_no_others(folder, score, tmp_path):
    rewards = ("shapes-clip", "brightness")
    score(folder, reward=rewards)
    Image.new("RGB", (64, 64), "white").save(folder / "a.png")
    (folder / "b.txt").write_text("a white heart")
    assert "5 of 8 scores are already in" in score(folder, reward=rewards)[1]
    assert [line["item"] for line in lines(tmp_path / "out", "shapes-clip")[4:]] == ["a.png", "b.jpg"]
    assert [line["item"] for line in lines(tmp_path / "out", "brightness")[4:]] == ["a.png"]
    assert scores(tmp_path / "out", "brightness")["a.png"] == pytest.approx(1)


@needs_weights
def test_other_settings_are_refused_and_further_rewards_are_not(folder, score, tmp_path):
    score(folder)
    assert "4 of 8 scores are already in" in score(folder, "--prompt", "a star", reward=("brightness", "shapes-clip"))[1]
    for arguments, difference in (
        (["--prompt", "a heart"], "shapes-clip --prompt: 'a star' -> 'a heart'"),
        (["--prompt", "a star", "--dtype", "bfloat16"], "shapes-clip dtype: 'float32' -> 'bfloat16'"),
        (["--prompt", "a star", "--source", "shapes-clip=elsewhere"], "-> 'elsewhere'"),
    ):
        code, _, err = score(folder, *arguments, reward=("shapes-clip",))
        assert code == 1
        assert difference in err
        assert "--overwrite" in err
        assert len(err.splitlines()) == 1
    assert "folder:" in score(folder / "sub")[2]
    assert score(folder, "--prompt", "a star", reward=("shapes-clip",))[0] == 0
    assert score(folder, "--prompt", "a heart", "--overwrite", reward=("shapes-clip",))[0] == 0
    assert {line["prompt"] for line in lines(tmp_path / "out", "shapes-clip")} == {"a heart"}
    assert not (tmp_path / "out" / "scores" / "brightness.jsonl").exists()


@needs_weights
def test_a_reward_that_could_not_be_loaded_binds_nobody(folder, score):
    assert score(folder, "--source", "shapes-clip=nowhere", reward=("shapes-clip",))[0] == 1
    assert score(folder, reward=("shapes-clip",))[0] == 0


@needs_weights
def test_one_reward_is_in_memory_at_a_time(folder, score, monkeypatch):
    import diffalign.hub as hub
    from reward_models.base import RewardModel

    load, alive = hub.load_reward, []

    def counting(*call, **options):
        alive.append(sum(issubclass(type(thing), RewardModel) for thing in gc.get_objects()))
        return load(*call, **options)

    gc.collect()
    monkeypatch.setattr(hub, "load_reward", counting)
    score(folder, reward=(*SHAPES, *CHEAP))
    assert len(alive) == 5
    assert len(set(alive)) == 1


def test_a_full_disk_is_said_and_keeps_whole_lines(folder, score, tmp_path):
    """A limit on file sizes stands for the full disk: the write itself fails with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        code, _, err = score(folder, "--batch-size", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert err.splitlines()[-1].endswith("brightness.jsonl: File too large")
    content = (tmp_path / "out" / "scores" / "brightness.jsonl").read_bytes()
    assert content.endswith(b"\n")
    assert 0 < len(lines(tmp_path / "out", "brightness")) < 4
    assert not list((tmp_path / "out").glob(".partial*"))
    assert not (tmp_path / "out" / "results.json").exists()
    assert score(folder)[0] == 0
    assert len(lines(tmp_path / "out", "brightness")) == 4


def test_lines_are_added_whole_or_not_at_all(tmp_path):
    with appending(tmp_path / "new" / "x.jsonl") as append:
        append([{"a": 1}, {"b": "\n 🎨 \ud800"}])
        with pytest.raises(ValueError, match="JSON"):
            append([{"a": 2}, {"a": float("nan")}])
        append([])
        append([3])
    assert read_lines(tmp_path / "new" / "x.jsonl") == [{"a": 1}, {"b": "\n 🎨 \ud800"}, 3]
    (tmp_path / "x").write_bytes(b'{"a": 1}\nrubbish\n')
    with pytest.raises(ValueError, match="x has a line that is not valid JSON"):
        read_lines(tmp_path / "x")


def test_a_killed_run_goes_on(tmp_path, score):
    """Interrupted, then killed for real while it works; what was done is kept, and the same command finishes the rest."""
    rng = np.random.default_rng(5)
    (tmp_path / "many").mkdir()
    for i in range(300):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(tmp_path / "many" / f"{i:03d}.png", compress_level=0)
    out = tmp_path / "out" / "scores" / "jpeg-compressibility.jsonl"
    kept = f"of 300 scores are kept in {tmp_path / 'out'}; the same command continues"
    line = [sys.executable, "-m", "diffalign.cli", "score", str(tmp_path / "many"), "--reward", "jpeg-compressibility"]
    line += ["--batch-size", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # a shell's background jobs ignore Ctrl-C, and what they start inherits that; the command must not, to be interrupted here
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    done = 0
    for sign in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
        while process.poll() is None and len(read_lines(out)) < done + 20:
            time.sleep(0.02)
        process.send_signal(sign)
        stdout, stderr = process.communicate(timeout=60)
        assert done < len(read_lines(out)) < 300
        if sign == signal.SIGINT:
            assert process.returncode == 130
            assert stderr.splitlines()[-1].endswith(f"{len(read_lines(out))} {kept}")
            assert "Traceback" not in stderr
        else:
            assert f"{done} of 300 scores are already in" in stdout or process.returncode == -signal.SIGKILL
        done = len(read_lines(out))
        assert not (tmp_path / "out" / "results.csv").exists()
    code, told, _ = score(tmp_path / "many", "--batch-size", 1, reward=("jpeg-compressibility",))
    assert code == 0
    assert f"{done} of 300 scores are already in" in told
    items = [line["item"] for line in read_lines(out)]
    assert len(items) == len(set(items)) == 300
