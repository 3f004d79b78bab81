"""load_reward with rules: names, files and objects; what does not go together is refused before a model loads."""

from __future__ import annotations

import pytest
import torch

import diffalign
from diffalign.rewards import PCGrad, SoftMin
from diffalign.rewards.calibration import from_scores

PAIR = {"brightness": 1.0, "jpeg-incompressibility": 1.0}


@pytest.fixture
def calibration():
    return from_scores({"brightness": [0.2, 0.5, 0.6], "jpeg-incompressibility": [1.0, 2.0, 4.0]}, ["p"] * 3)


def test_a_rule_and_a_calibration_by_name_and_file(calibration, tmp_path):
    calibration.save(tmp_path / "c.json")
    images = torch.rand(2, 3, 16, 16)
    by_name = diffalign.load_reward(PAIR, rule="soft-min=0.1", calibration=tmp_path / "c.json", device="cpu")
    by_object = diffalign.load_reward(PAIR, rule=SoftMin(0.1), calibration=calibration, device="cpu")
    assert by_name.settings() == by_object.settings()
    total = by_name(images, ["p", "p"]).total
    assert torch.equal(total, by_object(images, ["p", "p"]).total)
    stored = by_name.settings()
    again = diffalign.load_reward(stored["members"], rule=stored["rule"], calibration=calibration, device="cpu")
    assert torch.equal(total, again(images, ["p", "p"]).total)


def test_a_gradient_rule():
    mix = diffalign.load_reward({"brightness": 1.0}, gradient="pcgrad", device="cpu")
    assert mix.gradient == PCGrad()
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(mix(x, ["p"]).total.sum(), x)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize(
    ("weight", "settings", "message"),
    [
        (1.0, {"rule": "worst-case"}, "needs a calibration"),
        (1.0, {"rule": "best-case"}, "unknown rule 'best-case'"),
        (2.0, {"gradient": "mgda"}, "the rule mgda reads only the signs of weights"),
        (1.0, {"calibration": from_scores({"brightness": [0.0, 1.0]}, ["p", "p"])}, "does not know the reward 'shapes-clip'"),
    ],
)
def test_refused_before_anything_loads(weight, settings, message, monkeypatch):
    from diffalign import reward_models

    monkeypatch.setattr(reward_models, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        diffalign.load_reward({"shapes-clip": weight, "brightness": 1.0}, **settings)
