"""T2I-CompBench from items to rows: rules met by scorers, shards, missing images, then tiny random models end to end."""

import json

import numpy as np
import pytest
from PIL import Image

from diffalign.benchmarks.models.open_vocabulary import Owlv2
from diffalign.benchmarks.t2i_compbench.benchmark import T2ICompBench, write_upstream_results
from diffalign.benchmarks.t2i_compbench.detections import Labelled, read_detections
from diffalign.benchmarks.t2i_compbench.language import Annotations, Grammar
from diffalign.benchmarks.t2i_compbench.models import BlipVqa, ClipScore, Depth
from diffalign.benchmarks.t2i_compbench.numeracy import Vocabulary
from diffalign.benchmarks.t2i_compbench.prompts import CATEGORIES
from diffalign.benchmarks.t2i_compbench.scorers import (
    BlipVqaScorer,
    ClipScorer,
    GivenDetections,
    NumeracyScorer,
    OpenVocabulary,
    Spatial2DScorer,
    Spatial3DScorer,
)
from diffalign.benchmarks.t2i_compbench.spatial import Token
from diffalign.benchmarks.t2i_compbench.three_in_one import Kinds
from diffalign.evaluation.generation import Generated, generate_missing
from diffalign.evaluation.judging import judged_rows, rows_in_common
from diffalign.evaluation.store import Shard, judged, score_missing
from tests.benchmarks.tiny_clip import tiny_clip
from tests.benchmarks.tiny_t2i import tiny_blip, tiny_dpt, tiny_owlv2

PROMPTS = {
    "color": ["a red cup and a blue bowl", "a green bench and a red bowl"],
    "shape": ["a red cup and a green dog"],
    "texture": ["a blue bowl and a green cup"],
    "spatial": ["a dog on the left of a cup", "a girl near a bench"],
    "3d_spatial": ["a dog in front of a cup"],
    "non_spatial": ["A dog runs."],
    "numeracy": ["two dogs and one cup"],
    "complex": ["The red cup is near the dog.", "The dog runs."],
}
WORDS = Vocabulary(("dog", "cup"), ("dogs", "cups"))


def grammar(text):
    tokens = tuple(Token(*pair.split("/")) for pair in text.split())
    return Grammar(tuple(token.text for token in tokens if token.pos == "NOUN"), tokens)


ANNOTATIONS = Annotations(
    "hand",
    {prompt: Grammar(tuple(prompt.split(" and "))) for category in ("color", "shape", "texture") for prompt in PROMPTS[category]}
    | {
        "The red cup is near the dog.": grammar("The/DET red/ADJ cup/NOUN is/AUX near/ADP the/DET dog/NOUN ./PUNCT"),
        "The dog runs.": grammar("The/DET dog/NOUN runs/VERB ./PUNCT"),
    },
)


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    for category, prompts in PROMPTS.items():
        (folder / f"{category}_val.txt").write_text("\n".join(prompts) + "\n")
    return folder


def noise(items):
    rng = np.random.default_rng(0)
    return [Generated(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), {"seconds": 0}) for _ in items]


def given(benchmark, objects):
    return GivenDetections({item.name.rpartition("/")[2]: objects for item in benchmark.items()})


DOG_LEFT_OF_CUP = [Labelled("dog", 0.8, (0.0, 0.0, 100.0, 100.0)), Labelled("cup", 0.6, (300.0, 0.0, 400.0, 100.0))]

# --- items --------------------------------------------------------------------------------------------------------------------


def test_layout_and_names_are_upstreams(clone, tmp_path):
    benchmark = T2ICompBench(clone, categories=["color", "spatial"], samples=2)
    items = benchmark.items()
    assert [item.name for item in items[:3]] == [
        "color/samples/a red cup and a blue bowl_000000.png",
        "color/samples/a red cup and a blue bowl_000001.png",
        "color/samples/a green bench and a red bowl_000002.png",
    ]
    generate_missing(items, tmp_path / "run", noise, batch_size=3)
    found = sorted(path.name for path in (tmp_path / "run" / "color" / "samples").iterdir())
    assert sorted(name[-10:] for name in found) == [f"{number:06d}.png" for number in range(4)]
    assert (tmp_path / "run" / "spatial" / "traces" / "a girl near a bench_000003.json").is_file()
    assert not list((tmp_path / "run").rglob("metadata.jsonl"))


def test_lists_are_read_once_and_again_where_they_change(clone, monkeypatch):
    from diffalign.benchmarks import sources

    read, calls = sources._bytes, []
    monkeypatch.setattr(sources, "_bytes", lambda place: (calls.append(place), read(place))[1])
    for _ in range(3):
        benchmark = T2ICompBench(clone, samples=2, limit=8)
        benchmark.items()
        benchmark.protocol()
    assert len(calls) == len(CATEGORIES)
    (clone / "color_val.txt").write_text("a purple cup and a white bowl\n")
    assert T2ICompBench(clone, categories=["color"]).items()[0].prompt == "a purple cup and a white bowl"


def test_a_prompts_seed_does_not_depend_on_what_else_is_run(clone):
    alone = {item.name: item.seed for item in T2ICompBench(clone, categories=["spatial"], samples=2).items()}
    among = {item.name: item.seed for item in T2ICompBench(clone, samples=2).items()}
    assert all(among[name] == seed for name, seed in alone.items())
    assert len(set(among.values())) == len(among)


def test_a_limited_run_takes_of_every_category_and_keeps_names(clone):
    everything = {item.name for item in T2ICompBench(clone, samples=2).items()}
    items = T2ICompBench(clone, samples=2, limit=8).items()
    assert [item.task for item in items[::2]] == list(CATEGORIES)
    assert {item.name for item in items} <= everything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must"),
        ({"limit": 0}, "limit must"),
        ({"categories": ["color", "color"]}, "each once"),
        ({"categories": []}, "at least one"),
    ],
)
def test_bad_settings(clone, arguments, message):
    with pytest.raises(ValueError, match=message):
        T2ICompBench(clone, **arguments)


# --- scores -------------------------------------------------------------------------------------------------------------------


def test_given_detections_meet_the_rules(clone, tmp_path):
    benchmark = T2ICompBench(clone, categories=["spatial", "numeracy"], samples=1)
    finder = given(benchmark, DOG_LEFT_OF_CUP)
    scorers = {"spatial": [Spatial2DScorer(finder)], "numeracy": [NumeracyScorer(finder, WORDS)]}
    benchmark = T2ICompBench(clone, categories=["spatial", "numeracy"], samples=1, scorers=scorers)
    generate_missing(benchmark.items(), tmp_path / "run", noise, batch_size=4)
    rows = judged_rows(benchmark, tmp_path / "run")
    assert [row["value"] for row in rows] == pytest.approx([0.25 * 0.8 + 0.25 * 0.6 + 0.5, 0.0, 0.75])
    assert rows[0]["detail"]["pair"] == ["dog", "cup"]
    assert rows[2]["detail"]["wanted"] == [["dog", 2], ["cup", 1]]
    assert "given by the user" in rows[0]["scorer"]


def test_an_image_without_given_detections_is_named(clone, tmp_path):
    finder = GivenDetections({})
    benchmark = T2ICompBench(clone, categories=["spatial"], samples=1, scorers={"spatial": [Spatial2DScorer(finder)]})
    generate_missing(benchmark.items(), tmp_path / "run", noise, batch_size=4)
    with pytest.raises(ValueError, match=r"no entry for spatial/samples/a dog on the left of a cup_000000\.png"):
        judged_rows(benchmark, tmp_path / "run")


def test_a_file_of_detections(tmp_path):
    path = tmp_path / "detections.json"
    path.write_text(
        json.dumps({"a.png": [{"label": "cup", "score": 0.5, "box": [0, 0, 1, 1]}, {"label": "dog", "score": 0.9, "box": [0, 0, 2, 2]}]})
    )
    assert read_detections(path) == {"a.png": [Labelled("dog", 0.9, (0, 0, 2, 2)), Labelled("cup", 0.5, (0, 0, 1, 1))]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must hold an object"),
        ({"a.png": [{"label": "dog", "score": 0.5}]}, "'a.png': a detection needs"),
        ({"a.png": [{"label": "dog", "score": 0.5, "box": [5, 0, 1, 1]}]}, "x1 <= x2"),
    ],
)
def test_a_wrong_file_of_detections_is_named(tmp_path, data, message):
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read_detections(path)


@pytest.mark.parametrize(
    ("category", "message"), [("color", "judging color needs BLIP-VQA; got none"), ("complex", "needs blip-vqa, 2d-spatial, clip-score")]
)
def test_a_category_without_its_scorers_is_named(clone, tmp_path, category, message):
    with pytest.raises(ValueError, match=message):
        judged_rows(T2ICompBench(clone, categories=[category]), tmp_path)


def test_results_are_written_where_upstream_writes_them(tmp_path):
    rows = [
        {"filename": f"color/samples/a cup_{i:06d}.png", "tag": "color", "prompt": "a cup", "value": v}
        for i, v in ((1, 0.25), (0, 0.69001))
    ] + [{"filename": "spatial/samples/a dog near a cup_000004.png", "tag": "spatial", "prompt": "", "value": 0.7}]
    colors, spatial = write_upstream_results(tmp_path, rows)
    assert colors == tmp_path / "color" / "annotation_blip" / "vqa_result.json"
    assert json.loads(colors.read_text()) == [{"question_id": 0, "answer": "0.6900"}, {"question_id": 1, "answer": "0.2500"}]
    assert json.loads(spatial.read_text()) == [{"question_id": 4, "answer": 0.7}]
    assert (colors.parent / "blip_vqa_score.txt").read_text() == f"BLIP-VQA score:{(0.69 + 0.25) / 2}"
    assert (spatial.parent / "avg_score.txt").read_text() == "score avg:0.7"


def test_averages_have_upstreams_names(tmp_path):
    """Each evaluator of upstream's calls its average otherwise."""
    rows = [{"filename": f"{c}/samples/a cup_000000.png", "tag": c, "prompt": "a cup", "value": 0.5} for c in CATEGORIES]
    write_upstream_results(tmp_path, rows)
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.txt")}
    assert found["3d_spatial/labels/annotation_obj_detection_3d/avg_result.txt"] == "avg score is 0.5"
    assert found["non_spatial/annotation_clip/score_avg.txt"] == "score avg:0.5"
    assert found["numeracy/annotation_num/score.txt"] == "total:0.5 num:1 avg:0.5"
    assert found["complex/annotation_3_in_1/vqa_score.txt"] == "score avg:0.5"


# --- end to end on tiny random models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorers():
    blip = BlipVqaScorer(BlipVqa(*tiny_blip(), "tiny BLIP", size=48), ANNOTATIONS)
    clip = ClipScore(*tiny_clip(), "tiny CLIP")
    finder = OpenVocabulary(Owlv2(*tiny_owlv2(), "tiny OWL", threshold=0.1))
    return {
        **{category: [blip] for category in ("color", "shape", "texture")},
        "spatial": [Spatial2DScorer(finder)],
        "3d_spatial": [Spatial3DScorer(finder, Depth(tiny_dpt(), "tiny DPT", size=32))],
        "non_spatial": [ClipScorer(clip)],
        "numeracy": [NumeracyScorer(finder, WORDS)],
        "complex": [blip, Spatial2DScorer(finder, ANNOTATIONS), ClipScorer(clip, ANNOTATIONS)],
    }


def test_all_categories_end_to_end_in_two_shards_and_in_one(clone, tmp_path, scorers):
    kinds = Kinds.of(spatial=["The red cup is near the dog."], action=["The dog runs."])
    benchmark = T2ICompBench(clone, samples=2, scorers=scorers, kinds=kinds, batch_size=3)
    for name in ("whole", "shards"):
        generate_missing(benchmark.items(), tmp_path / name, noise, batch_size=100)
    whole = judged_rows(benchmark, tmp_path / "whole")
    for index in range(2):
        for task in benchmark.tasks():
            score_missing(task, tmp_path / "shards", batch_size=5, shard=Shard(index, 2))
    rows, faults = judged(benchmark, tmp_path / "shards")
    assert faults == []
    assert [row["filename"] for row in rows] == [row["filename"] for row in whole] == [item.name for item in benchmark.items()]
    assert [row["value"] for row in rows] == pytest.approx([row["value"] for row in whole], abs=2e-4)
    by_category = {row["tag"]: row for row in rows}
    assert list(by_category) == list(CATEGORIES)
    assert "phrases by hand" in by_category["color"]["scorer"]
    detail = by_category["complex"]["detail"]
    assert by_category["complex"]["value"] == pytest.approx((detail["blip-vqa"] + detail["clip-score"]) / 2)  # an action prompt


def test_missing_images_fail_unless_allowed(clone, tmp_path, scorers):
    arguments = {"categories": ["color"], "samples": 1, "scorers": scorers}
    benchmark = T2ICompBench(clone, **arguments)
    items = benchmark.items()
    generate_missing(items, tmp_path / "run", noise, batch_size=4)
    items[1].image_path(tmp_path / "run").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .* not a whole image"):
        judged_rows(benchmark, tmp_path / "run")
    rows, left_out = rows_in_common(benchmark, {"run": tmp_path / "run"}, allow_missing=True)
    assert (len(rows["run"]), list(left_out)) == (1, [items[1].name])


def test_the_protocol_names_the_lists_and_is_the_papers_only_where_all_is(clone, scorers):
    protocol = T2ICompBench(clone, categories=["color"], scorers=scorers).protocol()
    assert protocol["protocol"] == "other"  # not upstream's prompts
    assert protocol["prompt lists"]["color"].startswith("unknown list")
    assert protocol["scorers"]["color"] == ["tiny BLIP, positions interpolated to 48 pixels; phrases by hand"]
