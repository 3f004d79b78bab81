"""`diffalign score` on real files with the rewards that ship: what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import os

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from diffalign import load_reward
from diffalign.cli import main
from diffalign.evaluation import score_run
from diffalign.evaluation.image_files import list_images
from diffalign.images import Picture, read_image
from tests import scored
from tests.places import WEIGHTS
from tests.scored import CHEAP, PROMPTS, SHAPES, lines, results, scores

needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the shapes rewards are not trained yet")


@pytest.fixture
def folder(tmp_path):
    return scored.make_images(tmp_path / "images")


@pytest.fixture
def score(tmp_path, capsys):
    return scored.command(capsys, tmp_path / "out")


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


def test_a_reward_that_breaks_on_everything_is_given_up(tmp_path):
    """Eight in a row, not eight in all: a server that is down should not be asked for every image."""
    for i in range(30):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    images = list_images(tmp_path).images

    def breaking_on(broken):
        def reward(batch, prompts):
            if any(round(image[0, 0, 0].item() * 255) in broken for image in batch):
                raise RuntimeError("the server\nhas no answer")
            return batch[:, 0, 0, 0]

        return reward

    def score(broken, name):
        work = score_run.open_work(name, tmp_path / "out", images, None, score_run.Digests())
        score_run.score_pending(work, breaking_on(broken), "cpu", 4, lambda n: None)
        return work

    odd = set(range(1, 30, 2))
    assert score(odd, "odd").problems.keys() == {f"{i:02d}.png" for i in odd}
    with pytest.raises(ValueError, match="down failed on 8 images in a row, and the last time said: the server has no answer"):
        score(set(range(10, 30)), "down")
    assert len(lines(tmp_path / "out", "down")) == 10


def test_few_images_wait_for_others_of_their_size(monkeypatch):
    """However many sizes there are, and fewer where images are large."""

    def loaded(height):
        return score_run.Loaded(None, "", Picture(np.zeros((height, 10, 3), np.uint8)))

    held = [0]

    def counting(heights):
        for height in heights:
            held[0] += 1
            yield loaded(height)

    def batches(heights, size):
        held[0], sizes = 0, []
        for batch in score_run._batches(counting(heights), size):
            assert held[0] <= score_run.HELD_BATCHES * size
            assert len({one.picture.levels.shape for one in batch}) == 1
            held[0] -= len(batch)
            sizes.append(len(batch))
        assert sum(sizes) == len(heights)
        return sizes

    assert batches([5] * 10, 4) == [4, 4, 2]
    assert max(batches(list(range(1, 60)) * 2, 4)) <= 2
    assert batches([5, 6] * 8, 4) == [4, 4, 4, 4]
    monkeypatch.setattr(score_run, "HELD_PIXELS", 150)
    assert batches([5] * 8, 4) == [3, 3, 2]
    assert batches([100] * 3, 4) == [1, 1, 1]


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
        (["{tmp}/images", "--prompt", "a", "--prompts", "b.csv"], "give one of them"),
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
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["score", *arguments])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
