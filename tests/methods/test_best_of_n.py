"""Best-of-N, and the seeded draws and health figures of noise that the methods share."""

from __future__ import annotations

import pytest
import torch

from diffalign.methods import BestOfN
from diffalign.noise import noise_statistics, seeded_noise, tangent, with_norm
from diffalign.types import RewardScores


def test_it_keeps_the_best_of_the_candidates_and_never_a_worse_one_than_the_given(curved):
    problem, reward = curved.problem([3, 1, 4]), curved.reward()
    result = BestOfN(reward, budget=9).search(problem)
    for i in range(3):
        candidates = torch.cat([problem.noise[i : i + 1]] + [seeded_noise((2, 3, 3), [problem.seeds[i]], k) for k in range(1, 9)])
        totals = reward(curved.generate(candidates, [i] * 9), [problem.prompts[i]] * 9).total
        best = int(totals.argmax())
        assert result.trace.best[i] == best
        assert torch.equal(result.noise[i], candidates[best])
        assert result.trace.rewards["total"][i] == pytest.approx(totals.tolist())
        assert totals[best] >= totals[0]


def test_more_candidates_only_add_to_fewer(curved):
    few, many = (BestOfN(curved.reward(), budget=n).search(curved.problem([3, 1])).trace.rewards["total"] for n in (4, 9))
    assert [series[:4] for series in many] == few


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_changes_nothing_and_is_kept(batch_size, curved):
    sizes = []

    def generate(noise, rows):
        assert len(noise) == len(rows)
        sizes.append(len(rows))
        return curved.generate(noise, rows)

    result = BestOfN(curved.reward(), budget=6, batch_size=batch_size).search(curved.problem([3, 1, 4], generate=generate))
    whole = BestOfN(curved.reward(), budget=6).search(curved.problem([3, 1, 4]))
    assert max(sizes) == min(batch_size, 18)
    assert sum(sizes) == 18
    torch.testing.assert_close(result.noise, whole.noise)
    assert result.trace.best == whole.trace.best


def test_a_reward_without_gradient_is_welcome_and_none_is_computed(plane):
    class Steps:
        differentiable = False

        def prepare(self, prompts):
            pass

        def __call__(self, images, prompts):
            assert not torch.is_grad_enabled()
            return RewardScores(images[:, 0, 0, 0].round(), {})

    result = BestOfN(Steps(), budget=20).search(plane.problem([[0.0, 0.0]], ["a"]))
    assert result.trace.rewards["total"][0][result.trace.best[0]] >= 1


def test_ties_go_to_the_earliest(plane):
    result = BestOfN(plane.reward(scale=0.0), budget=5).search(plane.problem([[3.0, 4.0]], ["0 0"]))
    assert result.trace.best == [0]


def test_a_draw_depends_on_its_seed_and_number_alone():
    draws = seeded_noise((4, 8, 8), [7, 8, 7], 2)
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1:2], seeded_noise((4, 8, 8), [8], 2))
    assert draws.dtype == torch.float32
    distinct = {tuple(seeded_noise((4, 8, 8), [seed], k)[0, 0, 0, :3].tolist()) for seed in (0, 1, 2, -1, 2**63) for k in range(5)}
    assert len(distinct) == 25
    many = seeded_noise((40000,), [5], 1)
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


@pytest.mark.parametrize("shape", [(8, 16, 16), (256, 16), (2048,)], ids=["latents", "packed", "flat"])
def test_white_noise_looks_white_and_smooth_noise_does_not(shape):
    """A random walk along the axes on which neighbours are taken has correlated neighbours; doubling changes norm and variance alone."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    d = noise[0].numel()
    white = noise_statistics(noise)
    torch.testing.assert_close(white["noise_norm"], torch.full((2,), d**0.5), rtol=0.05, atol=0)
    torch.testing.assert_close(white["noise_variance"], torch.ones(2), rtol=0.15, atol=0)
    for name in ("noise_mean", "noise_autocorrelation"):
        assert white[name].abs().max() < 4 / d**0.5
    axis = 1 if len(shape) < 3 else 3
    smooth = noise_statistics(2 * (noise + noise.roll(1, axis)) / 2**0.5)
    assert smooth["noise_variance"].tolist() == pytest.approx([4, 4], rel=0.2)
    expected = 0.5 if len(shape) < 3 else 0.25  # neighbours along one axis of two are correlated by a half
    assert smooth["noise_autocorrelation"].tolist() == pytest.approx([expected] * 2, abs=0.08)


def test_moves_along_the_sphere():
    point, vector = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(tangent(vector, point), torch.tensor([[0.16, -0.12]]))  # (1, 1) - 7/25 (3, 4)
    torch.testing.assert_close(with_norm(point, torch.tensor([10.0])), torch.tensor([[6.0, 8.0]]))
