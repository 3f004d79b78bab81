"""What every search over noise owes, whichever it is: independence of its samples, an honest best, reuse, refusal of bad settings."""

from __future__ import annotations

import json
import logging
from dataclasses import fields, replace

import pytest
import torch

from diffalign.methods import BestOfN, ReNO
from diffalign.types import Evaluation, RewardScores

SEARCHES = {
    "reno": lambda reward: ReNO(reward, budget=12, lr=0.05),
    "reno-plateau": lambda reward: ReNO(reward, budget=12, lr=0.05, starts=1, patience=3, plateau=0.3),
    "reno-target": lambda reward: ReNO(reward, budget=12, lr=0.05, starts=1, target=1.77),
    "reno-starts": lambda reward: ReNO(reward, budget=12, lr=0.05, starts=4, patience=2, plateau=0.5),
    "reno-chunks": lambda reward: ReNO(reward, budget=8, lr=0.05, starts=1, batch_size=2),
    "reno-paper": lambda reward: ReNO.paper(reward, lr=1.0, budget=12),
    "best-of-n": lambda reward: BestOfN(reward, budget=7),
    "best-of-n-chunks": lambda reward: BestOfN(reward, budget=7, batch_size=3),
}
STOPPING = {"reno-plateau", "reno-target", "reno-starts"}


@pytest.fixture(params=SEARCHES)
def name(request) -> str:
    return request.param


def same_sample(result, i, other, j) -> None:
    torch.testing.assert_close(result.images[i], other.images[j], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(result.noise[i], other.noise[j], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(result.initial_images[i], other.initial_images[j], atol=1e-6, rtol=1e-6)
    one, two = result.trace.sample(i), other.trace.sample(j)
    assert one["best"] == two["best"]
    for table in ("rewards", "diagnostics"):
        assert one[table].keys() == two[table].keys()
        for column in one[table]:
            assert one[table][column] == pytest.approx(two[table][column], abs=2e-5, rel=2e-5), column


def test_a_batch_equals_its_samples_alone(name, curved):
    """Also while samples leave the batch at different evaluations."""
    samples = [3, 1, 4, 15, 9]
    search = SEARCHES[name](curved.reward())
    together = search.search(curved.problem(samples))
    lengths = {len(series) for series in together.trace.rewards["total"]}
    assert (len(lengths) > 1) == (name in STOPPING), lengths
    for i, sample in enumerate(samples):
        same_sample(together, i, search.search(curved.problem([sample])), 0)


def test_the_order_of_samples_does_not_matter(name, curved):
    search = SEARCHES[name](curved.reward())
    one, two = search.search(curved.problem([3, 1, 4])), search.search(curved.problem([4, 3, 1]))
    for i, j in ((0, 1), (1, 2), (2, 0)):
        same_sample(one, i, two, j)


def test_two_runs_are_equal_to_the_bit_and_leave_their_input_alone(name, curved):
    search, problem = SEARCHES[name](curved.reward()), curved.problem([5, 6])
    before = problem.noise.clone()
    one, two = search.search(problem), search.search(problem)
    assert torch.equal(one.noise, two.noise)
    assert torch.equal(one.images, two.images)
    assert one.trace == two.trace
    assert torch.equal(problem.noise, before)
    assert not problem.noise.requires_grad
    assert not one.noise.requires_grad
    assert not one.images.requires_grad


def test_the_best_is_the_first_greatest_total_and_its_noise_makes_its_image(name, curved):
    reward, problem = curved.reward(), curved.problem([2, 7, 1])
    result = SEARCHES[name](reward).search(problem)
    for i, series in enumerate(result.trace.rewards["total"]):
        assert result.trace.best[i] == series.index(max(series))
    again = problem.generate(result.noise, [0, 1, 2])
    torch.testing.assert_close(again, result.images, atol=1e-6, rtol=1e-6)
    best = [series[k] for series, k in zip(result.trace.rewards["total"], result.trace.best, strict=True)]
    assert reward(again, problem.prompts).total.tolist() == pytest.approx(best, abs=1e-5)
    assert torch.equal(result.initial_images, problem.generate(problem.noise, [0, 1, 2]))
    assert result.noise.dtype == torch.float32


def test_one_evaluation_is_doing_nothing(curved):
    problem = curved.problem([8, 9])
    for search in (ReNO(curved.reward(), budget=1), BestOfN(curved.reward(), budget=1)):
        result = search.search(problem)
        assert torch.equal(result.noise, problem.noise)
        assert torch.equal(result.images, curved.generate(problem.noise, [0, 1]))
        assert torch.equal(result.images, result.initial_images)
        assert result.trace.best == [0, 0]


def test_progress_hears_of_every_evaluation_of_every_sample_with_its_image(name, curved):
    """Each event tells the rows that were really made: a sample that stopped is in no further one."""
    heard: list[Evaluation] = []
    problem = curved.problem([3, 1, 4], progress=heard.append)
    reward = curved.reward()
    result = SEARCHES[name](reward).search(problem)
    totals = result.trace.rewards["total"]
    told = [(event.index, row) for event in heard for row in event.rows]
    assert sorted(told) == sorted((k, row) for row, series in enumerate(totals) for k in range(len(series)))
    assert [event.index for event in heard] == sorted(event.index for event in heard)
    for event in heard:
        assert event.scores.keys() == {"total", "first", "second"}
        assert event.scores["total"] == [totals[row][event.index] for row in event.rows]
        assert event.images.shape == (len(event.rows), 3, 4, 4)
        assert not event.images.requires_grad
        again = reward(event.images, [problem.prompts[row] for row in event.rows]).total.tolist()
        assert again == pytest.approx(event.scores["total"], abs=1e-6)


def test_an_interrupt_in_progress_ends_the_search(name, curved):
    def interrupt(evaluation):
        if evaluation.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SEARCHES[name](curved.reward()).search(curved.problem([3, 1], progress=interrupt))


def test_the_trace_is_plain_data_and_holds_the_settings(name, curved):
    search = SEARCHES[name](curved.reward())
    trace = search.search(curved.problem([3, 1])).trace
    assert trace.method == search.name
    assert trace.settings.keys() == {f.name for f in fields(search)} - {"reward"}
    again = replace(search, **trace.settings).search(curved.problem([3, 1])).trace
    assert again == trace
    assert None not in (trace.settings["budget"], trace.settings.get("starts", 1))
    assert json.loads(json.dumps(trace.sample(1), allow_nan=False))["rewards"]["total"] == trace.rewards["total"][1]


class BreaksOn:
    """A reward that gives `value` to the prompt `prompt` from its `after`-th evaluation on."""

    name, differentiable = "breaks", True

    def __init__(self, reward, prompt, value, after):
        self.reward, self.prompt, self.value, self.after, self.calls = reward, prompt, value, after, 0

    def prepare(self, prompts):
        self.reward.prepare(prompts)

    def __call__(self, images, prompts):
        scores = self.reward(images, prompts)
        broken = torch.tensor([prompt == self.prompt for prompt in prompts])
        self.calls += int(broken.any())
        if self.calls <= self.after:
            return scores
        return RewardScores(scores.total * torch.where(broken, self.value, 1.0), scores.parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("kind", ["reno-plateau", "reno-paper", "best-of-n"])
def test_a_sample_without_finite_reward_does_not_touch_its_mates(kind, after, value, curved, caplog):
    problem = curved.problem([3, 1, 4])
    with caplog.at_level(logging.WARNING):
        result = SEARCHES[kind](BreaksOn(curved.reward(), "101", value, after)).search(problem)
    healthy = SEARCHES[kind](curved.reward()).search(problem)
    for i in (0, 2):
        same_sample(result, i, healthy, i)
    assert "sample 1 (prompt '101', seed 1)" in caplog.text
    assert "sample 0" not in caplog.text
    totals = result.trace.rewards["total"][1]
    assert torch.isfinite(result.images).all()
    assert result.trace.best[1] == max(range(after), key=lambda k: totals[k], default=0)
    if kind != "best-of-n":
        assert len(totals) == after + 1
    else:
        assert len(totals) == 7
    if after == 0:
        assert torch.equal(result.images[1], result.initial_images[1])


def test_half_precision_generators_get_a_float32_search(name, curved):
    def generate(noise, rows):
        assert noise.dtype == torch.float32
        return curved.generate(noise.to(torch.bfloat16), rows)

    result = SEARCHES[name](curved.reward()).search(curved.problem([3, 1], generate=generate))
    assert result.noise.dtype == torch.float32
    assert result.images.dtype == torch.bfloat16
    for series in result.trace.rewards["total"]:
        assert max(series) > series[0]


def test_one_transfer_to_the_host_per_evaluation(name, curved, monkeypatch):
    transfers = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self.shape) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() waits for the device"))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("float() waits for the device"))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a branch on a tensor waits for the device"))
    result = SEARCHES[name](curved.reward()).search(curved.problem([3, 1, 4]))
    assert len(transfers) == max(map(len, result.trace.rewards["total"]))


BAD = [
    (ReNO, "budget", 0), (ReNO, "budget", -3), (ReNO, "budget", 2.5), (ReNO, "budget", True),
    (ReNO, "lr", 0.0), (ReNO, "lr", float("nan")), (ReNO, "lr", float("inf")), (ReNO, "lr", "5"),
    (ReNO, "lr_unit", "pixels"), (ReNO, "momentum", 1.0), (ReNO, "momentum", -0.1), (ReNO, "clip", 0.0),
    (ReNO, "regularizer", -1.0), (ReNO, "regularizer", float("inf")), (ReNO, "starts", 0), (ReNO, "starts", 50),
    (ReNO, "patience", 0), (ReNO, "plateau", 1.5), (ReNO, "target", float("nan")), (ReNO, "batch_size", 0),
    (ReNO, "loss_scale", 0.0), (ReNO, "sphere", "yes"), (ReNO, "nesterov", 1), (ReNO, "normalize", None),
    (BestOfN, "budget", 0), (BestOfN, "budget", 1.0), (BestOfN, "batch_size", 0),
]  # fmt: skip


@pytest.mark.parametrize(("method", "field", "value"), BAD, ids=str)
def test_a_bad_setting_is_refused_by_name(method, field, value, curved):
    with pytest.raises(ValueError, match=rf"{field} must be .*{value!s}"):
        method(curved.reward(), **{field: value})


@pytest.mark.parametrize("changes", [{"prompts": ["1"]}, {"prompts": "11"}, {"seeds": [0]}, {"seeds": [0, 1, 2]}], ids=str)
def test_a_problem_with_prompts_or_seeds_missing_is_refused_by_name(name, changes, curved):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must hold one entry"):
        SEARCHES[name](curved.reward()).search(curved.problem([3, 1], **changes))


def test_an_empty_batch_is_refused(name, curved):
    problem = curved.problem([1])
    with pytest.raises(ValueError, match="empty batch"):
        SEARCHES[name](curved.reward()).search(replace(problem, noise=problem.noise[:0], prompts=[], seeds=[]))


@pytest.mark.parametrize("method", [ReNO, BestOfN])
@pytest.mark.parametrize("old", ["iterations", "evaluations"])
def test_the_old_words_for_the_budget_say_the_new_one(method, old, curved):
    with pytest.raises(TypeError, match=f"{old}=.*budget=20"):
        method(curved.reward(), **{old: 20})
    with pytest.raises(TypeError, match="unexpected keyword argument 'budgets'"):
        method(curved.reward(), budgets=20)
