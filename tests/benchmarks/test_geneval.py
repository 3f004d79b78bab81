"""GenEval from items to official rows: with a detector that is told what is in the image, then with tiny random models end to end."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.benchmarks.geneval.benchmark import GenEvalBenchmark
from diffalign.benchmarks.geneval.colors import ClipColors
from diffalign.benchmarks.geneval.prompts import OBJECTS, metadata
from diffalign.benchmarks.geneval.results import KEYS, score, summary
from diffalign.benchmarks.geneval.scorer import GenEvalScorer
from diffalign.benchmarks.geneval.weights import load_colors, load_detector, load_scorer
from diffalign.benchmarks.models.mask2former import Mask2FormerDetector
from diffalign.evaluation.generation import Generated, generate_missing
from diffalign.evaluation.judging import judged_rows, rows_in_common
from diffalign.evaluation.store import Shard, judged, score_missing
from diffalign.rules import TASKS, Detection
from tests.benchmarks.tiny_clip import tiny_clip
from tests.benchmarks.tiny_mask2former import mmdet_layout, tiny_mask2former

SPOTS = ((10, 150), (290, 150), (150, 10), (150, 290))  # left, right, above, below
SPOT = {"left of": SPOTS[0], "right of": SPOTS[1], "above": SPOTS[2], "below": SPOTS[3]}


class Told:
    """Finds in an image what its row asks for: the number of the row is painted in the first pixel. Colours travel in the masks."""

    def __init__(self, obeying=True):
        self.obeying, self.shown, self.rows = obeying, 0, metadata()

    def __call__(self, images):
        self.shown += len(images)
        return [self.find(self.rows[int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])]) for image in images]

    def find(self, row):
        if not self.obeying:
            return {}
        found, spots = {}, iter(SPOTS)
        for clause in row["include"]:
            for _ in range(clause["count"]):
                x, y = SPOT[clause["position"][0]] if "position" in clause else (150, 150) if row["tag"] == "position" else next(spots)
                box = (float(x), float(y), x + 100.0, y + 100.0)
                found.setdefault(clause["class"], []).append(Detection(box, 0.95, clause.get("color", "red")))
        return found


def told_scorer(obeying=True):
    return GenEvalScorer(Told(obeying), lambda _image, _name, objects: [d.mask for d in objects], "told")


def paint(items):
    def image(item):
        pixels = np.zeros((4, 4, 3), dtype=np.uint8)
        pixels[0, 0, :2] = item.index % 256, item.index // 256
        return Image.fromarray(pixels)

    return [Generated(image(item), {"seconds": 0.1, "best": 0, "rewards": {}}) for item in items]


def test_the_official_protocol_is_553_prompts_of_4_images():
    items = GenEvalBenchmark().items()
    assert len(items) == 553 * 4
    assert [item.name for item in items[:5]] == [f"00000/samples/0000{i}.png" for i in range(4)] + ["00001/samples/00000.png"]
    assert len({item.seed for item in items}) == len(items)


def test_a_limited_run_is_part_of_the_full_one():
    everything = {item.name: item for item in GenEvalBenchmark().items()}
    items = GenEvalBenchmark(limit=12, samples=2).items()
    assert [sum(item.task == task for item in items) for task in TASKS] == [4] * 6
    assert all(everything[item.name] == item for item in items)


def test_a_limited_run_is_no_head_of_the_list():
    """The first 20 rows of "position" of the shapes world are all "right of": a task's first rows are no sample of it."""
    first = {task: next(row for row in metadata() if row["tag"] == task)["prompt"] for task in TASKS}
    assert {item.prompt for item in GenEvalBenchmark(limit=6, samples=1).items()} != set(first.values())


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"limit": 0}])
def test_bad_settings(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be at least 1"):
        GenEvalBenchmark(**arguments)


def test_images_that_obey_are_correct_and_rows_are_official(tmp_path):
    benchmark = GenEvalBenchmark(told_scorer(), samples=1)
    items = benchmark.items()
    generate_missing(items, tmp_path, paint, batch_size=100)
    rows = judged_rows(benchmark, tmp_path)
    assert [row["reason"] for row in rows] == [""] * 553
    assert score(rows).overall == 1.0
    assert tuple(rows[0]) == KEYS
    assert json.loads(rows[3]["metadata"]) == items[3].metadata
    assert json.loads((tmp_path / "00003" / "metadata.jsonl").read_text()) == items[3].metadata
    assert "Overall score (avg. over tasks): 1.00000" in summary(rows)


def test_images_that_do_not_are_wrong_with_a_reason(tmp_path):
    benchmark = GenEvalBenchmark(told_scorer(obeying=False), samples=1, limit=6)
    generate_missing(benchmark.items(), tmp_path, paint, batch_size=6)
    rows = judged_rows(benchmark, tmp_path)
    assert not any(row["correct"] for row in rows)
    assert all(row["reason"].startswith("expected ") for row in rows)


def test_scores_carry_the_partial_credit_beside(tmp_path):
    benchmark = GenEvalBenchmark(told_scorer(), samples=1, limit=6)
    (task,) = benchmark.tasks()
    assert [s["partial"] for s in task.scorer([np.asarray(g.image) for g in paint(task.items)], task.items)] == [1.0] * 6


def test_missing_images_fail_unless_allowed(tmp_path):
    benchmark = GenEvalBenchmark(told_scorer(), samples=2, limit=6)
    items = benchmark.items()
    generate_missing(items, tmp_path, paint, batch_size=6)
    items[1].image_path(tmp_path).unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 12 images .*{items[1].name}: missing"):
        judged_rows(benchmark, tmp_path)
    rows, left_out = rows_in_common(benchmark, {"run": tmp_path}, allow_missing=True)
    assert len(rows["run"]) == 11
    assert list(left_out) == [items[1].name]
    assert [fault.item for fault in judged(benchmark, tmp_path)[1]] == [items[1].name]


def test_without_a_scorer_it_can_only_generate(tmp_path):
    with pytest.raises(ValueError, match="needs a detector"):
        judged_rows(GenEvalBenchmark(limit=6), tmp_path)


def test_protocol_says_what_a_figure_must_be_quoted_with():
    protocol = GenEvalBenchmark(told_scorer(), limit=6).protocol()
    limited = "limited to 1 prompt a task (6 of 553)"
    assert (protocol["limited"], protocol["images per prompt"], protocol["scorer"]) == (limited, 4, "told")
    assert "prompts" not in protocol
    assert protocol["limits"]["counting_threshold"] == 0.9


# --- end to end on tiny random models -----------------------------------------------------------------------------------------


@pytest.fixture
def small_input(monkeypatch):
    """800 pixels are for the real detector."""
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.SHORT_SIDE", 64)
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.LONG_SIDE", 107)


@pytest.fixture(scope="module")
def tiny_scorer():
    detector = Mask2FormerDetector(tiny_mask2former(classes=80), OBJECTS, "tiny", least_score=0.02)
    return GenEvalScorer(detector, ClipColors(*tiny_clip(), "tiny"), "tiny")


def noise(items):
    rng = np.random.default_rng(0)
    return [Generated(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), {"seconds": 0}) for _ in items]


@pytest.mark.usefixtures("small_input")
def test_two_shards_and_a_resumed_run_equal_one_run(tiny_scorer, tmp_path):
    benchmark = GenEvalBenchmark(tiny_scorer, samples=1, limit=6, batch_size=2)
    for name in ("whole", "shards"):
        generate_missing(benchmark.items(), tmp_path / name, noise, batch_size=6)
    whole = judged_rows(benchmark, tmp_path / "whole")
    (task,) = benchmark.tasks()
    for index in range(2):
        score_missing(task, tmp_path / "shards", batch_size=3, shard=Shard(index, 2))
    rows, faults = judged(benchmark, tmp_path / "shards")
    assert faults == []
    assert [row["correct"] for row in rows] == [row["correct"] for row in whole]
    assert [row["reason"] for row in rows] == [row["reason"] for row in whole]
    assert len(rows) == 6


@pytest.mark.usefixtures("small_input")
def test_the_scorer_is_loaded_from_an_mmdet_file_and_a_clip_folder(tmp_path):
    torch.save({"state_dict": mmdet_layout(tiny_mask2former(classes=80))}, tmp_path / "detector.pth")
    model, tokenizer = tiny_clip()
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    scorer = load_scorer(str(tmp_path / "detector.pth"), str(tmp_path / "clip"))
    assert scorer.version.startswith("GenEval with the detector ")
    image = np.asarray(noise([None])[0].image)
    row = metadata()[200]
    item = GenEvalBenchmark(scorer, samples=1).items()[200]
    assert set(scorer([image], [item])[0]) == {"correct", "reason", "details", "partial", "strict"}
    assert row == item.metadata


def test_other_trainings_of_the_detector_are_called_so(tmp_path):
    tiny_mask2former(classes=80).save_pretrained(tmp_path / "detector")
    assert load_detector(str(tmp_path / "detector")).version.startswith("GenEval-HF")


@pytest.mark.parametrize(("source", "message"), [("nowhere.pth", "download it from"), ("best", "must be a .pth file, a folder or 'hf'")])
def test_a_detector_that_is_not_there(source, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_detector(source)


def test_a_clip_folder_that_lacks_a_tensor_is_refused(tmp_path):
    model, tokenizer = tiny_clip()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of CLIPModel, such as visual_projection\.weight"):
        load_colors(str(tmp_path))
