"""`diffalign score`, stopped, killed, started anew with other settings: it does what is missing, and nothing twice."""

from __future__ import annotations

import gc
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

import diffalign.hub as hub
from diffalign import load_reward
from diffalign.evaluation import score_run
from diffalign.evaluation.image_files import list_images
from diffalign.files import appending, read_lines
from diffalign.reward_models.base import RewardModel
from tests import scored
from tests.places import WEIGHTS
from tests.scored import CHEAP, lines, results, scores

needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the shapes rewards are not trained yet")


@pytest.fixture
def folder(tmp_path):
    return scored.make_images(tmp_path / "images")


@pytest.fixture
def score(tmp_path, capsys):
    return scored.command(capsys, tmp_path / "out")


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


def test_one_reward_is_in_memory_at_a_time(folder, score, monkeypatch):
    load, alive = hub.load_reward, []

    def counting(*call, **options):
        alive.append(sum(issubclass(type(thing), RewardModel) for thing in gc.get_objects()))
        return load(*call, **options)

    gc.collect()
    monkeypatch.setattr(hub, "load_reward", counting)
    score(folder, reward=(*CHEAP, "jpeg-incompressibility"))
    assert len(alive) == 3
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
    line = [sys.executable, "-m", "diffalign", "score", str(tmp_path / "many"), "--reward", "jpeg-compressibility"]
    line += ["--batch-size", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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
