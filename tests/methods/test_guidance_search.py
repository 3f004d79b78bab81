"""The policy search on exact predictions: the relaxation, the budget, and what a found policy does in a run."""

from __future__ import annotations

import pytest
import torch

from diffalign.methods.guidance_rivals import FixedFraction
from diffalign.methods.guidance_search import (
    RelaxedGuidance,
    SearchedGuidance,
    SearchSettings,
    at_strength,
    choose,
    search,
)
from tests.methods.guidance_toy import Toy, relative_error


def test_at_strength():
    c, u = torch.tensor([[1.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    for strength in (0.0, 1.0, 2.5, 7.0):
        back = at_strength(c, u, strength, 5.0)
        torch.testing.assert_close(back + 5.0 * (c - back), u + strength * (c - u))


def test_choose_keeps_the_budget():
    options = [0.0, 1.0, 5.0, 10.0]
    logits = [[0, 0, 3, 1], [0, 2, 1, 0], [0, 0, 1, 2], [1, 0, 0.5, 0], [0, 0, 0.2, 0]]
    assert choose(logits, options, 1.0) == [5.0, 1.0, 10.0, 0.0, 5.0]
    assert choose(logits, options, 0.7) == [5.0, 1.0, 10.0, 0.0, 0.0]  # 7 of 10 evaluations: two guided steps
    assert choose(logits, options, 0.61) == [5.0, 1.0, 0.0, 0.0, 0.0]


def test_relaxed_at_full_strength_is_full_guidance():
    toy = Toy(steps=8)
    full = toy.run(None)[0]
    relaxed = toy.run(RelaxedGuidance(torch.full((8,), 5.0)))[0]
    torch.testing.assert_close(relaxed, full, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_step():
    strengths = torch.full((8,), 3.0, requires_grad=True)
    Toy(steps=8).run(RelaxedGuidance(strengths))[0].square().sum().backward()
    assert (strengths.grad[:-1].abs() > 0).all()  # at the last step the branches agree to the last digit


def test_a_policy_in_a_run():
    toy = Toy(steps=4)
    full = toy.run(None)[0]
    same = SearchedGuidance((5.0, 5.0, 5.0, 5.0))
    assert torch.equal(toy.run(same)[0], full)
    end, evaluations, _ = toy.run(SearchedGuidance((5.0, 10.0, 1.0, 0.0)))
    assert evaluations == [6] * 8

    generator = torch.Generator().manual_seed(0)
    x, classes = torch.randn(8, 16, generator=generator), torch.randint(64, (8,), generator=generator)
    for step, strength in enumerate((5.0, 10.0, 1.0, 0.0)):
        c, u = toy.predict(x, step, classes), toy.predict(x, step, None)
        x = toy.step(x, u + strength * (c - u), step)
    torch.testing.assert_close(end, x, rtol=1e-4, atol=1e-4)


@pytest.mark.xfail(strict=True, reason="the searched policy is still worse than a fixed fraction on this toy; not finished")
def test_the_search_beats_a_fixed_fraction_within_its_budget():
    toy = Toy(steps=8)
    seen = []
    policy = search(
        lambda i, method: toy.run(method, samples=32, seed=i % 4)[0], 8, toy.scale, SearchSettings(iterations=40, budget=0.75),
        progress=lambda i, values: seen.append(values),
    )  # fmt: skip
    assert len(seen) == 40
    assert seen[-1]["error"] < seen[0]["error"]
    full, cost, _ = toy.run(None, samples=64, seed=9)
    found, evaluations, _ = toy.run(policy, samples=64, seed=9)
    assert sum(evaluations) <= 0.75 * sum(cost)
    fixed, same, _ = toy.run(FixedFraction(fraction=0.5), samples=64, seed=9)
    assert sum(same) == 0.75 * sum(cost)
    assert relative_error(found, full) < relative_error(fixed, full)


def test_saved_loaded_and_refused(tmp_path):
    toy = Toy(steps=4)
    policy = search(lambda i, method: toy.run(method, samples=4)[0], 4, toy.scale, SearchSettings(iterations=1))
    policy.save(tmp_path / "policy.json")
    loaded = SearchedGuidance.load(tmp_path / "policy.json")
    assert loaded.strengths == policy.strengths
    assert loaded.identity["network"] == "toy"
    assert torch.equal(toy.run(loaded)[0], toy.run(policy)[0])
    with pytest.raises(ValueError, match=r"the searched policy does not fit this run .*guidance_scale: 5.0 when it was made, 4.0 now"):
        Toy(steps=4, scale=4.0).run(loaded)
    with pytest.raises(ValueError, match="network: toy when it was made, tuned now"):
        Toy(steps=4, network="tuned").run(loaded)
    with pytest.raises(FileNotFoundError, match="make one with"):
        SearchedGuidance.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no searched policy"):
        SearchedGuidance.load(tmp_path / "other.json")


def test_nothing_to_search_without_guidance():
    with pytest.raises(ValueError, match="must be above 1"):
        search(lambda i, method: torch.zeros(1, 2), 4, 1.0)


@pytest.mark.parametrize("settings", [{"budget": 0.5}, {"strengths": ()}, {"strengths": (-1.0,)}, {"iterations": 0}, {"temperature": 2.0}])
def test_wrong_settings_get_a_sentence(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must"):
        SearchSettings(**settings)
