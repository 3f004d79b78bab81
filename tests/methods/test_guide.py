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
    for settings, words in (
        ({"budget": 0}, "budget"),
        ({"every": 0}, "every"),
        ({"strength": -1.0}, "strength"),
        ({"start": 0.5, "stop": 0.5}, "stop"),
    ):
        with pytest.raises(ValueError, match=words):
            Guide(Mean(), **settings)
    given = problem()
    given.loop.steps = 1
    with pytest.raises(ValueError, match="takes one"):
        Guide(Mean()).search(given)


def test_a_budget_of_one_makes_the_guided_image_alone():
    given, pair = guided(0.1)
    spent = given.loop.spent
    one = Guide(Mean(), strength=0.1, budget=1).search(given)
    assert given.loop.spent - spent == 2 * 4, "four steps of two samples"
    assert [len(totals) for totals in one.trace.rewards["total"]] == [1, 1]
    assert torch.equal(one.images, pair.images), "the guided one scores better here"
    assert torch.equal(one.images, one.initial_images)


def test_rarer_pulls_go_the_same_way():
    """A direction that never changes: pulls at steps 0 and 2, twice as long, beside all four. By hand at noise 1, .7, .4, .2."""
    given = problem((0,), Gaussian("flow", spread=0.5))
    seen = {}
    for every in (1, 2):
        pulls = []

        class Spy(Loop):
            def run(self, noise, rows, sampler=None, on_step=None, draws=None, pulls=pulls):
                def keep(state):
                    changed = on_step(state)
                    pulls.append(0.0 if changed is None else (changed.x0 - state.x0).mean().item())
                    return changed

                return super().run(noise, rows, sampler, keep if on_step else None, draws)

        spy = replace(given, loop=Spy(Gaussian("flow", spread=0.5), ["1"], [0]))
        Guide(Mean(), strength=0.1, stop=1.0, every=every).search(spy)
        seen[every] = pulls
    schedule = given.loop.schedule
    assert seen[1] == pytest.approx([0.1 * s for s in schedule.noise[:4]], abs=1e-6)
    assert seen[2] == pytest.approx([0.2 * schedule.noise[0], 0, 0.2 * schedule.noise[2], 0], abs=1e-6)


def test_each_range_of_noise_has_its_own_reward_and_the_last_word_is_the_rewards():
    asked = []

    class Ranges:
        name = "two ranges"

        def at(self, share):
            asked.append(share)
            return Against() if share > 0.9 else Mean()

    class Against(Mean):
        def __call__(self, images, prompts):
            scores = super().__call__(images, prompts)
            return replace(scores, total=-scores.total)

    given = problem((0,), Gaussian("flow", spread=0.5))
    out = Guide(Mean(), strength=0.1, ranges=Ranges(), budget=1).search(given)
    _, same = guided(0.1, (0,), budget=1)
    schedule = given.loop.schedule
    assert asked == pytest.approx([s / math.hypot(a, s) for a, s in zip(schedule.signal[:3], schedule.noise[:3], strict=True)])
    assert out.images.mean() < same.images.mean() - 0.01, "the first pull went the other way"
    assert out.trace.rewards["total"][0][0] == pytest.approx(out.images.mean().item())
    assert out.trace.settings["ranges"] == "two ranges"
