"""Calibration: the numbers by hand, units, a round trip through JSON, and clear words about what cannot be calibrated."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from diffalign.rewards.calibration import LEVELS, Calibration, MemberCalibration, calibrate, from_scores

PROMPTS = ["x", "x", "y", "y"]
SCORES = {"r": [1.0, 3.0, 5.0, 7.0]}


def test_by_hand():
    """Prompt means 2 and 6, variance 2 inside each: pooled within sqrt(2), between sqrt(8), over all sqrt(20 / 3)."""
    member = from_scores(SCORES, PROMPTS).members["r"]
    assert (member.mean, member.n, member.spec) == (4.0, 4, "r")
    assert member.std == pytest.approx(math.sqrt(20 / 3))
    assert member.within == pytest.approx(math.sqrt(2))
    assert member.between == pytest.approx(math.sqrt(8))
    assert member.quantiles[LEVELS.index(0.5)] == 4.0
    alone = from_scores(SCORES, ["a", "b", "c", "d"]).members["r"]
    assert (alone.within, alone.between) == (None, None)


def test_z_and_within():
    prompts = ["y", "x"]
    scores = torch.tensor([5.0, 5.0])
    z = from_scores(SCORES, PROMPTS).apply("r", scores, prompts)
    torch.testing.assert_close(z, torch.full((2,), 1 / math.sqrt(20 / 3)))
    within = from_scores(SCORES, PROMPTS, unit="within")
    torch.testing.assert_close(within.apply("r", scores, prompts), torch.tensor([-1.0, 3.0]) / math.sqrt(2))
    assert within.scale("r") == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="no base samples of the prompt 'unheard of', which unit 'within' needs"):
        within.apply("r", scores, ["x", "unheard of"])


def test_quantile_is_piecewise_linear_with_linear_tails():
    values = torch.linspace(0, 100, 101)
    calibration = from_scores({"r": values}, ["p"] * 101, unit="quantile")
    x = torch.tensor([1.0, 25.0, 50.0, 62.5, 99.0, 120.0, -10.0], requires_grad=True)
    y = calibration.apply("r", x, ["p"] * 7)
    torch.testing.assert_close(y, torch.tensor([0.01, 0.25, 0.5, 0.625, 0.99, 1.2, -0.1]), atol=1e-5, rtol=0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, torch.full((7,), 0.01), atol=1e-6, rtol=0)
    lumpy = from_scores({"r": [0.0] * 50 + [1.0] * 50}, ["p"] * 100, unit="quantile")  # quantiles that coincide
    assert lumpy.apply("r", torch.tensor([0.0, 0.5, 1.0, math.nan]), ["p"] * 4)[:3].isfinite().all()


def test_logit_comes_first():
    probabilities = torch.tensor([0.1, 0.5, 0.9, 0.999])
    calibration = from_scores({"v": probabilities}, PROMPTS, transforms={"v": "logit"})
    logits = torch.logit(probabilities.double())
    assert calibration.members["v"].mean == pytest.approx(logits.mean().item())
    z = calibration.apply("v", probabilities, PROMPTS)
    torch.testing.assert_close(z, ((logits - logits.mean()) / logits.std()).float())
    assert calibration.apply("v", torch.tensor([0.0, 1.0]), ["x", "y"]).isfinite().all()


@pytest.mark.parametrize("unit", ["z", "within", "quantile"])
def test_a_round_trip_changes_nothing(tmp_path, unit):
    calibration = from_scores({"r": torch.randn(12), "s": torch.rand(12)}, ["a", "b", "ü"] * 4, unit=unit, transforms={"s": "logit"})
    path = tmp_path / "calibration.json"
    calibration.save(path)
    again = Calibration.load(path)
    assert again == calibration
    assert again.digest == calibration.digest
    assert json.loads(path.read_text())["members"]["r"]["n"] == 12
    scores = torch.rand(3)
    assert torch.equal(again.apply("s", scores, ["a", "b", "ü"]), calibration.apply("s", scores, ["a", "b", "ü"]))
    assert from_scores({"r": torch.randn(12)}, ["a"] * 12).digest != calibration.digest


def test_scores_that_are_not_finite_are_left_out(caplog):
    member = from_scores({"r": [1.0, math.nan, 5.0, math.inf, 6.0]}, ["x"] * 5).members["r"]
    assert (member.n, member.mean) == (3, 4.0)
    assert "calibrated on 3 images" in caplog.text


class Mean:
    name, differentiable = "mean-of-image", True

    def prepare(self, prompts) -> None:
        self.prompts = list(prompts)

    def __call__(self, images, prompts):
        assert not torch.is_grad_enabled()
        return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])


def test_calibrate_scores_the_images_in_batches():
    images, prompts = torch.rand(7, 3, 4, 4), ["a", "bb", "ccc", "a", "bb", "ccc", "a"]
    calibration = calibrate({"m": Mean()}, images, prompts, batch_size=3, source="seven squares")
    expected = [float(image.mean()) + len(p) for image, p in zip(images, prompts, strict=True)]
    member = calibration.members["m"]
    assert (member.spec, member.n, calibration.source) == ("mean-of-image", 7, "seven squares")
    assert member.mean == pytest.approx(statistics.mean(expected))
    assert member.std == pytest.approx(statistics.stdev(expected))
    assert calibration.prompts == calibrate({"m": Mean()}, images.flip(0), prompts[::-1]).prompts  # the set, not the order


def test_identity():
    scores = torch.tensor([1.5, -2.0])
    assert torch.equal(Calibration.identity(["a"]).apply("a", scores, ["", ""]), scores)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_scores({"r": [1.0, math.nan]}, ["x", "x"]), "'r' has 1 finite scores of 2"),
        (lambda: from_scores({"r": [2.0, 2.0]}, ["x", "x"]), "'r' cannot be calibrated: it scores every base image alike"),
        (lambda: from_scores({"r": [1.0, 2.0]}, ["x"]), r"scores\['r'\] must hold one number for each of 1 prompts, got shape \(2,\)"),
        (lambda: from_scores({"r": [1.0, 2.0]}, ["x", "y"], transforms={"r": "logit"}), "'r' is no probability"),
        (lambda: from_scores({"r": [1.0, 2.0]}, ["x", "y"], unit="within"), "'r' has no spread within prompts"),
        (lambda: from_scores({"r": [1.0, 2.0]}, ["x", "y"], unit="std"), "unit must be one of z, within, quantile, got 'std'"),
        (lambda: from_scores(SCORES, PROMPTS).apply("s", torch.zeros(1), ["x"]), "does not know the reward 's'; it knows r"),
        (lambda: calibrate({"m": Mean()}, torch.zeros(2, 3, 4, 4), ["x"]), "equally many, got 2 and 1"),
        (
            lambda: Calibration({"r": MemberCalibration("r", 0, 1, 5, transform="log")}),
            "transform of reward 'r' must be one of none, logit",
        ),
        (lambda: Calibration({"r": MemberCalibration("r", 0, 1, 5)}, unit="quantile"), "holds 0 quantiles"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("text", ["[]", "{}", '{"members": {"r": {"mean": 0}}}', '{"members": {"r": {"color": 1}}}', "3"])
def test_files_that_are_no_calibration_are_named(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a calibration of rewards"):
        Calibration.load(path)


def test_files_that_are_no_json_or_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"members": ')
    with pytest.raises(ValueError, match=r"cut\.json is not valid JSON"):
        Calibration.load(tmp_path / "cut.json")
