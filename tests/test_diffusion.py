"""The algebra of diffusion against formulas worked by hand, torch.distributions and diffusers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.diffusion import (
    DDIM,
    PREDICTIONS,
    FlowSDE,
    Renoise,
    Schedule,
    add_noise,
    ddim_std,
    flow_sde_step,
    from_x0,
    from_x0_and_eps,
    log_prob,
    to_eps,
    to_x0,
)
from diffalign.pipelines.schedule import schedule_of, with_timesteps

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (3, 2, 4, 4), generator=torch.Generator().manual_seed(seed))


def level(prediction: str, s: float) -> tuple[float, float]:
    return (1 - s, s) if prediction == "flow" else (math.sqrt(1 - s * s), s)


# ---- conversions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("s", [0.1, 0.6, 0.95])
def test_what_a_network_is_trained_on_means_the_pair_it_was_made_of(prediction, s):
    x0, eps, (a, s) = draw(0), draw(1), level(prediction, s)
    x = add_noise(x0, eps, a, s)
    output = from_x0_and_eps(x0, eps, a, s, prediction)
    torch.testing.assert_close(to_x0(x, output, a, s, prediction), x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(to_eps(x, output, a, s, prediction), eps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(from_x0(x, x0, a, s, prediction), output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_levels_may_differ_between_samples(prediction):
    x0, eps = draw(0), draw(1)
    pairs = [level(prediction, s) for s in (0.2, 0.5, 0.9)]
    a, s = (torch.tensor(values) for values in zip(*pairs, strict=True))
    x, output = add_noise(x0, eps, a, s), from_x0_and_eps(x0, eps, a, s, prediction)
    for i, (a_i, s_i) in enumerate(pairs):
        one = slice(i, i + 1)
        assert torch.equal(x[one], add_noise(x0[one], eps[one], a_i, s_i))
        torch.testing.assert_close(to_x0(x, output, a, s, prediction)[one], to_x0(x[one], output[one], a_i, s_i, prediction))


def test_half_precision_is_computed_in_float32():
    x, output = draw(0).bfloat16(), draw(1).bfloat16()
    assert to_x0(x, output, 0.8, 0.6, "epsilon").dtype == torch.float32
    assert torch.equal(to_x0(x, output, 0.8, 0.6, "v_prediction"), 0.8 * x.float() - 0.6 * output.float())


# ---- steps -------------------------------------------------------------------------------------------------------------------


def schedule(prediction: str = "epsilon", steps: int = 5) -> Schedule:
    if prediction == "flow":
        return schedule_of(with_timesteps(FlowMatchEulerDiscreteScheduler(shift=3.0), steps))
    return schedule_of(with_timesteps(DDIMScheduler(**BETAS, timestep_spacing="trailing", prediction_type=prediction), steps))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("i", [0, 2, 3])
def test_ddim_has_the_mean_and_the_spread_of_the_paper(eta, i):
    """Equations 12 and 16 of 2010.02502 with cumulative alphas, and diffusers' own step with its noise taken out."""
    scheduler = with_timesteps(DDIMScheduler(**BETAS, timestep_spacing="trailing"), 5)
    plan, x, output = schedule_of(scheduler), draw(0), draw(1)
    step = DDIM(eta).step(plan, i, x, output)
    t, previous = int(plan.timesteps[i]), int(plan.timesteps[i + 1])
    now, then = (scheduler.alphas_cumprod[k].item() for k in (t, previous))
    std = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
    x0 = (x - math.sqrt(1 - now) * output) / math.sqrt(now)
    mean = math.sqrt(then) * x0 + math.sqrt(1 - then - std**2) * output
    assert step.std == pytest.approx(std, rel=1e-5, abs=1e-9)
    torch.testing.assert_close(step.mean, mean, atol=1e-4, rtol=1e-4)
    noise = draw(2)
    theirs = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
    torch.testing.assert_close(step.mean + step.std * noise, theirs, atol=1e-4, rtol=1e-4)


def test_the_last_step_ends_at_the_prediction():
    for prediction in PREDICTIONS:
        plan, x, output = schedule(prediction), draw(0), draw(1)
        for sampler in (DDIM(), DDIM(1.0), Renoise()):
            step = sampler.step(plan, plan.steps - 1, x, output)
            assert step.std == 0
            torch.testing.assert_close(step.mean, step.x0)


def test_eta_one_is_the_posterior():
    """By Bayes: x' given x and x0 is normal with variance s'^2 (1 - (a s' / a' s)^2), for VP and flow levels alike."""
    for a, s, a2, s2 in ((0.6, 0.8, 0.8, 0.6), (0.3, 0.7, 0.6, 0.4)):
        ratio = a / a2
        forward = s**2 - ratio**2 * s2**2  # the variance that x adds to ratio x'
        precision = 1 / s2**2 + ratio**2 / forward
        assert ddim_std(a, s, a2, s2, 1.0) == pytest.approx(precision**-0.5)


def test_epsilon_velocity_and_sample_take_the_same_step():
    """One denoiser, told in three languages, on the same schedule."""
    plan, x, x0 = schedule(), draw(0), draw(1)
    for sampler in (DDIM(), DDIM(0.7), Renoise()):
        steps = []
        for prediction in ("epsilon", "v_prediction", "sample"):
            told = Schedule(plan.timesteps, plan.signal, plan.noise, prediction)
            output = from_x0(x, x0, plan.signal[2], plan.noise[2], prediction)
            steps.append(sampler.step(told, 2, x, output))
        for step in steps[1:]:
            torch.testing.assert_close(step.mean, steps[0].mean, atol=1e-4, rtol=1e-4)
            assert step.std == steps[0].std


def test_a_flow_takes_the_step_of_the_same_denoiser_at_the_same_ratio_of_noise_to_signal():
    """A VP state scaled by 1 / (a + s) is a flow state; DDIM commutes with that scaling, for every eta."""
    for eta in (0.0, 0.5, 1.0):
        vp = Schedule((1.0,), (0.6, 0.8), (0.8, 0.6), "epsilon")
        total = [a + s for a, s in zip(vp.signal, vp.noise, strict=True)]
        flow = Schedule((1.0,), tuple(a / c for a, c in zip(vp.signal, total, strict=True)),
                        tuple(s / c for s, c in zip(vp.noise, total, strict=True)), "flow")  # fmt: skip
        x, x0 = draw(0), draw(1)
        there = DDIM(eta).step(vp, 0, x, from_x0(x, x0, 0.6, 0.8, "epsilon"))
        scaled = x / total[0]
        here = DDIM(eta).step(flow, 0, scaled, from_x0(scaled, x0, flow.signal[0], flow.noise[0], "flow"))
        torch.testing.assert_close(here.mean * total[1], there.mean, atol=1e-5, rtol=1e-5)
        assert here.std * total[1] == pytest.approx(there.std)


def test_ddim_on_a_flow_is_eulers_method():
    plan, x, velocity = schedule("flow"), draw(0), draw(1)
    scheduler = with_timesteps(FlowMatchEulerDiscreteScheduler(shift=3.0), 5)
    theirs = scheduler.step(velocity, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(DDIM().step(plan, 0, x, velocity).mean, theirs, atol=1e-5, rtol=1e-5)


def test_the_flow_sde_by_hand():
    """s = 0.6, s' = 0.5, a = 0.7: g^2 = 0.49 x 1.5 = 0.735, dt = -0.1; for x = 2, v = 1: mean 2 - 0.1 (1 + 0.6125 x 2.4)."""
    mean, std = flow_sde_step(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.6, 0.5, 0.7)
    assert mean.item() == pytest.approx(2 - 0.1 * (1 + 0.6125 * 2.4))
    assert std == pytest.approx(math.sqrt(0.0735))
    mean, std = flow_sde_step(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 1.0, 0.8, 0.7)  # s = 1: the root takes s'
    assert std == pytest.approx(0.7 * math.sqrt(1 / 0.2) * math.sqrt(0.2))
    assert mean.item() == pytest.approx(2 - 0.2 * (1 + 0.49 * 5 / 2 * 2))


def test_the_flow_sde_keeps_the_marginals():
    """Data at one point: many small stochastic steps end with the mean and the variance of the flow's own marginal."""
    generator, target = torch.Generator().manual_seed(0), 1.5
    grid = torch.linspace(0.9, 0.4, 401).tolist()
    x = (1 - grid[0]) * target + grid[0] * torch.randn(20_000, 1, generator=generator)
    for s, after in itertools.pairwise(grid):
        mean, std = flow_sde_step(x, (x - target) / s, s, after, 0.7)  # v = eps - x0 = (x - x0) / s
        x = mean + std * torch.randn(x.shape, generator=generator)
    assert x.mean().item() == pytest.approx(0.6 * target, abs=0.02)
    assert x.std().item() == pytest.approx(0.4, abs=0.02)


def test_small_flow_sde_needs_a_flow():
    with pytest.raises(ValueError, match="predicts epsilon"):
        FlowSDE().step(schedule(), 0, draw(0), draw(1))


# ---- log-probabilities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_log_prob_is_that_of_torch_distributions(prediction):
    plan, x, output = schedule(prediction), draw(0), draw(1)
    samplers = [DDIM(0.5), DDIM(1.0)] + ([FlowSDE()] if prediction == "flow" else [])
    for sampler in samplers:
        step = sampler.step(plan, 2, x, output)
        after = step.mean + step.std * draw(2)
        expected = torch.distributions.Normal(step.mean, step.std).log_prob(after).flatten(1).sum(1)
        torch.testing.assert_close(log_prob(after, step.mean, step.std), expected, rtol=1e-5, atol=1e-3)


def test_log_prob_takes_a_spread_for_each_sample():
    x, mean, std = draw(0), draw(1), torch.tensor([0.1, 1.0, 2.0])
    each = torch.cat([log_prob(x[i : i + 1], mean[i : i + 1], std[i].item()) for i in range(3)])
    torch.testing.assert_close(log_prob(x, mean, std), each)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, torch.tensor([1.0, 0.0, 1.0])])
def test_a_deterministic_step_has_no_log_prob(std):
    with pytest.raises(ValueError, match="no log-probability"):
        log_prob(draw(0), draw(1), std)


# ---- schedules ---------------------------------------------------------------------------------------------------------------


def test_bad_schedules_are_named():
    with pytest.raises(ValueError, match="prediction must be one of"):
        Schedule((1.0,), (0.0, 1.0), (1.0, 0.0), "score")
    with pytest.raises(ValueError, match="needs 3 signals and noises, got 2 and 3"):
        Schedule((2.0, 1.0), (0.0, 1.0), (1.0, 0.5, 0.0), "flow")
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 1.5"):
        DDIM(1.5)


def test_levels_descend_to_the_image():
    for prediction in PREDICTIONS:
        plan = schedule(prediction, 7)
        assert plan.steps == 7
        assert list(plan.noise) == sorted(plan.noise, reverse=True)
        assert plan.noise[-1] == 0
        assert plan.signal[-1] == 1
        for a, s in zip(plan.signal, plan.noise, strict=True):
            assert (a + s if prediction == "flow" else a * a + s * s) == pytest.approx(1, abs=1e-6)
