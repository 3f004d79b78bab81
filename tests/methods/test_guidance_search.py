"""The policy search on exact predictions: the relaxation, the budget, and what a found policy does in a run."""

from __future__ import annotations

import pytest
import torch

from diffalign.guidance import GuidanceRun
from diffalign.methods.guidance_rivals import FixedFraction
from diffalign.methods.guidance_search import (
    Logits,
    RelaxedGuidance,
    SearchedGuidance,
    SearchSettings,
    at_strength,
    search,
)
from tests.methods.guidance_toy import Toy, relative_error


def test_at_strength():
    c, u = torch.tensor([[1.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    for strength in (0.0, 1.0, 2.5, 7.0):
        back = at_strength(c, u, strength, 5.0)
        torch.testing.assert_close(back + 5.0 * (c - back), u + strength * (c - u))


def test_choices_keep_the_budget():
    guided, alone = torch.tensor([2.5, 5.0, 10.0]), torch.tensor([0.0, 1.0])
    logits = Logits.initial(5, own=1, strengths=3)
    assert logits.strengths(guided, alone, 3).tolist() == [5.0, 5.0, 5.0, 1.0, 1.0]
    logits.gate.data = torch.tensor([0.0, 2.0, -1.0, 1.0, 0.5])
    logits.strength.data[3, 2] = 2.0
    logits.alone.data[2, 0] = 2.0
    assert logits.strengths(guided, alone, 2).tolist() == [1.0, 5.0, 0.0, 10.0, 1.0]
    assert logits.strengths(guided, alone, 0).tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_gradients_are_those_of_the_relaxation():
    """One step, guided at 4 rather than 1 by a gate a: s = sigmoid(a) 4 + (1 - sigmoid(a)) 1 has the slope 3 / 4 at a = 0."""
    logits = Logits.initial(1, own=0, strengths=1)
    (strength,) = logits.strengths(torch.tensor([4.0]), torch.tensor([0.0, 1.0]), 1)
    assert float(strength.detach()) == 4.0
    gate, _, _ = torch.autograd.grad(strength, logits.tensors(), allow_unused=True)
    assert float(gate) == pytest.approx(0.75)
    two = Logits.initial(1, own=0, strengths=2)
    (strength,) = two.strengths(torch.tensor([4.0, 8.0]), torch.tensor([0.0, 1.0]), 1)
    p = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    _, options, _ = torch.autograd.grad(strength, two.tensors())
    torch.testing.assert_close(options[0], torch.stack([p[0] * p[1] * -4, p[0] * p[1] * 4]))


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


def search_of(toy, iterations, budget, seen=None):
    settings = SearchSettings(iterations=iterations, budget=budget)
    progress = None if seen is None else lambda i, values: seen.append(values)
    return search(lambda i, method: toy.run(method, samples=32, seed=i % 4)[0], toy.steps, toy.scale, settings, progress)


def test_the_search_beats_a_fixed_fraction_within_its_budget():
    toy, seen = Toy(steps=20), []
    policy = search_of(toy, 60, 0.7, seen)
    assert len(seen) == 60
    assert seen[-1]["policies"] == policy.notes["policies"] > 20
    full, cost, _ = toy.run(None, samples=64, seed=9)
    found, evaluations, _ = toy.run(policy, samples=64, seed=9)
    assert sum(evaluations) == pytest.approx(0.7 * sum(cost))
    fixed, same, _ = toy.run(FixedFraction(fraction=0.4), samples=64, seed=9)
    assert evaluations == same
    assert relative_error(found, full) < 0.6 * relative_error(fixed, full)


def test_no_step_is_unconditional_where_none_can_be():
    """Two-call pipelines. The same search that would choose it elsewhere: here the unconditional branch is the one that helps."""
    toy = Toy(steps=4)

    def found(possible):
        def sample(i, method):
            if method is not None:
                run = GuidanceRun(
                    samples=1, timesteps=(3.0, 2.0, 1.0, 0.0), prediction="flow", guidance_scale=5.0, unconditional_alone=possible
                )
                return (method.begin(run).strengths[None] - torch.tensor([5.0, 5.0, 0.0, 0.0])) + 1.0
            return torch.ones(1, 4)

        return search(sample, 4, toy.scale, SearchSettings(iterations=12, lr=1.0)).strengths

    assert found(True) == (5.0, 5.0, 0.0, 0.0)
    assert found(False) == (5.0, 5.0, 1.0, 1.0)


def test_where_a_fixed_fraction_is_best_it_stays():
    """At 8 steps on this toy no other 4 guided steps are as good as the first 4: what is tried on the way is not returned."""
    seen = []
    policy = search_of(Toy(steps=8), 10, 0.75, seen)
    assert seen[-1]["policies"] > 2
    assert policy.strengths == (5.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0, 1.0)


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
    for text in ("[1]", "{}", '{"strengths": ["3"]}', '{"strengths": [3, -1]}', '{"strengths": [NaN]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="holds no searched policy"):
            SearchedGuidance.load(tmp_path / "other.json")


def test_nothing_to_search_without_guidance():
    with pytest.raises(ValueError, match="must be above 1"):
        search(lambda i, method: torch.zeros(1, 2), 4, 1.0)


@pytest.mark.parametrize(
    "settings", [{"budget": 0.5}, {"strengths": (2.0,)}, {"strengths": (-1.0, 1.0)}, {"iterations": 0}, {"finalists": 0}]
)
def test_wrong_settings_get_a_sentence(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must"):
        SearchSettings(**settings)
