"""Prompt sets judged by rewards and by questions: every number worked by hand, resume and shards, foreign layouts."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.benchmarks.dpg.judge import DpgScorer, categories, cut_grids, require_questions, write_grids, write_official
from diffalign.benchmarks.dpg.questions import parse_questions
from diffalign.benchmarks.geneval2.judge import GenEval2Scorer, GivenScores, accepted, skills, soft_tifa
from diffalign.benchmarks.geneval2.judge import write_official as write_geneval2
from diffalign.benchmarks.lists import read_prompt_set
from diffalign.benchmarks.models.vqa import GivenAnswers, Panel
from diffalign.benchmarks.prompt_list import PromptBenchmark
from diffalign.benchmarks.prompt_sets.preference import RewardScorer, hpsv2_table
from diffalign.evaluation.generation import Generated, generate_missing
from diffalign.evaluation.judging import judged_rows
from diffalign.evaluation.store import Shard, judged, score_missing
from diffalign.hub import judge_name, load_judge, load_reward
from tests.benchmarks.prompt_files import DPG_HEAD, DPG_ROWS, write_prompt_files
from tests.reward_models.tiny_vlms import write_judge


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_prompt_files(tmp_path_factory.mktemp("prompts"))


def benchmark(folders, name, *scorers, **more):
    return PromptBenchmark(read_prompt_set(name, folders[name]), scorers, **more)


def grey(items):
    """Each image is of its own grey: 10 x its index + its sample, of 255."""
    return [Generated(Image.new("RGB", (8, 8), (10 * item.index + item.sample,) * 3), {"seconds": 0.1}) for item in items]


def rewards(*names):
    mix = load_reward(dict.fromkeys(names, 1.0), device="cpu")
    return [RewardScorer(mix.members[name][0], name, f"{name} (test)") for name in names]


# --- rewards ------------------------------------------------------------------------------------------------------------------


def test_every_image_has_a_number_for_each_reward(folders, tmp_path):
    bench = benchmark(folders, "parti", *rewards("brightness", "jpeg-compressibility"), samples=2)
    generate_missing(bench.items(), tmp_path, grey, batch_size=4)
    rows = judged_rows(bench, tmp_path)
    assert [row["filename"] for row in rows][:3] == ["00000/samples/00000.png", "00000/samples/00001.png", "00001/samples/00000.png"]
    assert [row["values"]["brightness"] for row in rows] == pytest.approx(
        [(10 * i + k) / 255 for i in range(3) for k in range(2)], abs=1e-5
    )
    assert all(row["values"]["jpeg-compressibility"] < 0 for row in rows)
    assert rows[0]["scorers"] == {"brightness": "brightness (test)", "jpeg-compressibility": "jpeg-compressibility (test)"}
    assert bench.protocol()["images per prompt"] == "2 (the official protocol makes 1)"
    assert benchmark(folders, "parti", limit=2).protocol()["images per prompt"] == 1


def test_two_shards_and_a_resumed_run_equal_one_run(folders, tmp_path):
    bench = benchmark(folders, "drawbench", *rewards("brightness"), samples=3, batch_size=2)
    for name in ("whole", "shards"):
        generate_missing(bench.items(), tmp_path / name, grey, batch_size=6)
    whole = judged_rows(bench, tmp_path / "whole")
    (task,) = bench.tasks()
    score_missing(task, tmp_path / "shards", batch_size=1, shard=Shard(1, 2))
    rows, faults = judged(bench, tmp_path / "shards")
    assert (len(rows), {fault.problem for fault in faults}) == (3, {"not scored yet"})
    score_missing(task, tmp_path / "shards", batch_size=4, shard=Shard(0, 2))
    assert judged(bench, tmp_path / "shards") == (whole, [])


def test_images_of_several_sizes_are_scored_together(folders, tmp_path):
    bench = benchmark(folders, "parti", *rewards("brightness"))
    sizes = iter([(8, 8), (16, 8), (8, 8)])
    generate_missing(bench.items(), tmp_path, lambda items: [Generated(Image.new("RGB", next(sizes), (51,) * 3), {}) for _ in items], 1)
    assert [row["values"]["brightness"] for row in judged_rows(bench, tmp_path)] == pytest.approx([0.2] * 3)


def test_hpsv2_makes_jpegs_where_its_evaluator_looks(folders, tmp_path):
    bench = benchmark(folders, "hpsv2", *rewards("brightness"))
    generate_missing(bench.items(), tmp_path, grey, batch_size=8)
    assert Image.open(tmp_path / "concept-art" / "00001.jpg").format == "JPEG"
    assert (tmp_path / "traces" / "concept-art" / "00001.json").is_file()
    assert generate_missing(bench.items(), tmp_path, grey, batch_size=8) == 0
    assert [row["values"]["brightness"] for row in judged_rows(bench, tmp_path)] == pytest.approx(
        [10 * i / 255 for i in range(8)], abs=2 / 255
    )
    with pytest.raises(ValueError, match="one image per prompt"):
        benchmark(folders, "hpsv2", samples=2)


def test_hpsv2s_table_by_hand():
    """20 images a style in ten groups of two. Of 0, 1, ..., 19 the group means are 0.5, 2.5, ..., 18.5."""
    rows = [{"tag": "anime", "values": {"r": float(i)}} for i in range(20)] + [{"tag": "photo", "values": {"r": 1.0}} for _ in range(20)]
    table = hpsv2_table(rows, "r")
    assert table["anime"] == (pytest.approx(9.5), pytest.approx(2 * math.sqrt(8.25)))
    assert table["photo"] == (1.0, 0.0)
    assert table["average"][0] == pytest.approx((9.5 + 1) / 2)


def test_a_score_that_is_not_finite_is_an_error(folders, tmp_path):
    class Broken:
        name, differentiable = "broken", False

        def prepare(self, prompts): ...

        def __call__(self, images, prompts):
            return torch.full((len(images),), torch.nan)

    bench = benchmark(folders, "drawbench", RewardScorer(Broken(), "broken", "broken"))
    generate_missing(bench.items(), tmp_path, grey, batch_size=8)
    with pytest.raises(FloatingPointError, match=r"'broken' gives no finite score for 00000/samples/00000\.png"):
        judged_rows(bench, tmp_path)


def test_without_scorers_it_can_only_generate(folders, tmp_path):
    with pytest.raises(ValueError, match="needs at least one scorer"):
        judged_rows(benchmark(folders, "parti"), tmp_path)


# --- DPG-Bench ----------------------------------------------------------------------------------------------------------------

QUESTIONS = parse_questions(DPG_HEAD + DPG_ROWS, "dpg_bench.csv")


def given(bench, *answers):
    """Answers (thing, red) of each image in turn."""
    asked = ("Is there a thing?", "Is the thing red?")
    return GivenAnswers(
        {item.name: dict(zip(asked, pair, strict=True)) for item, pair in zip(bench.items(), answers, strict=True)}, "given"
    )


def dpg(folders, tmp_path, *answers):
    bench = benchmark(folders, "dpg", samples=2)
    bench = benchmark(folders, "dpg", DpgScorer(given(bench, *answers), QUESTIONS), samples=2)
    generate_missing(bench.items(), tmp_path, grey, batch_size=8)
    return bench, judged_rows(bench, tmp_path)


def test_dpg_by_hand(folders, tmp_path):
    """The second question needs the first. 0.5 is no yes; above it is."""
    answers = [("yes", "yes"), ("yes", "no"), ("no", "yes"), (0.51, 0.5), ("Yes", 1), ("no", 0.0)]
    _, rows = dpg(folders, tmp_path, *answers)
    assert [row["values"]["dpg"] for row in rows] == [1.0, 0.5, 0.0, 0.5, 1.0, 0.0]
    found = categories(rows, QUESTIONS)  # before the reduction: 4 of 6 things, 3 of 6 colours
    assert found == {
        "attribute": 50.0,
        "entity": pytest.approx(400 / 6),
        "attribute - color": 50.0,
        "entity - whole": pytest.approx(400 / 6),
    }
    write_official(tmp_path, rows, found)
    assert (tmp_path / "dpg_scores.txt").read_text().startswith("DPG-Bench score: 50.0000\n")


@pytest.mark.parametrize("answer", ["maybe", None, 1.5, True, float("nan")])
def test_answers_that_are_none_are_refused(folders, tmp_path, answer):
    with pytest.raises(ValueError, match=r"9/samples/00000\.png: the answer to 'Is there a thing\?' must be"):
        dpg(folders, tmp_path, (answer, "yes"), *[("yes", "yes")] * 5)


def test_an_image_without_answers_is_named(folders, tmp_path):
    bench = benchmark(folders, "dpg", DpgScorer(GivenAnswers({}, "given"), QUESTIONS), samples=1)
    generate_missing(bench.items(), tmp_path, grey, batch_size=8)
    with pytest.raises(ValueError, match=r"no entry for 9/samples/00000\.png"):
        judged_rows(bench, tmp_path)


def test_prompts_without_questions_are_named(folders):
    with pytest.raises(ValueError, match="no questions about 1 prompts, such as whoops3"):
        require_questions({item: QUESTIONS[item] for item in ("9", "10")}, benchmark(folders, "dpg").items())


def test_grids_out_and_back(folders, tmp_path):
    bench = benchmark(folders, "dpg", samples=4)
    generate_missing(bench.items(), tmp_path / "ours", grey, batch_size=8)
    assert write_grids(bench.items(), tmp_path / "ours") == 3
    assert write_grids(bench.items(), tmp_path / "ours") == 0  # nothing has changed
    grid = np.asarray(Image.open(tmp_path / "ours" / "grids" / "10.png"))
    assert grid[::8, ::8, 0].tolist() == [[10, 11], [12, 13]]  # row by row
    (tmp_path / "ours" / "grids" / "whoops3.png").unlink()
    cut_grids(bench.items(), tmp_path / "ours" / "grids", tmp_path / "theirs")
    for item in bench.items()[:8]:
        assert (np.asarray(Image.open(item.image_path(tmp_path / "theirs"))) == 10 * item.index + item.sample).all()
    assert not (tmp_path / "theirs" / "whoops3").exists()
    Image.new("RGB", (7, 8)).save(tmp_path / "ours" / "grids" / "whoops3.png")
    with pytest.raises(ValueError, match=r"whoops3\.png: a grid of DPG-Bench has 4 tiles and even sides"):
        cut_grids(bench.items(), tmp_path / "ours" / "grids", tmp_path / "theirs")


# --- GenEval 2 ----------------------------------------------------------------------------------------------------------------


def test_soft_tifa_by_hand():
    score = soft_tifa([0.9, 0.4], ["count", "object"])
    assert score["values"] == {"soft-tifa-gm": pytest.approx(0.6), "soft-tifa-am": pytest.approx(0.65)}
    assert soft_tifa([1.0, 0.0], ["a", "b"])["values"]["soft-tifa-gm"] == 0.0


def test_accepted_answers_are_upstreams():
    assert accepted("Yes") == ["Yes", "yes", " yes", " Yes"]
    assert accepted("three") == ["three", "Three", "3", " three", " Three", " 3"]
    with pytest.raises(ValueError, match="yes and number words; got 'red'"):
        accepted("red")


def test_the_official_evaluators_scores_can_be_given(folders, tmp_path):
    (tmp_path / "scores.json").write_text("[[0.9, 0.4], [0.5]]")
    bench = benchmark(folders, "geneval2", GivenScores.read(tmp_path / "scores.json"))
    generate_missing(bench.items(), tmp_path / "run", grey, batch_size=8)
    rows = judged_rows(bench, tmp_path / "run")
    assert [row["values"]["soft-tifa-gm"] for row in rows] == pytest.approx([0.6, 0.5])
    assert skills(rows) == {"attribute": 40.0, "count": 90.0, "object": 50.0}
    write_geneval2(tmp_path / "run", rows, bench.items())
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == [[0.9, 0.4], [0.5]]
    assert list(json.loads((tmp_path / "run" / "image_paths.json").read_text())) == ["two dogs and a red cup", "a cat"]
    lines = (tmp_path / "run" / "geneval2_scores.txt").read_text().splitlines()
    assert lines[:3] == ["soft-tifa-gm: 55.0000", "soft-tifa-am: 57.5000", "4 atoms (GM): 60.0000"]


def test_the_official_file_has_one_list_a_prompt_whatever_the_number_of_images(folders, tmp_path):
    """Of two images, each question's mean."""
    bench = benchmark(folders, "geneval2", GivenScores([[0.9, 0.4], [0.5]], "given"), samples=2)
    generate_missing(bench.items(), tmp_path, grey, batch_size=8)
    rows = judged_rows(bench, tmp_path)
    rows[1] = {**rows[1], "detail": {"probabilities": [["count", 0.1], ["attribute", 0.6]]}}
    write_geneval2(tmp_path, rows, bench.items())
    assert json.loads((tmp_path / "scores.json").read_text()) == [pytest.approx([0.5, 0.5]), [0.5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "must hold a list"), ("[[0.5, 2]]", "must hold a list"), ("[[0.5]]", "1 numbers for prompt 0, which has 2 questions")],
)
def test_wrong_scores_are_named(folders, tmp_path, text, message):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        GivenScores.read(tmp_path / "scores.json")([np.zeros((8, 8, 3), np.uint8)], benchmark(folders, "geneval2").items()[:1])


# --- a judge that looks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    write_judge(folder)
    return load_judge(folder, device="cpu", dtype="float32"), judge_name(folder)


def test_a_tiny_judge_answers_the_questions_of_both(folders, tmp_path, judge):
    model, version = judge
    panel = Panel(model, version, batch_size=3)
    bench = benchmark(folders, "dpg", DpgScorer(panel, QUESTIONS), samples=1)
    generate_missing(bench.items(), tmp_path / "dpg", grey, batch_size=8)
    assert {answer for row in judged_rows(bench, tmp_path / "dpg") for _, answer in row["detail"]["answers"]} <= {"yes", "no"}
    bench = benchmark(folders, "geneval2", GenEval2Scorer(panel))
    generate_missing(bench.items(), tmp_path / "geneval2", grey, batch_size=8)
    rows = judged_rows(bench, tmp_path / "geneval2")
    assert [len(row["detail"]["probabilities"]) for row in rows] == [2, 1]
    assert all(0 < p < 1 for row in rows for _, p in row["detail"]["probabilities"])
    assert "vlm-judge" in rows[0]["scorers"]["geneval2"]


def test_answers_do_not_depend_on_batches(folders, judge):
    model, version = judge
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((56, 56, 3), (56, 28, 3), (56, 56, 3))]
    asked = [["Is it red?", "Is there a very long question about a dog?"], ["Is it blue?"], ["Is it green?", "A dog?"]]
    one, many = (Panel(model, version, batch_size=size).ask(images, [None] * 3, asked) for size in (1, 8))
    assert [len(row) for row in one] == [2, 1, 2]
    for a, b in zip(one, many, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_a_judge_that_gives_no_probability_is_an_error():
    class Broken:
        def ask(self, images, questions):
            return torch.full((len(images),), torch.nan)

    with pytest.raises(FloatingPointError, match="broken gave nan as the probability of an answer to 'Is it red"):
        Panel(Broken(), "broken").ask([np.zeros((8, 8, 3), np.uint8)], [None], [["Is it red?"]])
