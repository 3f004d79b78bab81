"""Guide on a denoiser known in closed form: the pull by hand, what it reaches, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from diffalign.methods.guide import Guide
from tests.methods.test_particles import Loop, Mean, problem
from tests.test_sampling import Gaussian


def guided(strength: float, seeds=(0, 1), **settings):
    given = problem(seeds, Gaussian("flow", spread=0.5))
    return given, Guide(Mean(), strength=strength, **settings).search(given)


def test_it_raises_the_reward_and_more_so_when_stronger():
    given, weak = guided(0.02)
    _, strong = guided(0.2)
    plain = given.generate(given.noise, [0, 1]).mean(dim=(1, 2, 3))
    assert (weak.images.mean(dim=(1, 2, 3)) > plain).all()
    assert (strong.images.mean(dim=(1, 2, 3)) > weak.images.mean(dim=(1, 2, 3))).all()
    assert torch.equal(weak.initial_images, given.generate(given.noise, [0, 1]))
    assert [len(totals) for totals in weak.trace.rewards["total"]] == [2, 2]


def test_without_strength_it_is_the_plain_loop_to_the_bit():
    given, out = guided(0.0)
    assert torch.equal(out.images, given.generate(given.noise, [0, 1]))
    assert out.trace.best == [0, 0]


def test_one_pull_by_hand():
    """The reward is the mean over 3 channels of 16 entries, so its direction is uniform: every entry of x0 moves by rho s."""
    given = problem((0,), Gaussian("flow", spread=0.5))
    seen = []

    class Spy(Loop):
        def run(self, noise, rows, sampler=None, on_step=None, draws=None):
            def keep(state):
                changed = on_step(state)
                seen.append((state, changed))
                return changed

            return super().run(noise, rows, sampler, keep if on_step else None, draws)

    spy = replace(given, loop=Spy(Gaussian("flow", spread=0.5), ["1"], [0]))
    Guide(Mean(), strength=0.1, start=0.25, stop=0.5).search(spy)
    assert [changed is not None for _, changed in seen] == [False, True, False, False]
    state, changed = seen[1]
    s, after = 0.7, 1 - 0.4
    torch.testing.assert_close(changed.x0 - state.x0, torch.full_like(state.x0, 0.1 * s))
    torch.testing.assert_close(changed.x - state.x, torch.full_like(state.x, after * 0.1 * s))


def test_samples_are_their_own_and_further_noises_are_those_of_best_of_n():
    _, together = guided(0.1, (4, 5), budget=4)
    for i, seed in enumerate((4, 5)):
        _, alone = guided(0.1, (seed,), budget=4)
        torch.testing.assert_close(alone.images[0], together.images[i])
    assert [len(totals) for totals in together.trace.rewards["total"]] == [4, 4]


def test_a_function_guides_and_one_without_gradient_pulls_nobody():
    given = problem((0, 1), Gaussian("flow", spread=0.5))
    out = Guide.by(lambda images, prompts: -(images[..., :2].mean(dim=(1, 2, 3)) - 2).square(), strength=0.2).search(given)
    left, right = out.images[..., :2].mean(), out.images[..., 2:].mean()
    assert left > right + 0.2
    still = Guide.by(lambda images, prompts: 0 * images.sum(dim=(1, 2, 3)), strength=0.2).search(given)
    torch.testing.assert_close(still.images, given.generate(given.noise, [0, 1]))
    broken = Guide.by(lambda images, prompts: images.sum(dim=(1, 2, 3)) * math.nan, strength=0.2).search(given)
    assert torch.isfinite(broken.images).all()


def test_mistakes_are_named():
    flat = Mean()
    flat.differentiable = False
    with pytest.raises(TypeError, match="no gradient, which Guide follows"):
        Guide(flat)
    for settings, words in (({"budget": 1}, "budget"), ({"strength": -1.0}, "strength"), ({"start": 0.5, "stop": 0.5}, "stop")):
        with pytest.raises(ValueError, match=words):
            Guide(Mean(), **settings)
    given = problem()
    given.loop.steps = 1
    with pytest.raises(ValueError, match="takes one"):
        Guide(Mean()).search(given)
