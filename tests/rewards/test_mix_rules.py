"""RewardMix with a rule, a calibration and a gradient rule: what reaches the images, what a broken score does, samples apart, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffalign.methods.reno import ReNO
from diffalign.rewards import Calibration, RewardMix, SoftMin, UncertaintyWeighted, WorstCase
from diffalign.rewards.calibration import MemberCalibration, from_scores
from diffalign.rewards.combine import Constrained, uncertainty_weighted
from diffalign.types import NoiseProblem

RULES = ["weighted", "worst-case", "soft-min=0.2", "uncertainty=0.7", "geometric", Constrained({"g": 0.3})]
GRADIENTS = ["equal", "pcgrad", "mgda"]
PROMPTS = ["x", "x", "x", "x"]


class Power:
    """scale x mean over a channel of its pixels to a power: gradients differ between members and pixels."""

    differentiable = True

    def __init__(self, channel: int, power: int, scale: float = 1.0) -> None:
        self.name, self.channel, self.power, self.scale = f"power-{channel}-{power}", channel, power, scale

    def prepare(self, prompts: Sequence[str]) -> None: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * (images[:, self.channel] ** self.power).mean(dim=(1, 2))


class Breaking(Power):
    """Gives NaN, with a gradient of NaN, for every image whose first pixel is above 0.9."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().__call__(images, prompts) / torch.where(images[:, 0, 0, 0] > 0.9, math.nan, 1.0)


def members(breaking: bool = False) -> dict:
    return {"r": (Power(0, 2), 1.0), "g": ((Breaking if breaking else Power)(1, 3, 50.0), 1.0), "rb": (Power(0, 1, -2.0), 1.0)}


def calibration(spread: float = 1.0, unit: str = "z") -> Calibration:
    numbers = {"r": (0.3, 0.1), "g": (12.0, 4.0), "rb": (-1.0, 0.2)}
    names = {"r": "power-0-2", "g": "power-1-3", "rb": "power-0-1"}
    levels = [0.0] if unit != "quantile" else [-2.3, -1.6, -0.7, 0.0, 0.7, 1.6, 2.3]  # a normal distribution's at LEVELS
    return Calibration(
        {
            name: MemberCalibration(names[name], mean, spread * std, 500, quantiles=tuple(mean + std * level for level in levels))
            for name, (mean, std) in numbers.items()
        },
        unit,
    )


@pytest.fixture
def images() -> Tensor:
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 0.8
    return x.requires_grad_(True)


def test_the_rule_sees_calibrated_scores(images):
    mix = RewardMix(members(), rule=UncertaintyWeighted(0.7), calibration=calibration())
    scores = mix(images, PROMPTS)
    z = torch.stack([(scores.parts["r"] - 0.3) / 0.1, (scores.parts["g"] - 12) / 4, (scores.parts["rb"] + 1) / 0.2], dim=1)
    torch.testing.assert_close(scores.total, uncertainty_weighted(z, torch.ones(4, 3), 0.7))
    torch.testing.assert_close(torch.stack(list(mix.units(scores.parts, PROMPTS).values()), 1), z)
    assert torch.equal(mix.total({**scores.parts, "of another": scores.total}, PROMPTS), scores.total)
    torch.testing.assert_close(scores.parts["g"], Power(1, 3, 50.0)(images, PROMPTS))  # parts stay in their own units


def test_the_gradient_is_that_of_the_plain_formula(images):
    mix = RewardMix(members(), rule=WorstCase(), calibration=calibration())
    (gradient,) = torch.autograd.grad(mix(images, PROMPTS).total.sum(), images)
    z = [(Power(0, 2)(images, PROMPTS) - 0.3) / 0.1, (Power(1, 3, 50.0)(images, PROMPTS) - 12) / 4]
    z.append((Power(0, 1, -2.0)(images, PROMPTS) + 1) / 0.2)
    plain = torch.stack(z).min(dim=0).values.sum()
    (expected,) = torch.autograd.grad(plain, images)
    torch.testing.assert_close(gradient, expected)


def test_clipped_units(images):
    mix = RewardMix(members(), calibration=calibration(spread=0.01), clip=3.0)
    units = torch.stack(list(mix.units(mix(images, PROMPTS).parts, PROMPTS).values()))
    assert 3.5 < units.abs().max() <= 4.0


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_equals_its_samples_under_every_rule(images, rule):
    mix = RewardMix(members(), rule=rule, calibration=calibration())
    check_apart(mix, images)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_batch_equals_its_samples_under_every_gradient_rule(images, gradient):
    check_apart(RewardMix(members(), gradient=gradient, calibration=calibration()), images)
    check_apart(RewardMix(members(), gradient=gradient), images)


def check_apart(mix: RewardMix, images: Tensor) -> None:
    together = mix(images, PROMPTS).total
    (gradient,) = torch.autograd.grad(together.sum(), images)
    assert gradient.abs().flatten(1).amax(1).min() > 0
    for i in range(len(images)):
        one = images[i : i + 1].detach().requires_grad_(True)
        total = mix(one, PROMPTS[:1]).total
        torch.testing.assert_close(total[0], together[i])
        torch.testing.assert_close(torch.autograd.grad(total.sum(), one)[0][0], gradient[i])


# ---- gradient rules ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_gradient_rule_changes_the_gradient_and_not_the_value(images, gradient):
    plain = RewardMix(members(), calibration=calibration())
    ruled = RewardMix(members(), calibration=calibration(), gradient=gradient)
    a, b = plain(images, PROMPTS), ruled(images, PROMPTS)
    assert torch.equal(a.total, b.total)
    assert all(torch.equal(a.parts[name], b.parts[name]) for name in a.parts)
    ga, gb = (torch.autograd.grad(s.total.sum(), images)[0] for s in (a, b))
    assert (ga - gb).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(ruled(images, PROMPTS).total, a.total)


def test_equal_shares_whatever_the_units(images):
    """Without calibration a reward in large units decides the sum's gradient; equalised, each has its half."""
    mix = RewardMix({"r": (Power(0, 2), 1.0), "g": (Power(1, 3, 1e6), 1.0)}, gradient="equal")
    (gradient,) = torch.autograd.grad(mix(images, PROMPTS).total.sum(), images)
    sizes = gradient[:, :2].flatten(2).norm(dim=2)
    torch.testing.assert_close(sizes[:, 0], sizes[:, 1])
    (raw,) = torch.autograd.grad(RewardMix({"r": (Power(0, 2), 1.0), "g": (Power(1, 3, 1e6), 1.0)})(images, PROMPTS).total.sum(), images)
    assert (raw[:, 1].flatten(1).norm(dim=1) > 1e4 * raw[:, 0].flatten(1).norm(dim=1)).all()


def test_mgda_moves_so_that_no_member_falls(images):
    """r and rb pull the first channel opposite ways: their hull holds the origin, so nothing moves there."""
    mix = RewardMix({"r": (Power(0, 1), 1.0), "rb": (Power(0, 1, -1.0), 1.0)}, gradient="mgda")
    (gradient,) = torch.autograd.grad(mix(images, PROMPTS).total.sum(), images)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("settings", [{"gradient": "equal"}, {"gradient": "pcgrad"}, {"rule": "worst-case"}, {"rule": SoftMin(0.2)}])
def test_reno_climbs(settings):
    """ReNO as it is, on images that are the noise squashed; total and gradient come from the mix."""
    noise = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    mix = RewardMix({"r": (Power(0, 2), 1.0), "g": (Power(1, 1), 1.0)}, calibration=from_scores(
        {"r": [0.1, 0.4, 0.5], "g": [0.3, 0.5, 0.6]}, ["p"] * 3, specs={"r": "power-0-2", "g": "power-1-1"}), **settings)  # fmt: skip
    problem = NoiseProblem(noise, PROMPTS[:3], [0, 1, 2], lambda x, rows: x.sigmoid())
    trace = ReNO(mix, budget=12, lr=1 / 16).search(problem).trace
    for totals in trace.rewards["total"]:
        assert max(totals) > totals[0] + 0.3
    for name in ("r", "g"):
        assert all(series[best] > series[0] for series, best in zip(trace.rewards[name], trace.best, strict=True))


def test_a_member_without_gradient_is_named(images):
    class Flat(Power):
        def __call__(self, images, prompts):
            return super().__call__(images.detach(), prompts)

    with pytest.raises(TypeError, match="reward 'g' has no gradient, which the rule 'equal' combines"):
        RewardMix({"r": (Power(0, 2), 1.0), "g": (Flat(1, 2), 1.0)}, gradient="equal")(images, PROMPTS)


@pytest.mark.parametrize("numbers", [None, "calibrated"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_gradient_that_breaks_alone_leaves_the_score(images, gradient, numbers, caplog):
    """A finite score whose gradient is NaN, as sqrt has at zero: 0 x inf."""

    class Root(Power):
        def __call__(self, images, prompts):
            return super().__call__(images, prompts) + 0 * images[:, 2, 0, 0].sqrt()

    broken = images.detach().clone()
    broken[1, 2, 0, 0] = 0.0
    broken.requires_grad_(True)
    given = None if numbers is None else calibration()
    mix, whole = (RewardMix({**members(), "g": (kind(1, 3, 50.0), 1.0)}, gradient=gradient, calibration=given) for kind in (Root, Power))
    scores, expected = mix(broken, PROMPTS), whole(broken, PROMPTS)
    assert torch.equal(scores.total, expected.total)
    got, wanted = (torch.autograd.grad(s.total.sum(), broken)[0] for s in (scores, expected))
    torch.testing.assert_close(got[[0, 2, 3]], wanted[[0, 2, 3]])
    assert got[1].abs().max() == 0
    assert "sample 1 of 4" in caplog.text


# ---- scores that are not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"rule": rule} for rule in RULES[:5]] + [{"gradient": rule} for rule in GRADIENTS])
def test_a_broken_member_is_left_out_of_that_sample_alone(images, settings):
    broken = images.detach().clone()
    broken[2, 0, 0, 0] = 0.95
    broken.requires_grad_(True)
    numbers = calibration()
    scores = RewardMix(members(breaking=True), calibration=numbers, **settings)(broken, PROMPTS)
    assert scores.parts["g"].isnan().tolist() == [False, False, True, False]
    (gradient,) = torch.autograd.grad(scores.total.sum(), broken)
    assert gradient.isfinite().all()

    # the others' weights grow to the same sum: 1.5 each for two of three
    rest = {name: (model, 1.5) for name, (model, _) in members().items() if name != "g"}
    alone = broken[2:3].detach().requires_grad_(True)
    without = RewardMix(rest, calibration=numbers, **settings)(alone, PROMPTS[:1])
    torch.testing.assert_close(scores.total[2], without.total[0])
    torch.testing.assert_close(gradient[2], torch.autograd.grad(without.total.sum(), alone)[0][0])

    whole = RewardMix(members(), calibration=numbers, **settings)(broken, PROMPTS)
    keep = [0, 1, 3]
    assert torch.equal(scores.total[keep], whole.total[keep])


def test_a_required_member_invalidates_the_sample(images):
    broken = images.detach().clone()
    broken[2, 0, 0, 0] = 0.95
    total = RewardMix(members(breaking=True), calibration=calibration(), required=["g"])(broken, PROMPTS).total
    assert total.isnan().tolist() == [False, False, True, False]


def test_nothing_left(images):
    broken = images.detach().clone()
    broken[1, 0, 0, 0] = 0.95
    mix = RewardMix({"g": (Breaking(1, 3, 50.0), 1.0)}, calibration=calibration())
    assert mix(broken, PROMPTS).total.isnan().tolist() == [False, True, False, False]


def test_in_native_units_a_broken_member_breaks_the_total(images):
    broken = images.detach().clone()
    broken[1, 0, 0, 0] = 0.95
    assert RewardMix(members(breaking=True))(broken, PROMPTS).total.isnan().tolist() == [False, True, False, False]


# ---- settings -------------------------------------------------------------------------------------------------------------------


def test_constrained_by_name_is_the_rule_itself(images):
    by_name = RewardMix(members(), rule="constrained=g:0.3", calibration=calibration())
    itself = RewardMix(members(), rule=Constrained({"g": 0.3}), calibration=calibration())
    assert torch.equal(by_name(images, PROMPTS).total, itself(images, PROMPTS).total)
    assert by_name.settings() == itself.settings()
    with pytest.raises(ValueError, match="floors names 'z', which is no member"):
        RewardMix(members(), rule="constrained=z:0", calibration=calibration())


@pytest.mark.parametrize(
    "extra", [{}, {"rule": "constrained=g:0.3"}, {"rule": "soft-min=0.2", "clip": 3.0, "required": ["r"]}, {"gradient": "pcgrad"}]
)
def test_settings_are_json_and_make_the_mix_again(images, extra):
    mix = RewardMix(members(), {"b": Power(2, 1)}, calibration=calibration(), **extra)
    stored = json.loads(json.dumps(mix.settings()))
    assert stored["members"] == {"r": 1.0, "g": 1.0, "rb": 1.0}
    assert stored["watched"] == ["b"]
    again = RewardMix(
        members(),
        {"b": Power(2, 1)},
        stored["rule"],
        Calibration.from_json(stored["calibration"]),
        gradient=stored["gradient"],
        required=stored["required"],
        clip=stored["clip"],
    )
    assert torch.equal(again(images, PROMPTS).total, mix(images, PROMPTS).total)
    assert again.settings() == mix.settings()
    assert RewardMix(members()).settings()["calibration"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "worst-case"}, "rule 'worst-case' compares the members with one another, so it needs a calibration"),
        ({"rule": "uncertainty"}, r"diffalign calibrate.*Calibration\.identity"),
        ({"clip": 3.0}, "clip is about calibrated scores"),
        (
            {"clip": 3.0, "calibration": calibration(unit="quantile")},
            "clip is in standard deviations, got 3.0 with unit 'quantile'.*leave clip out",
        ),
        ({"required": ["r"]}, "required is about calibrated scores"),
        ({"required": ["z"], "calibration": calibration()}, "required names 'z', which is no member"),
        ({"gradient": "equal", "rule": "worst-case", "calibration": calibration()}, "take one of the two"),
        ({"calibration": Calibration.identity(["r", "g"])}, "the calibration does not know the reward 'rb'"),
        (
            {"calibration": from_scores({n: [0.0, 1.0] for n in ("r", "g", "rb")}, ["p", "p"], specs={"g": "hpsv2"})},
            "calibration of 'r' was measured with the reward model 'r', but 'power-0-2' is given",
        ),
    ],
)
def test_mixes_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardMix(members(), **settings)


def test_an_explicit_identity_is_taken_at_its_word(images):
    mix = RewardMix(members(), rule=WorstCase(), calibration=Calibration.identity(members()))
    scores = mix(images, PROMPTS)
    torch.testing.assert_close(scores.total, torch.stack(list(scores.parts.values())).amin(0))


def test_unequal_weights_are_refused_where_they_would_be_ignored():
    with pytest.raises(ValueError, match="the rule worst-case reads only the signs of weights"):
        RewardMix({"r": (Power(0, 2), 1.0), "g": (Power(1, 3, 50.0), 2.0)}, rule="worst-case", calibration=calibration())
    with pytest.raises(ValueError, match="the rule mgda reads only the signs of weights"):
        RewardMix({"r": (Power(0, 2), 1.0), "g": (Power(1, 3, 50.0), 2.0)}, gradient="mgda")
