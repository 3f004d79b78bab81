"""`diffalign bench geneval` and `bench t2i-compbench` from command to table: a tiny real pipeline, tiny random judges, all from folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from diffalign.benchmarks.t2i_compbench.language import Annotations
from diffalign.cli import main, parse
from diffalign.rules import TASKS
from tests.benchmarks.test_t2i_compbench import ANNOTATIONS, PROMPTS
from tests.benchmarks.tiny_clip import tiny_clip
from tests.benchmarks.tiny_mask2former import mmdet_layout, tiny_mask2former
from tests.benchmarks.tiny_t2i import tiny_blip, tiny_dpt, tiny_owlv2
from tests.places import ROOT


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of judges."""
    folder = tmp_path_factory.mktemp("judges")
    for name, parts in {"clip": tiny_clip(), "blip": tiny_blip(patch=96), "owl": tiny_owlv2(), "dpt": (tiny_dpt(patch=48),)}.items():
        for part in parts:
            part.save_pretrained(folder / name)
    torch.save({"state_dict": mmdet_layout(tiny_mask2former(classes=80))}, folder / "detector.pth")
    return folder


@pytest.fixture(autouse=True)
def small_input(monkeypatch):
    """800 and 480 pixels are for the real models."""
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.SHORT_SIDE", 64)
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.LONG_SIDE", 107)


def bench(capsys, name, tiny_folder, out, *more):
    arguments = ["--pipeline", str(tiny_folder), "--steps", "1", "--guidance-scale", "0", "--device", "cpu", "--batch-size", "6"]
    code = main(["bench", name, *arguments, "--out", str(out), *map(str, more)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def geneval(models):
    return ["--detector", models / "detector.pth", "--clip", models / "clip", "--limit", "6", "--samples", "2"]


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_geneval_from_command_to_table(capsys, tiny_folder, tmp_path, models):
    search = ["--method", "none", "best-of-n", "--reward", "brightness=1", "--budget", "2"]
    code, out, _ = bench(capsys, "geneval", tiny_folder, tmp_path / "run", *geneval(models), *search)
    assert code == 0
    assert "Judge accuracy, with 95 % intervals" in out
    assert "GenEval with the detector" in out  # the protocol, at the foot of the table
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["methods"]) == ["none", "best-of-n"]
    assert list(summary["methods"]["none"]["tasks"]) == list(TASKS)
    assert summary["methods"]["best-of-n"]["largest_start_difference"] <= 1
    folder = tmp_path / "run" / "none"
    assert len(rows(folder)) == 12
    assert (folder / "summary.txt").read_text().startswith("Summary\n=======\nTotal images: 12\nTotal prompts: 6\n")
    protocol = json.loads((folder / "protocol.json").read_text())
    limited = "limited to 1 prompt a task (6 of 553)"
    assert (protocol["benchmark"], protocol["limited"], protocol["images per prompt"]) == ("geneval", limited, 2)

    code, out, _ = bench(capsys, "geneval", tiny_folder, tmp_path / "run", *geneval(models), *search)  # everything is there
    assert code == 0
    assert main(["compare", str(folder), str(tmp_path / "run" / "best-of-n")]) == 0
    assert "12 images of 6 prompts" in capsys.readouterr().out
    assert limited in (folder / "LIMITED.txt").read_text()
    assert limited in (folder / "failures.html").read_text()


def test_geneval_needs_no_reward_without_a_search(capsys, tiny_folder, tmp_path, models):
    code, out, _ = bench(capsys, "geneval", tiny_folder, tmp_path / "run", *geneval(models), "--method", "none")
    assert code == 0
    assert "Mean rewards" not in out


def test_two_shards_equal_one_run(capsys, tiny_folder, tmp_path, models):
    plain = [*geneval(models), "--method", "none"]
    bench(capsys, "geneval", tiny_folder, tmp_path / "whole", *plain)
    for index in range(2):
        code, out, _ = bench(capsys, "geneval", tiny_folder, tmp_path / "shards", *plain, "--shard", f"{index}/2")
        assert code == 0
        assert f"shard {index}/2 is done" in out
        assert not (tmp_path / "shards" / "summary.json").exists()
    code, _, _ = bench(capsys, "geneval", tiny_folder, tmp_path / "shards", *plain, "--stage", "report")
    assert code == 0
    assert rows(tmp_path / "shards" / "none") == rows(tmp_path / "whole" / "none")


def test_stages_and_missing_images(capsys, tiny_folder, tmp_path, models):
    plain, run = [*geneval(models), "--method", "none"], tmp_path / "run"
    assert bench(capsys, "geneval", tiny_folder, run, "--limit", "6", "--samples", "2", "--method", "none", "--stage", "generate")[0] == 0
    assert not (run / "none" / "results.jsonl").exists()
    lost = sorted((run / "none").glob("*/samples/*.png"))
    lost[0].unlink()
    lost[1].write_bytes(lost[1].read_bytes()[:50])
    code, _, err = bench(capsys, "geneval", tiny_folder, run, *plain, "--stage", "score")
    assert code == 1
    assert "2 of 12 images" in err
    names = [path.relative_to(run / "none").as_posix() for path in lost]
    assert f"{names[0]}: missing; {names[1]}: not a whole image" in err
    code, out, _ = bench(capsys, "geneval", tiny_folder, run, *plain, "--stage", "report", "--allow-missing")
    assert code == 0
    assert "PARTIAL: 2 images cannot be judged" in out
    assert len(json.loads((run / "summary.json").read_text())["partial"]) == 2
    assert len(rows(run / "none")) == 10


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("geneval", [], "--detector is needed to judge, and none was given"),
        ("geneval", ["--detector", "nowhere.pth"], "nowhere.pth does not exist"),
        ("t2i-compbench", [], "--prompts is needed"),
        ("t2i-compbench", ["--prompts", "nowhere"], "the prompts are neither at nowhere/color_val.txt"),
        ("geneval", ["--detector", "hf", "--images", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_wrong_options_fail_before_anything_is_made(capsys, tiny_folder, tmp_path, name, more, message):
    code, _, err = bench(capsys, name, tiny_folder, tmp_path / "run", "--method", "none", *more)
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("geneval", ["--split", "test"], "--split belongs to shapes and t2i-compbench, not to geneval"),
        ("shapes", ["--prompts", "clone"], "--prompts belongs to geneval and t2i-compbench"),
        ("shapes", ["--detector", "hf"], "--detector belongs to geneval and t2i-compbench, not to shapes"),
        ("geneval2", ["--questions", "x.csv"], "--questions belongs to dpg, not to geneval2"),
        ("geneval", ["--judge=vlm"], "--judge belongs to dpg and geneval2, not to geneval"),
        ("compare", ["a", "b"], "bench compare is compare now: write diffalign compare a b"),
    ],
)
def test_options_of_other_benchmarks_and_old_spellings_say_where_they_belong(capsys, name, more, message):
    with pytest.raises(SystemExit) as stop:
        main(["bench", name, *more])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "clone" / "examples" / "dataset"
    folder.mkdir(parents=True)
    for category, prompts in PROMPTS.items():
        (folder / f"{category}_val.txt").write_text("\n".join(prompts) + "\n")
    (folder / "new_objects.txt").write_text("dog - dogs\ncup - cups\n")
    (folder / "complex_val_spatial.txt").write_text("The red cup is near the dog.\n")
    (folder / "complex_val_action.txt").write_text("The dog runs.\n")
    return tmp_path / "clone"


def test_t2i_compbench_from_command_to_table(capsys, tiny_folder, tmp_path, models, clone):
    ANNOTATIONS.write(tmp_path / "phrases.json")
    judges = ["--blip", models / "blip", "--clip", models / "clip", "--detector", models / "owl", "--depth", models / "dpt"]
    more = ["--prompts", clone, "--phrases", tmp_path / "phrases.json", *judges, "--samples", "2", "--method", "none"]
    code, out, err = bench(capsys, "t2i-compbench", tiny_folder, tmp_path / "run", *more)
    assert code == 0, err
    assert "Mean scores, with 95 % intervals" in out
    assert "color: unknown list" in out
    folder = tmp_path / "run" / "none"
    found = rows(folder)
    assert len(found) == 2 * sum(map(len, PROMPTS.values()))
    assert {"filename", "index", "tag", "prompt", "value", "scorer", "detail"} == set(found[0])
    answers = json.loads((folder / "color" / "annotation_blip" / "vqa_result.json").read_text())
    assert [answer["question_id"] for answer in answers] == [0, 1, 2, 3]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["methods"]["none"]["tasks"]) == list(PROMPTS)

    (clone / "examples" / "dataset" / "color_val.txt").write_text("a blue dog and a red cup\n")
    other = Annotations("hand", {**ANNOTATIONS.prompts, "a blue dog and a red cup": ANNOTATIONS.prompts[PROMPTS["color"][0]]})
    other.write(tmp_path / "phrases.json")
    code, _, err = bench(capsys, "t2i-compbench", tiny_folder, tmp_path / "run", *more)
    assert code == 1
    assert "other settings (prompt lists" in err


def test_t2i_compbench_says_early_that_phrases_are_missing(capsys, tiny_folder, tmp_path, clone):
    Annotations("hand", {}).write(tmp_path / "phrases.json")
    more = ["--prompts", clone, "--phrases", tmp_path / "phrases.json", "--category", "color", "--method", "none"]
    code, _, err = bench(capsys, "t2i-compbench", tiny_folder, tmp_path / "run", *more)
    assert code == 1
    assert "lacks the prompt 'a red cup and a blue bowl'" in err
    assert not list(tmp_path.rglob("*.png"))


def test_phrases_are_found_once_and_kept(capsys, tiny_folder, tmp_path, models, clone, monkeypatch):
    """spaCy is asked for the prompts that the file in --out lacks, and not at all where it has them."""
    asked = []

    def annotate(prompts):
        asked.append(list(prompts))
        return Annotations("tagger", {prompt: ANNOTATIONS.prompts[prompt] for prompt in prompts})

    monkeypatch.setattr("diffalign.benchmarks.t2i_compbench.language.annotate", annotate)
    judges = ["--prompts", clone, "--blip", models / "blip", "--samples", "1", "--method", "none"]
    for limit in (1, 1, 2):
        more = ["--category", "color", "--limit", limit]
        code, _, err = bench(capsys, "t2i-compbench", tiny_folder, tmp_path / "run", *judges, *more)
        assert code == 0, err
    assert asked == [PROMPTS["color"][:1], PROMPTS["color"][1:2]]
    assert list(Annotations.read(tmp_path / "run" / "phrases.json").prompts) == PROMPTS["color"][:2]


def test_t2i_compbench_on_given_detections(capsys, tiny_folder, tmp_path, clone):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    names = [f"{prompt}_{i:06d}.png" for i, prompt in enumerate(PROMPTS["spatial"])]
    boxes = [{"label": "dog", "score": 0.8, "box": [0, 0, 100, 100]}, {"label": "cup", "score": 0.6, "box": [300, 0, 400, 100]}]
    (tmp_path / "detections.json").write_text(json.dumps(dict.fromkeys(names, boxes)))
    more = ["--prompts", clone, "--category", "spatial", "--detections", tmp_path / "detections.json", "--samples", "1", "--method", "none"]
    code, _, err = bench(capsys, "t2i-compbench", tiny_folder, tmp_path / "run", *more)
    assert code == 0, err
    assert [row["value"] for row in rows(tmp_path / "run" / "none")] == pytest.approx([0.85, 0.0])


def test_images_of_another_program_are_judged_where_they_lie(capsys, tiny_folder, tmp_path, models):
    """GenEval's layout with four-digit names, without traces or settings."""
    from PIL import Image

    from diffalign.benchmarks.geneval.benchmark import GenEvalBenchmark

    for item in GenEvalBenchmark(limit=6, samples=2).items():
        path = tmp_path / "theirs" / f"{item.index:05d}" / "samples" / f"{item.sample:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (40 * item.sample, 10, 10)).save(path)
    code, out, err = bench(capsys, "geneval", tiny_folder, tmp_path / "report", *geneval(models), "--images", tmp_path / "theirs")
    assert code == 0, err
    assert "| theirs" in out
    assert len(rows(tmp_path / "theirs")) == 12
    assert (tmp_path / "theirs" / "summary.txt").read_text().startswith("Summary")
    assert "images fail" in (tmp_path / "theirs" / "failures.html").read_text()
    assert (tmp_path / "report" / "table.html").is_file()
    assert not (tmp_path / "report" / "none").exists()


def test_images_of_other_prompts_are_refused(capsys, tmp_path, models):
    """A folder that was numbered anew, as after filtering, says so in its metadata.jsonl; it would be judged by others' prompts."""
    from PIL import Image

    from diffalign.benchmarks.geneval.benchmark import GenEvalBenchmark

    items = GenEvalBenchmark(limit=6, samples=1).items()
    for item in items:
        path = tmp_path / "theirs" / item.name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(path)
        (path.parent.parent / "metadata.jsonl").write_text(json.dumps(item.metadata) + "\n")
    judge = [*geneval(models)[:4], "--limit", "6", "--samples", "1", "--device", "cpu", "--images", tmp_path / "theirs"]
    command = ["bench", "geneval", *map(str, judge), "--out", str(tmp_path / "report")]
    assert main(command) == 0
    (tmp_path / "theirs" / f"{items[2].index:05d}" / "metadata.jsonl").write_text(json.dumps({"prompt": "a photo of a hat"}))
    (tmp_path / "theirs" / f"{items[4].index:05d}" / "metadata.jsonl").write_text(json.dumps({"prompt": "a photo of a shoe"}))
    capsys.readouterr()
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "a photo of a hat" in error
    assert f"prompt {items[2].index} " in error
    assert items[2].prompt in error


@pytest.mark.parametrize("name", ["geneval", "t2i-compbench", "parti"])
def test_real_prompts_are_not_drawn_by_the_shapes_model_by_default(capsys, tmp_path, name):
    assert main(["bench", name, "--out", str(tmp_path / "run")]) == 1
    assert "--pipeline is needed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_processes_of_a_launcher_delete_once(capsys, tiny_folder, tmp_path, clone):
    """--overwrite: the main process deletes and the others wait; a late one would delete what the first has made."""
    more = ["--prompts", clone, "--category", "spatial", "--samples", "2", "--method", "none", "--stage", "generate"]
    assert bench(capsys, "t2i-compbench", tiny_folder, tmp_path / "run", *more, "--seed", "7")[0] == 0
    fixed = [
        "--pipeline",
        tiny_folder,
        "--steps",
        "1",
        "--guidance-scale",
        "0",
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
        "--overwrite",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "diffalign"]
    command = [*launcher, "bench", "t2i-compbench", *fixed, *more]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "none" / "settings.json").read_text())["seed"] == 0
    assert len(list((tmp_path / "run" / "none").rglob("*.png"))) == 2 * len(PROMPTS["spatial"])


@pytest.mark.processes
def test_processes_of_a_launcher_share_the_work_and_the_first_reports(capsys, tiny_folder, tmp_path, clone):
    """Two processes under torch's launcher, as `accelerate launch` starts them; the images and scores of one run."""
    boxes = [{"label": "dog", "score": 0.8, "box": [0, 0, 100, 100]}]
    names = [f"{prompt}_{2 * i + k:06d}.png" for i, prompt in enumerate(PROMPTS["spatial"]) for k in range(2)]
    (tmp_path / "detections.json").write_text(json.dumps(dict.fromkeys(names, boxes)))
    more = ["--prompts", clone, "--category", "spatial", "--detections", tmp_path / "detections.json", "--samples", "2", "--method", "none"]
    assert bench(capsys, "t2i-compbench", tiny_folder, tmp_path / "one", *more)[0] == 0
    fixed = ["--pipeline", tiny_folder, "--steps", "1", "--guidance-scale", "0", "--device", "cpu", "--out", tmp_path / "two"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "diffalign"]
    command = [*launcher, "bench", "t2i-compbench", *fixed, *more]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Mean scores, with 95 % intervals") == 1
    assert rows(tmp_path / "two" / "none") == rows(tmp_path / "one" / "none")
    assert sorted(path.name for path in (tmp_path / "two" / "none" / "scores").iterdir()) == [
        "2d-spatial.0-of-2.jsonl",
        "2d-spatial.1-of-2.jsonl",
    ]


@pytest.mark.parametrize(
    ("name", "samples"),
    [("geneval", 4), ("t2i-compbench", 10), ("dpg", 4), ("geneval2", 1), ("parti", 1), ("hpsv2", 1), ("drawbench", 1)],
)
def test_the_shipped_configs_are_the_official_protocols(name, samples):
    file = name.replace("-", "_")
    more = ["--detector", "hf"] if name == "geneval" else ["--prompts", "clone"]
    _, options = parse(["bench", name, "--config", str(ROOT / f"configs/bench/real/{file}.yaml"), *more])
    options.check()
    assert (options.run.samples, options.run.limit, options.model.pipeline, options.method) == (samples, None, "sd-turbo", ("none",))
