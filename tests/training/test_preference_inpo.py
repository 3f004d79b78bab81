"""DDIM-InPO's inversion: it lands on t, retraces the sampler, treats each sample alone; and the public code's grid, as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffalign.diffusion import add_noise, ddim_std, to_eps
from diffalign.noise import spread
from diffalign.training.denoising import forward_noise, in_one_batch
from diffalign.training.objectives.inpo import InPO, grid
from diffalign.training.objectives.preference import DPO, score_weights
from tests.training.preference_toy import frozen, pairs, real, real_pairs, seeded, toy, train

PREDICTIONS = ("epsilon", "v_prediction", "flow")


def samples_at(network, *timesteps, captions=True):
    """A pair for each t, as one batch."""
    t = torch.tensor([float(each) for each in timesteps])
    base = in_one_batch(pairs(len(t), captions=captions), network.backbone, seeded())
    signal, noise = network.backbone.levels(t)
    return replace(base, timesteps=t.repeat(2), signal=signal.repeat(2), noise=noise.repeat(2))


def rows(samples, chosen):
    return replace(samples, clean=samples.clean[chosen], conditioning=samples.conditioning.rows(chosen),
                   timesteps=samples.timesteps[chosen], signal=samples.signal[chosen], noise=samples.noise[chosen])  # fmt: skip


# ---- where it lands --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_state_lies_at_t_and_tau_gives_the_image_back(prediction):
    network = toy(prediction)
    samples = samples_at(network, 1, 20, 333, 999)
    for setting in (InPO(), InPO(stride=100.0), InPO(steps=1), InPO(renoise=True), InPO(injection=0.1)):
        x, tau = setting.states(network, network, samples, seeded())
        signal, noise = spread(samples.signal, x), spread(samples.noise, x)
        torch.testing.assert_close((x - noise * tau) / signal, samples.clean, rtol=0, atol=1e-4 if prediction == "flow" else 1e-5)
    assert torch.isfinite(tau).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_tau_is_the_mean_of_the_networks_noise_along_the_path(prediction):
    """Identity A.2: tau = sum_i (sigma_{i+1} - sigma_i) eps_i / sigma_t, sigma = s / a, by an Euler loop written apart from ours."""
    network = toy(prediction)
    samples = samples_at(network, 50, 400, 900)
    x, tau = InPO(steps=7).states(network, network, samples, seeded())
    total, sigma, state = torch.zeros_like(x), torch.zeros(6), samples.clean
    for i in range(7):
        t = samples.timesteps * i / 7
        signal, noise = network.backbone.levels(t)
        eps = to_eps(state, network(state, t, samples.conditioning), signal, noise, prediction)
        signal, noise = network.backbone.levels(samples.timesteps * (i + 1) / 7)
        total, sigma = total + spread(noise / signal - sigma, x) * eps, noise / signal
        state = spread(signal, x) * (samples.clean + total)
    torch.testing.assert_close(tau, total / spread(sigma, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_more_steps_lead_back_more_closely(prediction):
    """Invert with K steps, then sample back with as many: what is found again comes closer to the image as K grows."""
    network = toy(prediction)
    samples = samples_at(network, 600, 900)
    lost = []
    for steps in (4, 16, 64):
        x, _ = InPO(steps=steps).states(network, network, samples, seeded())
        for i in reversed(range(steps)):
            t, after = samples.timesteps * (i + 1) / steps, samples.timesteps * i / steps
            signal, noise = network.backbone.levels(t)
            eps = to_eps(x, network(x, t, samples.conditioning), signal, noise, prediction)
            clean = (x - spread(noise, x) * eps) / spread(signal, x)
            signal, noise = network.backbone.levels(after) if i else (torch.ones(4), torch.zeros(4))
            x = spread(signal, x) * clean + spread(noise, x) * eps
        lost.append((x - samples.clean).square().mean().item())
    assert lost[0] > 2 * lost[1] > 4 * lost[2]


# ---- each on its own ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [InPO(), InPO(stride=100.0), InPO(landing="grid"), InPO(stride=130.0, renoise=True)])
def test_a_batch_of_mixed_times_equals_each_alone(setting):
    network = toy("v_prediction")
    samples = samples_at(network, 0, 5, 101, 450, 998)
    x, tau = setting.states(network, network, samples, seeded())
    for chosen in ([0], [1], [2], [3], [4], [9], [7, 1, 3]):
        alone, noise = setting.states(network, network, rows(samples, chosen), seeded())
        torch.testing.assert_close(alone, x[chosen])
        torch.testing.assert_close(noise, tau[chosen], rtol=1e-4, atol=1e-5)


def test_samples_that_have_arrived_cost_nothing():
    network = toy()
    samples = samples_at(network, 50, 450, 998)
    InPO(stride=100.0).states(network, network, samples, seeded())
    assert [len(call) for call in network.backbone.calls] == [6, 4, 4, 4, 4, 2, 2, 2, 2, 2]
    network.backbone.calls.clear()
    InPO().states(network, network, samples, seeded())
    assert [len(call) for call in network.backbone.calls] == [6] * 10


def test_who_inverts():
    """By the policy, or by the reference, whose states do not follow the policy; neither keeps a graph."""
    policy, reference, other = toy(gain=1.2), toy(), toy(gain=0.7)
    samples = samples_at(policy, 300, 700)
    for setting, same in ((InPO(), False), (InPO(invert_with="reference"), True)):
        x, tau = setting.states(policy, reference, samples, seeded())
        again, _ = setting.states(other, reference, samples, seeded())
        assert not x.requires_grad
        assert not tau.requires_grad
        assert torch.equal(x, again) == same


def test_each_image_is_inverted_under_its_own_caption():
    """Winners at the number of their caption are in the middle of what the network knows there, so tau averages to nothing."""
    network = toy("flow", width=0.3)
    _, own = InPO().states(network, network, samples_at(network, *[800] * 40), seeded())
    _, foreign = InPO().states(network, network, samples_at(network, *[800] * 40, captions=False), seeded())
    assert own.mean().abs() < 0.15
    winners, losers = foreign.chunk(2)
    assert winners.mean() > 1
    assert losers.mean() < -1


# ---- the public code's way -----------------------------------------------------------------------------------------------------------


def test_the_grid_costs_what_it_did():
    """1 to 10 evaluations, 6.38 of them on average, and an end up to 99 timesteps beside t."""
    t = torch.arange(1000.0)
    path = grid(t)
    assert path[:, 450].tolist() == [-99, 1, 101, 201, 301, 401, 501, 501, 501, 501, 501]
    counts = (path[1:] > path[:-1]).sum(0)
    assert (counts.min(), counts.max()) == (1, 10)
    assert counts.float().mean().item() == pytest.approx(6.382)
    assert ((path[-1] - t).min(), (path[-1] - t).max()) == (-98, 99)


def test_the_grid_leaves_the_image_in_tau_at_small_t():
    """At t = 5 the state is that of t = 101 and far too noisy; with exact landing tau is of unit size."""
    network = toy()
    samples = samples_at(network, 5, 850)
    exact, rough = (InPO(landing=each).states(network, network, samples, seeded())[1].flatten(1).norm(dim=1) for each in ("exact", "grid"))
    assert (rough / exact)[[0, 2]].min() > 2
    assert (rough / exact)[[1, 3]].max() < 1.5


def test_the_grid_is_not_for_flow():
    network = toy("flow")
    with pytest.raises(ValueError, match="landing='grid'"):
        InPO.paper().states(network, network, samples_at(network, 5), seeded())


def test_injected_noise_is_that_of_the_way_back():
    """Of a network that predicts no noise, the state at the end differs by the last step's draw alone: injection times DDPM's std."""
    network = toy()
    network.backbone.denoise = lambda x, t, c, w=1.0: torch.zeros_like(x)
    samples = samples_at(network, *[400] * 300)
    setting = InPO(steps=2, injection=0.5)
    difference = (
        setting.states(network, network, samples, seeded())[0]
        - replace(setting, injection=0.0).states(network, network, samples, seeded())[0]
    )
    low, high = (tuple(float(each) for each in network.backbone.levels(torch.tensor([t]))) for t in (200.0, 400.0))
    assert difference.std().item() == pytest.approx(0.5 * ddim_std(*high, *low, 1.0), rel=0.03)


# ---- in the kernel -------------------------------------------------------------------------------------------------------------------


def test_with_noise_as_states_it_is_dpo():
    policy, reference = toy(gain=1.1), toy()
    plain, _ = DPO(beta=5).loss(policy, reference, pairs(), seeded())
    other, _ = InPO(DPO(beta=5)).preference.compare(policy, reference, pairs(), seeded(), forward_noise)
    assert plain.item() == other.item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_learns_what_is_preferred(prediction):
    """Held out: the winner's error fell against the reference's by more than the loser's in nine pairs of ten."""
    policy = toy(prediction)
    before = frozen(policy)
    objective = InPO(DPO(beta=5), steps=5)
    losses = train(objective, policy, (pairs(8, seed=100 + step) for step in range(30)))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert policy.backbone.gain > 1.1
    assert objective.loss(policy, before, pairs(200, seed=1), seeded(99))[1]["implicit_accuracy"] > 0.9


def test_smpo_follows_its_judge():
    """Pairs that are labelled the wrong way round, with a judge who knows better."""
    policy = toy()
    wrong = [pairs(8, seed=100 + step, winner=1.0, loser=3.0) for step in range(20)]
    judged = [replace(b, weights=score_weights(b.winners.mean((1, 2, 3)), b.losers.mean((1, 2, 3)), scale=1.0, gamma=1.0)) for b in wrong]
    train(InPO(DPO(beta=5, weights_on="logit"), renoise=True, steps=3), policy, judged)
    assert policy.backbone.gain > 1.05


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_of_tiny_networks(prediction):
    """Real levels: lands on t, for t = 0 too (flow: 1), and the embedding takes times between whole ones."""
    network, _ = real(prediction)
    batch = real_pairs(network)
    base = in_one_batch(batch, network.backbone, seeded())
    t = torch.tensor([1.0 if prediction == "flow" else 0.0, 777.0])
    signal, noise = network.backbone.levels(t)
    samples = replace(base, timesteps=t.repeat(2), signal=signal.repeat(2), noise=noise.repeat(2))
    x, tau = InPO(steps=3).states(network, network, samples, seeded())
    assert torch.isfinite(tau).all()
    torch.testing.assert_close(x, add_noise(samples.clean, tau, samples.signal, samples.noise))
    if prediction != "flow":
        x, tau = InPO.paper().states(network, network, samples, seeded())
        torch.testing.assert_close(x, add_noise(samples.clean, tau, samples.signal, samples.noise), rtol=1e-4, atol=1e-4)


def test_settings_are_checked():
    for name, value in {"steps": 0, "stride": 0.0, "injection": 1.0, "invert_with": "ema", "landing": "near"}.items():
        with pytest.raises(ValueError, match=name):
            InPO(**{name: value})
    assert InPO.paper().settings()["landing"] == "grid"
