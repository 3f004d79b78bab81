"""GenEval's judge as a reward: prompts are parsed, scores are the rules', and the hub knows the two names."""

import numpy as np
import pytest
import torch

from diffalign.benchmarks.geneval.detector_reward import NAMES, DetectorReward
from diffalign.benchmarks.geneval.prompts import metadata, parse
from diffalign.hub import load_reward, reward_specs
from diffalign.rules import Detection
from tests.benchmarks.tiny_clip import tiny_clip
from tests.benchmarks.tiny_mask2former import mmdet_layout, tiny_mask2former

RED, BLUE = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])


class Brightest:
    """Sees as many dogs as the first pixel's blue value says."""

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append(len(images))
        return [{"dog": [Detection((0.0, 0.0, 50.0, 50.0), 0.95 - i / 100) for i in range(int(image[0, 0, 2]))]} for image in images]


def reward(name="detector", color="red", **more):
    return DetectorReward(Brightest(), lambda _image, _name, objects: [color] * len(objects), name, **more)


def images(*dogs):
    out = torch.zeros(len(dogs), 3, 8, 8)
    out[:, 2] = torch.tensor(dogs)[:, None, None] / 255
    return out


def test_the_two_rewards_by_hand():
    """Two dogs asked for: of 0, 2, 3 seen only 2 is right; partial credit is 1 - |2 - n| / 2."""
    prompts = ["a photo of two dogs"] * 3
    assert reward()(images(0, 2, 3), prompts).tolist() == [0.0, 1.0, 0.0]
    assert reward("detector-partial")(images(0, 2, 3), prompts).tolist() == [0.0, 1.0, 0.5]
    # One red dog, five blue ones seen: the count alone gives 1 - 4 = -3, the colour 0 since the count is wrong.
    assert reward("detector-partial", "blue")(images(5), ["a photo of a red dog"]).tolist() == [-1.5]
    assert reward("detector", "red")(images(5), ["a photo of a red dog"]).tolist() == [1.0]  # the most confident one is red


def test_images_are_judged_in_batches_and_each_for_itself():
    many = reward("detector-partial")
    scores = many(images(*range(20)), ["a photo of three dogs"] * 20)
    assert many.detector.batches == [8, 8, 4]
    assert scores.tolist() == [reward("detector-partial")(images(n), ["a photo of three dogs"]).item() for n in range(20)]


def test_rows_of_ones_own():
    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    own = reward(metadata={"ein Hund": row})
    own.prepare(["ein Hund", "a photo of a dog"])
    assert own(images(1), ["ein Hund"]).tolist() == [1.0]
    with pytest.raises(ValueError, match="GenEval's rules cannot judge 'ein Vogel'"):
        own.prepare(["ein Vogel"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1, 3, 8, 8), ["a photo of a dog"] * 2), ValueError, "b prompts"),
        ((torch.zeros(3, 8, 8), ["a photo of a dog"]), ValueError, "takes images"),
        ((torch.full((1, 3, 8, 8), torch.nan), ["a photo of a dog"]), ValueError, "not finite"),
        ((torch.zeros(1, 3, 8, 8, requires_grad=True), ["a photo of a dog"]), TypeError, "has no gradient"),
        ((torch.zeros(1, 3, 8, 8), [""]), ValueError, "cannot judge ''"),
    ],
)
def test_what_cannot_be_scored_is_said(arguments, error, message):
    with pytest.raises(error, match=message):
        reward()(*arguments)


def test_there_are_two_names():
    with pytest.raises(ValueError, match="must be one of detector, detector-partial"):
        reward("judge")


# --- the prompts --------------------------------------------------------------------------------------------------------------


def test_every_prompt_of_the_release_parses_to_its_own_row():
    rows = metadata()
    assert [parse(row["prompt"]) for row in rows] == rows


@pytest.mark.parametrize(
    ("prompt", "tag", "include"),
    [
        ("a photo of an orange", "single_object", [{"class": "orange", "count": 1}]),
        ("a photo of an orange orange", "colors", [{"class": "orange", "count": 1, "color": "orange"}]),
        ("a photo of an orange and an orange dog", None, None),  # one colour for two things is no prompt of GenEval
        ("a photo of a hot dog and a dog", "two_object", [{"class": "hot dog", "count": 1}, {"class": "dog", "count": 1}]),
        ("  A photo of a RED bench. ", "colors", [{"class": "bench", "count": 1, "color": "red"}]),
        ("a photo of two skises", "counting", [{"class": "skis", "count": 2}]),
        (
            "a photo of an tv remote above a computer mouse",
            "position",
            [{"class": "computer mouse", "count": 1}, {"class": "tv remote", "count": 1, "position": ["above", 0]}],
        ),
        ("a photo of five dogs", None, None),
        ("a red dog", None, None),
        ("a photo of a grey dog", None, None),
        ("a photo of a dog\u2028and a cat\U0001f408", None, None),
        ("a photo of a dog" * 700, None, None),
    ],
)
def test_parsing(prompt, tag, include):
    if tag is None:
        with pytest.raises(ValueError, match="GenEval's rules cannot judge"):
            parse(prompt)
    else:
        row = parse(prompt)
        assert (row["tag"], row["include"], row["prompt"]) == (tag, include, prompt)
        assert ("exclude" in row) == (tag == "counting")


# --- by name ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    for part in tiny_clip():
        part.save_pretrained(folder / "clip")
    torch.save({"state_dict": mmdet_layout(tiny_mask2former(classes=80))}, folder / "detector.pth")
    return {"detector": folder / "detector.pth", "clip": folder / "clip"}


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_loads_both_by_name(name, sources, monkeypatch):
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.SHORT_SIDE", 64)  # 800 pixels are for the real detector
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.LONG_SIDE", 107)
    mix = load_reward({name: 2.0, "brightness": 1.0}, sources={name: sources}, device="cpu")
    assert not mix.differentiable
    noise = torch.from_numpy(np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32))
    scores = mix(noise, ["a photo of a dog", "a photo of two cats"])
    spec = reward_specs()[name]
    assert all(spec.range[0] <= value <= spec.range[1] for value in scores.parts[name].tolist())
    assert torch.allclose(scores.total, 2 * scores.parts[name] + scores.parts["brightness"])


def test_parts_that_there_are_not_and_weights_that_are_not_there(sources):
    with pytest.raises(ValueError, match="has the parts detector and clip, not judge"):
        load_reward("detector", sources={"detector": {"judge": "x"}}, device="cpu")
    with pytest.raises(FileNotFoundError, match="download it from"):
        load_reward("detector", sources={"detector": "nowhere.pth"}, device="cpu")


def test_the_table_of_all_rewards_has_both_and_no_judge_of_the_shapes_world():
    specs = reward_specs()
    assert {"detector", "detector-partial", "shapes-clip"} <= set(specs)
    assert not specs["detector"].differentiable
    assert not [name for name, spec in specs.items() if "shapes.detector" in spec.target]
