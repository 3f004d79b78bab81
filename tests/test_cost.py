"""What images cost, counted on a real tiny pipeline: evaluations of the network are rows of its batches."""

import pytest

from diffalign.evaluation.cost import Meter
from diffalign.hub import load_reward
from diffalign.methods import BestOfN, ReNO
from diffalign.reports.summary import cost_table, mean_cost


@pytest.mark.parametrize(("guidance_scale", "passes"), [(0.0, 1), (3.0, 2)])
def test_guidance_costs_two_evaluations_a_step(pipe, guidance_scale, passes):
    with Meter(pipe) as meter:
        pipe(["a", "b", "c"], seed=0, num_inference_steps=4, guidance_scale=guidance_scale)
    costs = meter.costs(3)
    assert [cost["nfe"] for cost in costs] == [4 * passes] * 3
    assert [cost["reward_calls"] for cost in costs] == [0, 0, 0]
    assert costs[0]["seconds"] == pytest.approx(meter.seconds / 3, abs=1e-4)
    assert costs[0]["peak_memory_mb"] > 50  # a process with torch in it


def test_a_search_makes_a_generation_for_every_evaluation(pipe):
    method = BestOfN(load_reward("brightness", device="cpu"), budget=5)
    with Meter(pipe) as meter:
        output = pipe(["a", "b"], seed=0, num_inference_steps=2, guidance_scale=0.0, plugins=[method])
    costs = meter.costs(2, [len(series) for series in output.trace.rewards["total"]])
    assert [(cost["nfe"], cost["reward_calls"]) for cost in costs] == [(10, 5), (10, 5)]
    assert [cost["backward_passes"] for cost in costs] == [None, None]  # nobody has said how many


def test_backward_passes_are_what_the_search_counted_and_have_a_column_where_there_are_any(pipe):
    method = ReNO.paper(load_reward("brightness", device="cpu"), budget=3)
    with Meter(pipe) as meter:
        output = pipe(["a", "b"], seed=0, num_inference_steps=1, guidance_scale=0.0, plugins=[method])
    counted = [cost.backward_passes for cost in output.cost]
    costs = meter.costs(2, [len(series) for series in output.trace.rewards["total"]], counted)
    assert [cost["backward_passes"] for cost in costs] == counted
    assert all(1 <= passes <= 3 for passes in counted)
    without = {"nfe": 1.0, "backward_passes": 0.0, "peak_memory_mb": 2048}
    heads, cells = cost_table([without, mean_cost(costs)])
    assert "backward passes" in heads
    assert cells[0][heads.index("backward passes")] == "0"
    assert cells[1][heads.index("backward passes")] == f"{sum(counted) / 2:.4g}"
    assert (cells[0][0], cells[0][-1]) == ("", "2.00")
    heads, cells = cost_table([without, {}])
    assert "backward passes" not in heads
    assert {len(row) for row in cells} == {len(heads)}


def test_samples_that_stopped_early_cost_less(pipe):
    """Three generations of two steps, made for samples that saw 1 and 2 of them."""
    with Meter(pipe) as meter:
        pipe(["a", "b", "c"], seed=0, num_inference_steps=2, guidance_scale=0.0)
    assert [cost["nfe"] for cost in meter.costs(2, [1, 2])] == [2, 4]


def test_nothing_is_counted_before_or_after(pipe):
    with Meter(pipe) as meter:
        pass
    pipe("a", seed=0, num_inference_steps=1, guidance_scale=0.0)
    assert meter.network_evaluations == 0
    assert not pipe.unet._forward_pre_hooks
