"""Scoring on disk: resumed, sharded, repeated where an image or the scorer changed, and naming what cannot be judged."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from diffalign.benchmarks.base import Item, Task
from diffalign.evaluation.store import Images, Shard, collect, require_all, score_missing


@dataclass
class Brightness:
    """Scores the mean pixel, and remembers what it was shown."""

    version: str = "1"
    name: str = "brightness"
    fail_after: int = 10**9
    shown: list[str] = field(default_factory=list)

    def __call__(self, images, items):
        if len(self.shown) >= self.fail_after:
            raise KeyboardInterrupt
        self.shown += [item.name for item in items]
        return [{"mean": float(image.mean())} for image in images]


ITEMS = [Item(index, sample, 0, "task", f"prompt {index}", {}) for index in range(5) for sample in range(2)]


@pytest.fixture
def folder(tmp_path):
    for number, item in enumerate(ITEMS):
        write(tmp_path, item, number)
    return tmp_path


def write(folder, item, level):
    path = item.image_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), level, dtype=np.uint8)).save(path)


def test_every_image_is_scored_once(folder):
    scorer = Brightness()
    assert score_missing(Task(scorer, ITEMS), folder, batch_size=3) == []
    assert scorer.shown == [item.name for item in ITEMS]
    scores, faults = collect(Task(scorer, ITEMS), folder)
    assert faults == []
    assert [scores[item.name]["mean"] for item in ITEMS] == list(range(10))
    score_missing(Task(scorer, ITEMS), folder)
    assert len(scorer.shown) == len(ITEMS)


def test_a_killed_run_goes_on_where_it_stopped(folder):
    with pytest.raises(KeyboardInterrupt):
        score_missing(Task(Brightness(fail_after=6), ITEMS), folder, batch_size=3)
    (path,) = (folder / "scores").iterdir()
    path.write_bytes(path.read_bytes() + b'{"item": "00003/sam')  # killed while writing a line
    again = Brightness()
    score_missing(Task(again, ITEMS), folder, batch_size=3)
    assert again.shown == [item.name for item in ITEMS[6:]]
    scores, faults = collect(Task(again, ITEMS), folder)
    assert (len(scores), faults) == (10, [])


def test_shards_together_are_one_run(folder, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    for number, item in enumerate(ITEMS):
        write(whole, item, number)
    score_missing(Task(Brightness(), ITEMS), whole)
    shards = [Brightness() for _ in range(3)]
    for index, scorer in enumerate(shards):
        score_missing(Task(scorer, ITEMS), folder, batch_size=2, shard=Shard(index, 3))
    assert sorted(name for scorer in shards for name in scorer.shown) == sorted(item.name for item in ITEMS)
    assert collect(Task(Brightness(), ITEMS), folder) == collect(Task(Brightness(), ITEMS), whole)


def test_an_unfinished_shard_is_named(folder):
    score_missing(Task(Brightness(), ITEMS), folder, shard=Shard(0, 2))
    scores, faults = collect(Task(Brightness(), ITEMS), folder)
    assert len(scores) == 5
    assert [fault.item for fault in faults] == [item.name for item in ITEMS[1::2]]
    assert {fault.problem for fault in faults} == {"not scored yet"}


def test_a_changed_image_is_scored_again_and_alone(folder):
    score_missing(Task(Brightness(), ITEMS), folder)
    write(folder, ITEMS[4], 200)
    assert collect(Task(Brightness(), ITEMS), folder)[1][0].problem == "not scored yet"
    again = Brightness()
    score_missing(Task(again, ITEMS), folder)
    assert again.shown == [ITEMS[4].name]
    assert collect(Task(again, ITEMS), folder)[0][ITEMS[4].name] == {"mean": 200.0}


def test_another_version_of_the_scorer_scores_anew(folder):
    score_missing(Task(Brightness(), ITEMS), folder)
    other = Brightness(version="2")
    score_missing(Task(other, ITEMS), folder)
    assert len(other.shown) == len(ITEMS)


def test_missing_and_cut_images_are_named_and_the_rest_is_scored(folder):
    ITEMS[2].image_path(folder).unlink()
    cut = ITEMS[7].image_path(folder)
    cut.write_bytes(cut.read_bytes()[:40])
    faults = score_missing(Task(Brightness(), ITEMS), folder)
    assert [fault.item for fault in faults] == [ITEMS[2].name, ITEMS[7].name]
    scores, collected = collect(Task(Brightness(), ITEMS), folder)
    assert len(scores) == 8
    assert [fault.problem.split(" (")[0] for fault in collected] == ["missing", "not a whole image"]
    with pytest.raises(FileNotFoundError, match=rf"2 of 10 images .*{ITEMS[2].name}: missing; {ITEMS[7].name}: not a whole image"):
        require_all(faults, len(ITEMS), folder)
    require_all([], len(ITEMS), folder)


def test_images_of_other_programs_are_found_by_their_number(tmp_path):
    samples = tmp_path / "00000" / "samples"
    samples.mkdir(parents=True)
    (samples / "0001.png").touch()
    (samples / "grid.png").touch()
    images = Images(tmp_path)
    assert images.find(ITEMS[1]) == samples / "0001.png"
    assert images.find(ITEMS[0]) is None
    assert images.find(ITEMS[4]) is None

    colors = tmp_path / "color" / "samples"
    colors.mkdir(parents=True)
    (colors / "a red cup_12.jpg").touch()
    item = Item(3, 0, 0, "color", "a red cup", {}, path="color/samples/a red cup_000012.png")
    assert images.find(item) == colors / "a red cup_12.jpg"
    assert images.find(Item(3, 0, 0, "color", "a red pen", {}, path="color/samples/a red pen_000012.png")) is None


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    item, exif = ITEMS[0], Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    path = item.image_path(tmp_path)
    path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    shapes = []

    class Shapes(Brightness):
        def __call__(self, images, items):
            shapes.extend(image.shape for image in images)
            return super().__call__(images, items)

    score_missing(Task(Shapes(), [item]), tmp_path)
    assert shapes == [(8, 4, 3)]


@pytest.mark.parametrize("text", ["3", "4/4", "-1/2", "a/b", "0/0"])
def test_a_wrong_shard_is_refused(text):
    with pytest.raises(ValueError, match="a shard is i/n"):
        Shard.parse(text)


def test_shards_cover_everything_once():
    parts = [Shard.parse(f"{i}/3").of(range(10)) for i in range(3)]
    assert parts[1] == [1, 4, 7]
    assert sorted(number for part in parts for number in part) == list(range(10))
