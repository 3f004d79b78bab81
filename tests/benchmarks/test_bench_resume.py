"""GenEval and T2I-CompBench stopped at any moment: the same command goes on, and the result is that of one uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from diffalign.cli import main
from diffalign.evaluation import generation, store
from tests.benchmarks.test_t2i_compbench import ANNOTATIONS, PROMPTS
from tests.benchmarks.tiny_clip import tiny_clip
from tests.benchmarks.tiny_mask2former import mmdet_layout, tiny_mask2former
from tests.benchmarks.tiny_t2i import tiny_blip, tiny_dpt, tiny_owlv2
from tests.places import ROOT


@pytest.fixture(scope="module")
def commands(tmp_path_factory, tiny_folder):
    """The two benchmarks at tiny size, everything but --out."""
    folder = tmp_path_factory.mktemp("bench")
    for name, parts in {"clip": tiny_clip(), "blip": tiny_blip(patch=96), "owl": tiny_owlv2(), "dpt": (tiny_dpt(patch=48),)}.items():
        for part in parts:
            part.save_pretrained(folder / name)
    torch.save({"state_dict": mmdet_layout(tiny_mask2former(classes=80))}, folder / "detector.pth")
    lists = folder / "clone" / "examples" / "dataset"
    lists.mkdir(parents=True)
    for category, prompts in PROMPTS.items():
        (lists / f"{category}_val.txt").write_text("\n".join(prompts) + "\n")
    (lists / "new_objects.txt").write_text("dog - dogs\ncup - cups\n")
    for kind in ("spatial", "action"):
        (lists / f"complex_val_{kind}.txt").write_text("The dog runs.\n")
    ANNOTATIONS.write(folder / "phrases.json")
    fixed = ["--pipeline", tiny_folder, "--method", "none", "--steps", 1, "--guidance-scale", 0, "--device", "cpu", "--batch-size", 2]
    judges = ["--blip", folder / "blip", "--depth", folder / "dpt", "--detector", folder / "owl", "--clip", folder / "clip"]
    t2i = ["--prompts", folder / "clone", "--phrases", folder / "phrases.json", "--samples", 1, *judges]
    geneval = ["--detector", folder / "detector.pth", "--clip", folder / "clip", "--limit", 6, "--samples", 1]
    return {name: ["bench", name, *map(str, [*fixed, *more])] for name, more in {"geneval": geneval, "t2i-compbench": t2i}.items()}


@pytest.fixture(autouse=True)
def small_input(monkeypatch):
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.SHORT_SIDE", 64)
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.LONG_SIDE", 107)
    monkeypatch.setattr("diffalign.cli.commands.JUDGE_BATCH", 2)


def contents(run):
    """All that a run says about its images: rows and what the official evaluators would have written, and the images themselves."""
    images = {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(run.rglob("*.png"))}
    official = {
        path.relative_to(run).as_posix(): path.read_text()
        for pattern in ("results.jsonl", "summary.txt", "vqa_result.json", "protocol.json")
        for path in sorted(run.rglob(pattern))
    }
    return images, official


class Stopped(Exception):
    """A crash at the worst moment."""


def stop_at(monkeypatch, module, name, call, how):
    """The call-th call of a function that writes to the disk does not come to its end."""
    original, calls = getattr(module, name), []

    def stopping(*arguments, **named):
        calls.append(arguments)
        if len(calls) == call:
            raise how
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, stopping)


def stop_appending(monkeypatch, call, how):
    """The call-th batch of scores does not reach the disk."""
    original, calls = store.appending, []

    @contextmanager
    def stopping(path):
        with original(path) as append:

            def add(lines):
                calls.append(lines)
                if len(calls) == call:
                    raise how
                append(lines)

            yield add

    monkeypatch.setattr(store, "appending", stopping)


@pytest.mark.parametrize("benchmark", ["geneval", "t2i-compbench"])
def test_a_run_that_was_stopped_anywhere_equals_one_that_was_not(commands, tmp_path, monkeypatch, capsys, benchmark):
    command = commands[benchmark]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    stopped = [*command, "--out", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:  # an image without its trace
        stop_at(patch, generation, "write_json", 5, Stopped())
        with pytest.raises(Stopped):
            main(stopped)
    with monkeypatch.context() as patch:  # Ctrl-C between two images
        stop_at(patch, generation, "save", 2, KeyboardInterrupt())
        assert main(stopped) == 130
    assert "the same command continues" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # judged, and the line not written
        stop_appending(patch, 2, Stopped())
        with pytest.raises(Stopped):
            main(stopped)
    (cut,) = sorted((tmp_path / "stopped" / "none" / "scores").iterdir())
    cut.write_bytes(cut.read_bytes() + b'{"item": "00')  # half a line
    with monkeypatch.context() as patch:
        stop_appending(patch, 1, KeyboardInterrupt())
        assert main(stopped) == 130
    assert "judgements are kept; the same command continues" in capsys.readouterr().err
    assert main(stopped) == 0
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "stopped")
    assert whole == resumed
    assert len(whole[0]) == 6 if benchmark == "geneval" else len(whole[0]) == sum(map(len, PROMPTS.values()))


@pytest.mark.parametrize("benchmark", ["geneval", "t2i-compbench"])
def test_two_shards_equal_one_run_and_may_be_of_several_machines(commands, tmp_path, monkeypatch, benchmark):
    """The second shard comes first: each judges the images that it made, since it may not have the others'."""
    monkeypatch.setattr("diffalign.cli.commands.JUDGE_BATCH", 1)  # other batches are other last digits
    command = commands[benchmark]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    for index in (1, 0):
        assert main([*command, "--out", str(tmp_path / "shards"), "--shard", f"{index}/2"]) == 0
    assert main([*command, "--out", str(tmp_path / "shards"), "--stage", "report"]) == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "shards")


@pytest.mark.parametrize("benchmark", ["geneval", "t2i-compbench"])
def test_damaged_images_are_made_again_by_a_run_and_named_without_one(commands, tmp_path, capsys, benchmark):
    command = [*commands[benchmark], "--out", str(tmp_path / "run")]
    assert main(command) == 0
    before = contents(tmp_path / "run")
    first, second = sorted((tmp_path / "run" / "none").rglob("*.png"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:60])
    capsys.readouterr()
    assert main([*command, "--stage", "score"]) == 1
    error = capsys.readouterr().err
    assert "2 of " in error
    assert f"{first.relative_to(tmp_path / 'run' / 'none').as_posix()}: missing" in error
    assert f"{second.relative_to(tmp_path / 'run' / 'none').as_posix()}: not a whole image" in error
    assert main([*command, "--stage", "report", "--allow-missing"]) == 0
    assert "PARTIAL: 2 images" in capsys.readouterr().out
    units = [json.loads(line) for line in (tmp_path / "run" / "none" / "units.jsonl").read_text().splitlines()]
    assert [unit["status"] for unit in units].count("left out") == 2
    assert {unit["error"].split(": ")[1].split(" (")[0] for unit in units if unit["error"]} == {"missing", "not a whole image"}
    assert main(command) == 0  # makes both anew, and the same
    assert contents(tmp_path / "run") == before


@pytest.mark.processes
def test_a_killed_process_leaves_nothing_half_written(commands, tmp_path):
    """SIGKILL while images are being made; what lies there is whole, and the rest follows."""
    command = commands["geneval"]
    assert main([*command, "--out", str(tmp_path / "whole"), "--stage", "generate"]) == 0
    arguments = [*command, "--out", str(tmp_path / "killed"), "--stage", "generate"]
    arguments[arguments.index("--batch-size") + 1] = "1"
    process = subprocess.Popen([sys.executable, "-m", "diffalign", *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and not list((tmp_path / "killed").rglob("traces/*.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
    made = list((tmp_path / "killed").rglob("traces/*.json"))
    assert made
    assert main([*command, "--out", str(tmp_path / "killed"), "--stage", "generate"]) == 0
    whole, killed = (contents(tmp_path / name)[0] for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
