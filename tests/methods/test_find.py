"""FIND on linear rewards, where the best distribution is known: what it learns, from which pairs, and how far it goes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from diffalign.methods.find import FIND, Drawing
from diffalign.noise import NoiseDistribution, seeded_noise
from diffalign.types import NoiseProblem, RewardScores

D = 256


class Linear:
    """r = <image, w> with unit w, and the image shows the noise: rewards of N(0, I) are N(0, 1)."""

    differentiable = False

    def __init__(self, seed: int = 0) -> None:
        w = torch.randn(D, generator=torch.Generator().manual_seed(1000 + seed))
        self.w = w / w.norm()
        self.scored = 0

    def prepare(self, prompts) -> None:
        pass

    def __call__(self, images, prompts) -> RewardScores:
        assert not images.requires_grad
        self.scored += len(images)
        total = images[:, 0, 0] @ self.w
        return RewardScores(total, {"linear": total})


def show(noise, rows):
    """Noise "k d" as an image "k 3 1 d"."""
    return noise[:, None, None, :].expand(-1, 3, 1, -1)


def problem(*seeds: int, generate=show) -> NoiseProblem:
    return NoiseProblem(seeded_noise((D,), seeds, 0), ["p"] * len(seeds), list(seeds), generate)


def gain(distribution: NoiseDistribution, reward: Linear) -> torch.Tensor:
    """The expected reward of each sample's distribution; 0 for N(0, I)."""
    return distribution.mean @ reward.w


def test_it_learns_the_direction_of_the_reward():
    gains = []
    for seed in range(6):
        reward = Linear(seed)
        out = FIND(reward, budget=160).search(problem(seed))
        gains.append(gain(out.distribution, reward).item())
        assert reward.scored == 160
        assert len(out.trace.rewards["total"][0]) == 160
    assert min(gains) > 0.5
    assert sum(gains) / 6 > 1.5


def test_the_papers_setting_learns_a_little():
    """Small steps: 150 of 0.001 move mu by at most 0.15 an entry; the gain is small, positive, and of the size of cos sqrt(D) rms(mu)."""
    gains = []
    for seed in range(8):
        reward = Linear(seed)
        out = FIND.paper(reward, budget=150).search(problem(seed))
        gains.append(gain(out.distribution, reward).item())
        assert out.distribution.mean.abs().max() <= 0.15 + 1e-6
        assert not torch.equal(out.distribution.std, torch.ones(1, D))
    assert sum(gains) / 8 > 0.05
    assert sum(g > 0 for g in gains) >= 6


def test_nothing_is_learned_where_rewards_and_noises_are_mixed_up(monkeypatch):
    """The public code's mistake, planted: each noise is paired with another one's reward."""
    whole = FIND._draw

    def shifted(self, *args):
        drawing = whole(self, *args)
        return replace(drawing, rewards=drawing.rewards.roll(1, 0))

    honest = [gain(FIND(Linear(s), budget=160).search(problem(s)).distribution, Linear(s)).item() for s in range(6)]
    monkeypatch.setattr(FIND, "_draw", shifted)
    mixed = [gain(FIND(Linear(s), budget=160).search(problem(s)).distribution, Linear(s)).item() for s in range(6)]
    assert sum(mixed) / 6 < 0.25 * sum(honest) / 6


# ---- ratios and gradients ----------------------------------------------------------------------------------------------------


def drawing(seed: int = 0, k: int = 3, b: int = 2) -> tuple[FIND, Drawing]:
    generator = torch.Generator().manual_seed(seed)
    behaviour = NoiseDistribution(0.3 * torch.randn(b, D, generator=generator), 0.8 + 0.3 * torch.rand(b, D, generator=generator))
    noise = behaviour.mean + behaviour.std * torch.randn(k, b, D, generator=generator)
    advantages = torch.randn(k, b, generator=generator)
    return FIND(Linear(), learn_std=True), Drawing(noise, torch.zeros(k, b), behaviour, advantages)


def test_replayed_ratios_are_exact():
    """Against torch.distributions, and exactly 1 under the distribution that drew the noise."""
    method, drawn = drawing()
    policy = NoiseDistribution(drawn.behaviour.mean + 0.05, drawn.behaviour.std * 1.02)
    for k in range(3):
        assert torch.equal(method.ratio(drawn.behaviour, drawn, k), torch.ones(2))
        now, then = (torch.distributions.Normal(p.mean, p.std).log_prob(drawn.noise[k]).mean(1) for p in (policy, drawn.behaviour))
        torch.testing.assert_close(method.ratio(policy, drawn, k), (now - then).exp(), rtol=1e-4, atol=1e-5)
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(drawn.noise[k]).mean(1)
        against = replace(method, reference="prior").ratio(policy, drawn, k)
        torch.testing.assert_close(against, (now - prior).exp(), rtol=1e-4, atol=1e-5)


def test_the_loss_by_hand():
    method, drawn = drawing()
    policy = NoiseDistribution(drawn.behaviour.mean + 0.8, drawn.behaviour.std)
    ratios = torch.stack([method.ratio(policy, drawn, k) for k in range(3)])
    assert ((ratios - 1).abs() > 0.2).any(), "some lie outside the clip"
    expected = -(drawn.advantages * ratios.clamp(0.8, 1.2)).mean(0).sum()
    torch.testing.assert_close(method._loss(policy, drawn), expected)


def test_a_clipped_noise_has_no_gradient_and_the_others_reach_mean_and_std():
    method, drawn = drawing()
    mean, std = drawn.behaviour.mean.clone().requires_grad_(), drawn.behaviour.std.clone().requires_grad_()
    method._loss(NoiseDistribution(mean, std), drawn).backward()
    assert (mean.grad.flatten(1).norm(dim=1) > 0).all()
    assert (std.grad.flatten(1).norm(dim=1) > 0).all()
    far = (drawn.behaviour.mean + 3).requires_grad_()
    method._loss(NoiseDistribution(far, drawn.behaviour.std), drawn).backward()
    assert not far.grad.any()


def test_advantages_by_hand():
    method = FIND(Linear())
    drawn = Drawing(
        torch.zeros(3, 2, D),
        torch.tensor([[1.0, 5.0], [2.0, math.nan], [6.0, 7.0]]),
        NoiseDistribution(torch.zeros(2, D), torch.ones(2, D)),
    )
    found = method._advantages(drawn, None)
    others, deviation = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]), math.sqrt((4 + 1 + 9) / 2)
    torch.testing.assert_close(found[:, 0], others / deviation)
    torch.testing.assert_close(found[:, 1], torch.tensor([5 - 7.0, 0.0, 7 - 5.0]) / math.sqrt(2))


# ---- how far it goes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_std", [False, True])
@pytest.mark.parametrize("kl_budget", [0.01, 0.1])
def test_the_budget_of_kl_holds(learn_std, kl_budget):
    out = FIND(Linear(), budget=80, lr=0.3, kl_budget=kl_budget, learn_std=learn_std).search(problem(0, 1))
    assert (out.distribution.kl_per_entry() <= kl_budget * 1.001).all()
    assert (out.distribution.kl_per_entry() > 0.5 * kl_budget).all()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(out.distribution.mean, out.distribution.std), torch.distributions.Normal(0.0, 1.0)
    ).mean(1)
    torch.testing.assert_close(out.distribution.kl_per_entry(), expected, rtol=1e-4, atol=1e-5)


def test_noises_stay_on_the_shell():
    out = FIND(Linear(), budget=160, lr=0.1).search(problem(0))
    drawn = torch.cat([out.distribution.sample([0], draw) for draw in range(200)])
    assert drawn.square().mean().item() == pytest.approx(1, abs=0.02)
    assert out.distribution.mean.square().mean() > 0.05


def test_samples_are_their_own(monkeypatch):
    together = FIND(Linear(), budget=48).search(problem(5, 6, 7))
    for i, seed in enumerate((5, 6, 7)):
        alone = FIND(Linear(), budget=48).search(problem(seed))
        # Adam divides by the size of the gradient: where that is near 0, rounding counts, by a fraction of a step of 0.03
        torch.testing.assert_close(alone.distribution.mean[0], together.distribution.mean[i], rtol=0, atol=1e-3)
        torch.testing.assert_close(alone.noise[0], together.noise[i], rtol=0, atol=1e-3)
    chunked = FIND(Linear(), budget=48, batch_size=5).search(problem(5, 6, 7))
    torch.testing.assert_close(chunked.distribution.mean, together.distribution.mean, rtol=0, atol=1e-3)


def test_the_best_image_is_returned_and_the_first_is_the_given_noise():
    given = problem(3, 4)
    out = FIND(Linear(), budget=20).search(given)
    assert torch.equal(out.initial_images[:, 0, 0], given.noise)
    for i in range(2):
        totals = out.trace.rewards["total"][i]
        assert len(totals) == 20
        assert out.trace.best[i] == max(range(20), key=totals.__getitem__)
        assert totals[out.trace.best[i]] == pytest.approx((out.noise[i] @ Linear().w).item(), abs=1e-5)


def test_a_score_that_is_not_finite_teaches_nothing(caplog):
    class Broken(Linear):
        def __call__(self, images, prompts):
            scores = super().__call__(images, prompts)
            scores.total[::3] = math.nan
            return scores

    out = FIND(Broken(), budget=40).search(problem(0))
    assert torch.isfinite(out.distribution.mean).all()
    assert out.distribution.mean.abs().sum() > 0
    assert "teaches nothing" in caplog.text


# ---- the distribution --------------------------------------------------------------------------------------------------------


def test_a_distribution_is_saved_and_drawn_from_again(tmp_path):
    found = FIND(Linear(), budget=40).search(problem(0, 1)).distribution
    found.save(tmp_path / "find.safetensors")
    loaded = NoiseDistribution.load(tmp_path / "find.safetensors")
    assert torch.equal(loaded.sample([3, 4], 2), found.sample([3, 4], 2))
    assert torch.equal(loaded.sample([3, 4], 2)[1:], loaded.rows([1]).sample([4], 2))
    assert not torch.equal(loaded.sample([3, 4], 2), loaded.sample([3, 4], 1))
    assert [path.name for path in tmp_path.iterdir()] == ["find.safetensors"]
    with pytest.raises(ValueError, match="seeds must hold one entry for each of the 2"):
        loaded.sample([1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0}, "budget must be an integer of at least 1, got 0"),
        ({"candidates": 1}, "candidates must be at least 2"),
        ({"lr": 0.0}, "lr must be a finite number above 0"),
        ({"kl_budget": -1.0}, "kl_budget must be a finite number above 0"),
        ({"baseline": "mean"}, "baseline must be 'others' or 'network', got 'mean'"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        FIND(Linear(), **settings)
