"""One command retrains everything: in an order in which each stage finds what it needs, from empty folders, on the device asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import diffalign
import diffalign.shapes
from diffalign.shapes.train import __main__ as command
from diffalign.shapes.train import base, export, flow, loop, plan, rewards_captioner_tune, rewards_judged, stages, turbo
from diffalign.shapes.train.evaluate import MeasureConfig

SHIPPED = Path(diffalign.shapes.__file__).parent / "weights"
PIPELINES = ("shapes", "shapes-turbo", "shapes-flow")
REWARDS = ("shapes-clip", "shapes-preference", "shapes-aesthetic", "shapes-reward", "shapes-watch")

LEAST = dataclasses.replace(
    plan.QUICK.with_steps(2),
    vae_scenes=20,
    captions=200,
    unet_scenes=40,
    distillation=turbo.TurboConfig(pairs=64, pair_steps=1, warm_steps=1, batch=3, pair_batch=1),
    student_scenes=20,
    flow_matching=flow.FlowConfig(scenes=40, batch=4),
    clip_scenes=30,
    preference_pairs=30,
    aesthetic_pictures=20,
    captioning=dataclasses.replace(plan.QUICK.captioning, batch=8, until=2),
    captioner_scenes=20,
    rounds=rewards_captioner_tune.TuneConfig(
        fresh_prompts=(2,),
        base_prompts=2,
        base_steps=2,
        rounds=2,
        first_steps=1,
        climbed_prompts=1,
        scenes=20,
        mixed=False,
    ),
    watching=dataclasses.replace(plan.QUICK.watching, scenes=40, batch=8),
    measures=MeasureConfig(scenes=8, searched=200, prompts=2, group=2),
    per_task=1,
    per_kind=1,
    evaluated=10,
)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Every stage of LEAST, run in order in empty folders; and which finished folders they read."""
    folder = tmp_path_factory.mktemp("rehearsal")
    job = stages.Job(folder / "run", folder / "weights", plan=LEAST, flags=" --quick")
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards_judged, "SAMPLES", 4)
        for module, name in ((export, "load_pipeline"), (export, "shipped_parts"), (flow, "load_pipeline")):
            original = getattr(module, name)
            patch.setattr(module, name, lambda path, *rest, original=original: read.append(path) or original(path, *rest))
        for stage in stages.STAGES.values():
            stage(job)
    return job, read


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rehearsal_from_empty_folders_ends_with_folders_that_load(rehearsed):
    job, read = rehearsed
    assert read
    assert all(path.is_relative_to(job.weights) for path in read)  # nothing of the shipped weights
    assert {path.name for path in job.weights.iterdir()} == {*PIPELINES, *REWARDS}
    cards = {name: json.loads((job.weights / name / "card.json").read_text(encoding="utf-8")) for name in (*PIPELINES, *REWARDS)}
    assert all(one["command"].endswith(" --quick") for one in cards.values())
    for name in PIPELINES:
        drawn = list(cards[name]["figures"].values())[-1]
        assert {"test", "finish", "Frechet distance", "near-duplicates", "diversity"} == set(drawn)
        assert diffalign.load_pipeline(str(job.weights / name))("a star", seed=0, num_inference_steps=1).images
    images = torch.rand(2, 3, 64, 64)
    for name in REWARDS:
        reward = diffalign.load_reward(name, sources={name: job.weights / name}, device="cpu")
        assert torch.isfinite(reward(images, ["a star", "two red rings"]).total).all()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_finished_stage_trains_no_more(rehearsed):
    job, _ = rehearsed
    states = {path.stem: path for path in job.run.glob("*.safetensors") if path.stem != "pairs"}
    steps = {name: loop.progress(path)[0] for name, path in states.items()}
    assert steps == {name: 1 if name == "reward_round0" else 2 for name in steps}
    assert len(steps) == 14  # twelve trainings, one of them in two rounds, one with a critic
    stages.STAGES["base"](job)
    assert loop.progress(states["base"])[0] == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", stages.STAGES)
def test_every_stage_asks_for_the_device(name, rehearsed):
    """Of a device that no torch has: a stage that did not ask for it would go on."""
    job, _ = rehearsed
    with pytest.raises(RuntimeError, match="nowhere"):
        stages.STAGES[name](dataclasses.replace(job, device="nowhere"))


def test_every_folder_that_ships_has_a_stage_that_makes_it():
    made = " ".join(stages.STAGES)
    assert all(folder.name.removeprefix("shapes-") in made or folder.name == "shapes" for folder in SHIPPED.iterdir() if folder.is_dir())


def test_a_rehearsal_asks_for_folders_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "base", "--quick", "--run", "somewhere"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--quick needs --run and --weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "steps", "flags"),
    [([], base.CONFIG.steps, ""), (["--quick"], plan.QUICK.unet.steps, " --quick"), (["--quick", "--steps", "3"], 3, " --quick --steps 3")],
)
def test_the_command_line_chooses_the_plan_and_the_device(said, steps, flags, monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setitem(command.STAGES, "base", jobs.append)
    monkeypatch.setattr("sys.argv", ["train", "base", "--run", str(tmp_path), "--weights", str(tmp_path), "--device", "cuda:1", *said])
    command.main()
    (job,) = jobs
    assert (job.device, job.plan.unet.steps, job.flags) == ("cuda:1", steps, flags)


def test_all_is_every_stage_in_its_order(monkeypatch, tmp_path):
    seen = []
    for name in list(command.STAGES):
        monkeypatch.setitem(command.STAGES, name, lambda job, name=name: seen.append(name))
    monkeypatch.setattr("sys.argv", ["train", "all", "--run", str(tmp_path), "--weights", str(tmp_path)])
    command.main()
    assert seen == list(stages.STAGES)


def test_fewer_steps_are_fewer_for_every_training_and_leave_the_rest():
    less = plan.Plan().with_steps(10)
    loops = {f.name: getattr(less, f.name) for f in dataclasses.fields(less) if isinstance(getattr(less, f.name), loop.LoopConfig)}
    assert len(loops) == 12
    assert all(one.steps == 10 and one.warmup <= 2 for one in loops.values())
    assert less.unet.seed == plan.Plan().unet.seed
    assert less.rounds == plan.Plan().rounds
