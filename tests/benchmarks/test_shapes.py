"""The shapes benchmark from items to rows, on images drawn by the renderer, so that the right verdicts are known."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from diffalign.benchmarks.base import item_seed
from diffalign.benchmarks.shapes.benchmark import ShapesBenchmark
from diffalign.evaluation.folders import check_run, open_run, record_session
from diffalign.evaluation.generation import Generated, generate_missing
from diffalign.evaluation.judging import judged_rows
from diffalign.rules import TASKS
from diffalign.shapes import hard
from diffalign.shapes.scenes import SHAPES, SIZE, Scene, Thing, render

SPOTS = ((16, 16), (48, 16), (16, 48), (48, 48))
SETTINGS = {"pipeline": "drawn", "seed": 0}


def obey(item) -> Image.Image:
    """A picture that does what the prompt says."""
    row = item.metadata
    if row["tag"] in ("position", "relation_colors"):
        target, subject = row["include"]
        relation = subject["position"][0]
        x, y = {"left of": (16, 32), "right of": (48, 32), "above": (32, 16), "below": (32, 48)}[relation]
        colors = subject.get("color", "red"), target.get("color", "blue")
        things = [Thing(subject["class"], colors[0], x, y, 10), Thing(target["class"], colors[1], SIZE - x, SIZE - y, 10)]
    else:
        free = {clause["class"]: "blue" if clause.get("not_color") != "blue" else "red" for clause in row["include"]}
        wanted = [(c["class"], c.get("color", free[c["class"]])) for c in row["include"] for _ in range(c["count"])]
        things = [Thing(shape, color, x, y, 10) for (shape, color), (x, y) in zip(wanted, SPOTS, strict=False)]
    return Image.fromarray(render(Scene(tuple(things))))


def disobey(item) -> Image.Image:
    """One shape that the prompt does not name."""
    named = {clause["class"] for clause in item.metadata["include"]}
    other = next(shape for shape in SHAPES if shape not in named)
    return Image.fromarray(render(Scene((Thing(other, "black", 32, 32, 10),))))


def draw(how):
    return lambda items: [Generated(how(item), {"seconds": 0.1, "best": 0, "rewards": {"total": [1.0]}}) for item in items]


@pytest.fixture
def benchmark():
    return ShapesBenchmark(limit=24)


def correct(rows):
    return [row["correct"] for row in rows]


def judged(items, folder, how, benchmark):
    generate_missing(items, folder, draw(how), batch_size=32)
    return judged_rows(benchmark, folder)


def test_the_hard_tier_is_judged_and_a_negation_is_more_than_a_thing(tmp_path):
    benchmark = ShapesBenchmark("hard", limit=30)
    items = benchmark.items()
    assert all(correct(judged(items, tmp_path / "right", obey, benchmark)))
    assert not any(correct(judged(items, tmp_path / "wrong", disobey, benchmark)))

    def forbidden(item):
        """What the prompt says, but in the colour that it forbids."""
        kinds = [(clause["class"], clause.get("not_color")) for clause in item.metadata["include"]]
        return Image.fromarray(render(Scene((Thing(kinds[0][0], kinds[0][1], 32, 32, 10),)))) if kinds[0][1] else obey(item)

    rows = judged(items, tmp_path / "forbidden", forbidden, benchmark)
    assert [row["correct"] for row in rows] == [row["tag"] != "negation" for row in rows]
    assert all(row["reason"].startswith("expected") and " not " in row["reason"] for row in rows if not row["correct"])


def test_the_hard_tier_is_limited_like_the_others_and_says_what_is_zero_shot():
    items = ShapesBenchmark("hard").items()
    limits = (1, 2, 3, 4, 30, 100, 176)
    chosen = {limit: {item.index for item in ShapesBenchmark("hard", limit=limit).items()} for limit in limits}
    assert all(chosen[small] < chosen[large] for small, large in pairwise(limits))
    assert [sum(items[index].task == task for index in chosen[30]) for task in hard.TASKS] == [10] * 3
    assert ShapesBenchmark("hard", limit=30).limited() == "limited to 10 prompts a task (30 of 176)"
    assert "that is not" in ShapesBenchmark("hard").protocol()["zero-shot"]
    assert "zero-shot" not in ShapesBenchmark().protocol()


def test_limit_takes_the_same_number_of_each_task(benchmark):
    items = benchmark.items()
    assert [sum(item.task == task for item in items) for task in TASKS] == [4] * 6
    assert [item.index for item in items] == sorted({item.index for item in items})


def test_a_limited_run_is_part_of_the_full_one(benchmark):
    everything = {(item.index, item.sample): item for item in ShapesBenchmark(samples=2).items()}
    assert len(everything) == 1208
    for item in benchmark.items():
        assert everything[item.index, item.sample] == item


def test_a_limit_draws_from_the_whole_of_each_task():
    """In list order the first ten of "position" are all right of something: 60 prompts would have measured one relation of four."""
    positions = [item.metadata for item in ShapesBenchmark(limit=60).items() if item.task == "position"]
    assert len({row["include"][1]["position"][0] for row in positions}) >= 3


def test_limits_are_nested_and_balanced():
    limits = (*range(1, 13), 20, 60, 120, 200, 300, 450, 604)
    chosen = {limit: {item.index for item in ShapesBenchmark(limit=limit).items()} for limit in limits}
    assert all(chosen[small] < chosen[large] for small, large in pairwise(limits))
    tasks = {item.index: item.task for item in ShapesBenchmark().items()}
    for limit in (1, 7, 20, 60, 120):
        counts = [sum(tasks[index] == task for index in chosen[limit]) for task in TASKS]
        assert max(counts) - min(counts) <= 1


def test_a_limited_result_says_so():
    assert ShapesBenchmark().limited() is None
    assert ShapesBenchmark(limit=604).limited() is None
    assert ShapesBenchmark(limit=60).limited() == "limited to 10 prompts a task (60 of 604)"
    assert ShapesBenchmark(limit=8).limited() == "limited to 1 to 2 prompts a task (8 of 604)"
    assert ShapesBenchmark(limit=4).limited() == "limited to 1 prompt of 4 of 6 tasks (4 of 604)"


def test_seeds_belong_to_seed_prompt_and_sample():
    seeds = [item.seed for item in ShapesBenchmark(samples=2).items()]
    assert len(set(seeds)) == len(seeds)
    assert item_seed(0, 5, 1) == item_seed(0, 5, 1)
    assert len({item_seed(0, 5, 1), item_seed(1, 5, 1), item_seed(0, 6, 1), item_seed(0, 5, 2)}) == 4


def test_right_pictures_score_one_and_wrong_ones_zero(benchmark, tmp_path):
    items = benchmark.items()
    generate_missing(items, tmp_path / "right", draw(obey), batch_size=7)
    generate_missing(items, tmp_path / "wrong", draw(disobey), batch_size=7)
    right, wrong = judged_rows(benchmark, tmp_path / "right"), judged_rows(benchmark, tmp_path / "wrong")
    assert [row["reason"] for row in right] == [""] * len(items)
    assert all(row["correct"] for row in right)
    assert not any(row["correct"] for row in wrong)
    assert all(row["reason"].startswith("expected") or row["reason"].startswith("no target") for row in wrong)


def test_rows_have_genevals_keys_and_nested_json(benchmark, tmp_path):
    generate_missing(benchmark.items(), tmp_path, draw(obey), batch_size=24)
    row = judged_rows(benchmark, tmp_path)[0]
    assert list(row) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert row["filename"] == benchmark.items()[0].name
    assert json.loads(row["metadata"])["prompt"] == row["prompt"]
    (boxes,) = json.loads(row["details"]).values()
    assert len(boxes[0]) == 5
    assert boxes[0][4] > 0.7
    assert json.loads((tmp_path / f"{benchmark.items()[0].index:05d}" / "metadata.jsonl").read_text()) == json.loads(row["metadata"])


def test_a_batch_that_lacks_an_image_is_made_again_as_a_whole(benchmark, tmp_path):
    """A batch's size moves the last digits of its images, so the one that is lost is made beside the same ones as before."""
    items, batches = benchmark.items()[:10], []

    def generate(batch):
        batches.append([item.name for item in batch])
        return [Generated(Image.new("RGB", (8, 8), (len(batch), 0, 0)), {"seconds": 0.1, "best": 0, "rewards": {}}) for _ in batch]

    generate_missing(items, tmp_path, generate, batch_size=4)
    first = list(batches)
    assert [len(batch) for batch in first] == [4, 4, 2]
    bytes_before = {item.name: item.image_path(tmp_path).read_bytes() for item in items}
    kept = items[4].image_path(tmp_path).stat().st_mtime_ns
    items[5].image_path(tmp_path).unlink()
    items[5].trace_path(tmp_path).unlink()
    items[9].image_path(tmp_path).unlink()
    batches.clear()
    assert generate_missing(items, tmp_path, generate, batch_size=3) == 2
    assert batches == first[1:]
    assert {item.name: item.image_path(tmp_path).read_bytes() for item in items} == bytes_before
    assert items[4].image_path(tmp_path).stat().st_mtime_ns == kept
    batches.clear()  # a longer run does not make its neighbours anew
    generate_missing(benchmark.items()[:12], tmp_path, generate, batch_size=4)
    assert batches == [[item.name for item in benchmark.items()[10:12]]]


def test_a_run_stopped_within_a_batch_goes_on_with_the_same_batches(benchmark, tmp_path):
    items = benchmark.items()[:10]
    sizes = []

    def generate(batch):
        sizes.append(len(batch))
        return draw(obey)(batch)

    generate_missing(items, tmp_path, generate, batch_size=4)
    for item in (*items[6:8], *items[8:]):  # killed while the second of three batches was being written
        item.image_path(tmp_path).unlink()
        item.trace_path(tmp_path).unlink()
    sizes.clear()
    assert generate_missing(items, tmp_path, generate, batch_size=4) == 4
    assert sizes == [4, 2]


SAME = {"pipeline": "p", "preset": {"steps": 1, "scheduler": None}, "weights": "folder a", "versions": {"torch": "2.0", "diffusers": "1"}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"preset": {"steps": 2, "scheduler": None}}, "preset steps: 1 -> 2"),
        ({"preset": {"steps": 1, "scheduler": "DDIMScheduler"}}, "preset scheduler: None -> 'DDIMScheduler'"),
        ({"weights": "folder b"}, "weights: 'folder a' -> 'folder b'"),
        ({"versions": {"torch": "2.1", "diffusers": "1"}}, "versions torch: '2.0' -> '2.1'.*--allow-changed-versions"),
        ({"resolved": {"height": 64}}, "resolved height: 512 -> 64"),
    ],
)
def test_a_run_under_other_resolved_settings_is_refused_with_the_difference_named(tmp_path, change, named):
    made = {**SAME, "resolved": {"height": 512}}
    open_run(tmp_path / "run", made)
    with pytest.raises(ValueError, match=named):
        open_run(tmp_path / "run", {**made, **change})
    open_run(tmp_path / "run", made)


def test_changed_versions_may_be_allowed_and_places_are_listed_once(tmp_path):
    folder = tmp_path / "run"
    open_run(folder, SAME)
    open_run(folder, {**SAME, "versions": {"torch": "3.0", "diffusers": "1"}}, other_versions=True)
    for session in ({"device": "cpu", "date": "1"}, {"device": "cpu", "date": "2"}, {"device": "cuda", "date": "3"}):
        record_session(folder, session)
    found = json.loads((folder / "settings.json").read_text())
    assert found["versions"]["torch"] == "2.0"  # those that it was begun with
    assert [session["date"] for session in found["sessions"]] == ["1", "3"]
    open_run(folder, SAME)  # sessions are no settings


def test_a_run_of_before_records_what_it_did_not(tmp_path):
    open_run(tmp_path / "run", {"pipeline": "p"})
    open_run(tmp_path / "run", SAME)
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == SAME
    assert not check_run(tmp_path / "nowhere", SAME)
    assert not (tmp_path / "nowhere").exists()


def test_only_missing_items_are_made_again(benchmark, tmp_path):
    items = benchmark.items()
    made = []

    def generate(batch):
        made.extend(batch)
        if len(made) > 12:
            raise KeyboardInterrupt
        return draw(obey)(batch)

    with pytest.raises(KeyboardInterrupt):
        generate_missing(items, tmp_path, generate, batch_size=6)
    assert sum(item.is_done(tmp_path) for item in items) == 12
    assert generate_missing(items, tmp_path, draw(obey), batch_size=6) == 12
    assert generate_missing(items, tmp_path, draw(disobey), batch_size=6) == 0
    assert all(row["correct"] for row in judged_rows(benchmark, tmp_path))


def test_an_image_without_its_trace_is_not_finished(benchmark, tmp_path):
    items = benchmark.items()
    generate_missing(items, tmp_path, draw(obey), batch_size=24)
    items[3].trace_path(tmp_path).unlink()
    assert generate_missing(items, tmp_path, draw(disobey), batch_size=24) == 1


def test_a_missing_image_is_an_error_not_a_smaller_mean(benchmark, tmp_path):
    generate_missing(benchmark.items(), tmp_path, draw(obey), batch_size=24)
    benchmark.items()[5].image_path(tmp_path).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 24 images .*: missing"):
        judged_rows(benchmark, tmp_path)


def test_a_truncated_image_is_named(benchmark, tmp_path):
    generate_missing(benchmark.items(), tmp_path, draw(obey), batch_size=24)
    path = benchmark.items()[5].image_path(tmp_path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(FileNotFoundError, match=f"{benchmark.items()[5].name}: not a whole image"):
        judged_rows(benchmark, tmp_path)


def test_images_of_another_program_can_be_judged(benchmark, tmp_path):
    for item in benchmark.items():  # images alone, without traces or settings
        path = item.image_path(tmp_path)
        path.parent.mkdir(parents=True)
        obey(item).save(path)
    assert np.mean([row["correct"] for row in judged_rows(benchmark, tmp_path)]) == 1


def test_a_run_with_other_settings_is_refused(tmp_path):
    folder = tmp_path / "reno"
    open_run(folder, SETTINGS)
    open_run(folder, SETTINGS)
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 -> 1\)"):
        open_run(folder, {**SETTINGS, "seed": 1})
    (folder / "00000").mkdir()
    open_run(folder, {**SETTINGS, "seed": 1}, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="was not made by this benchmark"):
        open_run(tmp_path, SETTINGS, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(("arguments", "message"), [({"samples": 0}, "samples must"), ({"limit": 0}, "limit must")])
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShapesBenchmark(**arguments)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'exam'"):
        ShapesBenchmark(split="exam").items()
