"""What every method of the table owes, whichever it is, at its defaults; tests/methods/test_noise_methods.py has settings beside them."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

from diffalign.backbone import Conditioning
from diffalign.methods import METHODS, build_method, find_method
from diffalign.methods.linear_guidance import LinearGuidance
from diffalign.noise_policy import NoisePolicy, PolicyShape
from tests.methods import test_particles
from tests.methods.guidance_toy import Toy
from tests.methods.test_linear_guidance import fitted

WIDTH = 8


@pytest.fixture(params=[row.name for row in METHODS if row.kind == "noise"])
def world(request, curved, tmp_path_factory, monkeypatch):
    """(search of budget 7, its reward, problem of samples): curved latents, or a loop of several steps where one is needed."""
    row = find_method(request.param)
    if row.needs_steps:
        reward = test_particles.Mean()
        return build_method(row.name, reward, 7), reward, lambda seeds: test_particles.problem(seeds, prompts=[str(s) for s in seeds])
    if row.needs_policy:
        torch.manual_seed(0)
        policy, folder = NoisePolicy(PolicyShape((2, 3, 3), WIDTH, patch=1, width=16, heads=2)), tmp_path_factory.mktemp("policy")
        torch.nn.init.normal_(policy.write.weight, std=0.3)
        policy.save(folder)
        monkeypatch.setattr("diffalign.methods.amortised.SHIPPED", str(folder))

    def problem(seeds):
        texts = torch.stack([torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return replace(curved.problem(seeds), conditioning=Conditioning(tuple(map(str, seeds)), {"prompt_embeds": texts}))

    reward = curved.reward()
    return build_method(row.name, reward, 7), reward, problem


def test_a_batch_is_its_samples_alone_in_any_order(world):
    search, _, problem = world
    together, turned = search.search(problem([3, 1, 4])), search.search(problem([4, 3, 1]))
    for i, seed in enumerate([3, 1, 4]):
        alone = search.search(problem([seed]))
        for other, j in ((alone, 0), (turned, [4, 3, 1].index(seed))):
            # FIND's Adam divides by the size of the gradient: where that is near 0, rounding counts
            torch.testing.assert_close(together.images[i], other.images[j], atol=1e-3, rtol=0)
            assert together.trace.best[i] == other.trace.best[j]
            assert together.trace.rewards["total"][i] == pytest.approx(other.trace.rewards["total"][j], abs=1e-3)
    assert not torch.allclose(together.images[0], together.images[1], atol=1e-2)


def test_two_runs_are_equal_to_the_bit_and_leave_their_input_alone(world):
    search, _, problem = world
    given = problem([5, 6])
    before = given.noise.clone()
    one, two = search.search(given), search.search(given)
    assert torch.equal(one.images, two.images)
    assert one.trace == two.trace
    assert torch.equal(given.noise, before)
    assert not given.noise.requires_grad
    assert not one.images.requires_grad


def test_the_image_is_the_best_that_was_scored_and_never_worse_than_the_first(world):
    search, reward, problem = world
    given = problem([2, 7, 1])
    result = search.search(given)
    for totals, best in zip(result.trace.rewards["total"], result.trace.best, strict=True):
        assert best == totals.index(max(totals))
    kept = [totals[best] for totals, best in zip(result.trace.rewards["total"], result.trace.best, strict=True)]
    assert reward(result.images, given.prompts).total.tolist() == pytest.approx(kept, abs=1e-5)
    assert max(kept) > min(totals[0] for totals in result.trace.rewards["total"])
    if result.noise is not None:
        torch.testing.assert_close(given.generate(result.noise, [0, 1, 2]), result.images, atol=1e-5, rtol=1e-5)


def test_what_it_cost_is_at_most_its_budget_and_is_told(world):
    search, _, problem = world
    heard = []
    result = search.search(replace(problem([3, 1]), progress=heard.append))
    assert len(result.cost) == 2
    assert all(0 < cost.evaluations <= 7 + 1e-6 for cost in result.cost)
    assert {row for event in heard for row in event.rows} == {0, 1}
    for event in heard:
        assert all(len(series) == len(event.rows) for series in event.scores.values())
        assert len(event.images) == len(event.rows)


def test_an_interrupt_in_progress_ends_it(world):
    def interrupt(_):
        raise KeyboardInterrupt

    search, _, problem = world
    with pytest.raises(KeyboardInterrupt):
        search.search(replace(problem([3, 1]), progress=interrupt))


def test_the_trace_is_plain_data_and_holds_every_setting(world):
    search, _, problem = world
    trace = search.search(problem([3])).trace
    assert trace.method == search.name
    assert {f.name for f in fields(search)} - {"reward", "ranges"} <= trace.settings.keys()  # ranges: where there are any
    assert trace.settings["budget"] == 7
    json.dumps(trace.sample(0), allow_nan=False)


def test_bad_calls_are_refused_by_name(world):
    search, _, problem = world
    given = problem([3, 1])
    with pytest.raises(ValueError, match=r"budget.*0"):
        replace(search, budget=0)
    for changes, words in (({"prompts": ["1"]}, "prompts"), ({"seeds": [0]}, "seeds")):
        with pytest.raises(ValueError, match=f"{words} must hold one entry"):
            search.search(replace(given, **changes))
    with pytest.raises(ValueError, match="empty batch"):
        search.search(replace(given, noise=given.noise[:0], prompts=[], seeds=[]))


# ---- methods that are asked at every step ----------------------------------------------------------------------------------------


@pytest.fixture(params=[row.name for row in METHODS if row.kind == "step"])
def guided(request):
    """(toy of 8 steps, the method): at its defaults where it has them."""
    toy = Toy(steps=8)
    if request.param == "linear":
        return toy, LinearGuidance(fitted(toy))
    cls = find_method(request.param).load()
    return toy, cls((5.0, 2.5, 1.0, 0.0, 5.0, 10.0, 1.0, 1.0)) if request.param == "searched" else cls()


def test_a_guided_batch_is_its_samples_alone_and_costs_no_more_than_guidance(guided):
    toy, method = guided
    together, evaluations, _ = toy.run(method, samples=6)
    assert max(evaluations) <= 2 * toy.steps
    for row in range(6):
        alone, own, _ = toy.run(method, samples=6, rows=[row])
        assert own == [evaluations[row]]
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def test_a_guided_run_is_the_same_again_and_its_settings_are_plain_data(guided):
    toy, method = guided
    before = json.dumps(method.settings(), allow_nan=False)
    assert torch.equal(toy.run(method)[0], toy.run(method)[0])
    assert json.dumps(method.settings(), allow_nan=False) == before
    assert method.name == next(row.name for row in METHODS if row.class_name == type(method).__name__)
