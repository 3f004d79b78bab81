"""One hook on every family: bit-exact while guidance is on, equal to no guidance afterwards, and nothing left behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from diffalign.methods.adaptive_guidance import AdaptiveGuidance
from diffalign.methods.guidance_rivals import DeltaReuse, FixedFraction, IntervalGuidance
from diffalign.methods.guidance_search import SearchedGuidance
from diffalign.pipelines.guidance.hook import guide
from tests.tiny_families import FAMILIES, draw

RECORD = AdaptiveGuidance(threshold=math.inf)
HALF = FixedFraction(fraction=0.5)
PER_SAMPLE = AdaptiveGuidance(threshold=0.99, warm_up=0.0)


@pytest.fixture(scope="module")
def pipelines():
    """One pipeline of each family, for tests that leave it as it was."""
    return {name: family.pipeline() for name, family in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def pipe(family, pipelines):
    return pipelines[family.name]


class Counted:
    """Samples that the network evaluates during a block, by a plain forward hook under everything else."""

    def __init__(self, family, pipeline):
        self.network = getattr(pipeline, family.attribute)

    def __enter__(self):
        self.sizes = []
        self.original = type(self.network).forward
        network, sizes = self.network, self.sizes

        def forward(module, *args, **kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if module is network:
                sizes.append(len(x))
            return self.original(module, *args, **kwargs)

        type(self.network).forward = forward
        return self

    def __exit__(self, *_):
        type(self.network).forward = self.original


# --- no-op --------------------------------------------------------------------------------------------------------------------------


def test_full_guidance_is_the_stock_result_to_the_bit(family, pipe):
    stock = family(pipe, [1, 2])
    assert not torch.allclose(stock, family(pipe, [1, 2], scale=1.0), atol=1e-3)  # guidance matters here
    with guide(pipe, RECORD) as guided:
        recorded = family(pipe, [1, 2])
    assert torch.equal(recorded, stock)
    assert guided.report.evaluations == [12, 12]
    assert guided.report.saved == 0.0
    assert [len(series) for series in guided.report.diagnostics["cosine"]] == [6, 6]
    assert torch.equal(family(pipe, [1, 2]), stock)


def steps_of(pipe, run):
    """What the sampler is given at every step of `run()`: the guided prediction and the latents."""
    seen, original = [], pipe.scheduler.step

    def step(model_output, timestep, sample, *args, **kwargs):
        seen.append((model_output.clone(), sample.clone()))
        return original(model_output, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = step
    try:
        run()
    finally:
        del pipe.scheduler.step
    return seen


@pytest.mark.parametrize("method", [HALF, AdaptiveGuidance(threshold=-0.99, warm_up=0.5), DeltaReuse(fraction=0.5)], ids=lambda m: m.name)
def test_to_the_bit_until_guidance_stops(method, family, pipe):
    stock = steps_of(pipe, lambda: family(pipe, [1, 2]))
    with guide(pipe, method) as guided:
        found = steps_of(pipe, lambda: family(pipe, [1, 2]))
    assert guided.report.evaluations == [9, 9]
    equal = [all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)) for mine, theirs in zip(found, stock, strict=True)]
    assert equal == [True] * 3 + [False] * 3
    assert torch.equal(found[3][1], stock[3][1])  # the latents that the first step without guidance starts from


def test_nothing_is_left_on_the_network(family, pipe):
    network = getattr(pipe, family.attribute)
    before = set(vars(network))
    with guide(pipe, HALF):
        family(pipe, [1], steps=2)
    assert set(vars(network)) == before
    assert "encode_prompt" not in vars(pipe)
    copy.deepcopy(network)


# --- after guidance -----------------------------------------------------------------------------------------------------------------


def without_guidance_after(network, family, step):
    """The oracle: evaluates both branches in full and then, from `step` on, puts the conditional prediction in place of the other."""
    original, calls, last = network.forward, [0], []

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        now = calls[0] // (2 if family.two_calls else 1)
        calls[0] += 1
        if family.two_calls:
            last.append(output)
            return last[-2] if len(last) % 2 == 0 and now >= step else output
        half = len(output[0]) // 2
        return (torch.cat([output[0][half:]] * 2), *output[1:]) if now >= step else output

    network.forward = forward
    return lambda: network.__dict__.pop("forward")


def test_equals_a_network_whose_branches_agree(family, pipe):
    undo = without_guidance_after(getattr(pipe, family.attribute), family, 3)
    try:
        expected = family(pipe, [1, 2])
    finally:
        undo()
    with Counted(family, pipe) as counted, guide(pipe, HALF) as guided:
        found = family(pipe, [1, 2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, family(pipe, [1, 2]), atol=1e-4)
    assert guided.report.evaluations == [9, 9]
    assert sum(counted.sizes) == 18


CALLBACKS = {"sd": ("prompt_embeds",), "sdxl": ("prompt_embeds", "add_text_embeds", "add_time_ids"),
             "sd3": ("prompt_embeds", "pooled_prompt_embeds"), "wan": ()}  # fmt: skip


@pytest.mark.parametrize("name", CALLBACKS)
def test_equals_the_stock_loop_at_scale_one_to_the_bit(name, pipelines):
    """diffusers' own way to switch guidance off, done right for batches: the second half of every embedding."""
    family, pipe = FAMILIES[name], pipelines[name]

    def switch_off(pipeline, i, t, values):
        if i == 2:
            pipeline._guidance_scale = 1.0
            return {key: value.chunk(2)[1] for key, value in values.items() if key in CALLBACKS[name]}
        return {}

    inputs = ["latents", *CALLBACKS[name]]
    oracle = family(pipe, [1, 2], callback_on_step_end=switch_off, callback_on_step_end_tensor_inputs=inputs)
    with guide(pipe, HALF):
        assert torch.equal(family(pipe, [1, 2]), oracle)


# --- batches ------------------------------------------------------------------------------------------------------------------------


def test_a_batch_of_prompts_is_its_prompts_alone(family, pipe):
    """Each sample stops by its own cosine; thresholds lie between those of the samples, so the batch takes every shape."""
    prompts = [1, 2, 3]
    with guide(pipe, AdaptiveGuidance(threshold=math.inf, warm_up=0.0)) as guided:
        family(pipe, prompts)
    second_step = sorted(series[1] for series in guided.report.diagnostics["cosine"])
    method = AdaptiveGuidance(threshold=(second_step[1] + second_step[2]) / 2, warm_up=0.3)  # one stops there, the others go on
    with guide(pipe, method) as guided:
        together = family(pipe, prompts)
        cost = guided.report.evaluations
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(family(pipe, [prompt])[0], together[row], rtol=1e-3, atol=1e-3)
            assert guided.report.evaluations == cost[row : row + 1]
    assert len(set(cost)) > 1


def test_what_is_kept_and_refreshed_is_each_samples_own(family, pipe):
    """Two prompts stop at different steps, keep their differences, and evaluate both branches anew at steps of their own."""
    with guide(pipe, AdaptiveGuidance(threshold=math.inf, warm_up=0.0)) as guided:
        family(pipe, [1, 2], steps=8)
    first, second = (series[1] for series in guided.report.diagnostics["cosine"])
    method = AdaptiveGuidance(threshold=(first + second) / 2, warm_up=0.25, refresh=3)
    with Counted(family, pipe) as counted, guide(pipe, method) as guided:
        together = family(pipe, [1, 2], steps=8)
        cost, stops = guided.report.evaluations, guided.report.diagnostics["settled_after"]
        assert sum(cost) == sum(counted.sizes) < 32
        for row, prompt in enumerate([1, 2]):
            torch.testing.assert_close(family(pipe, [prompt], steps=8)[0], together[row], rtol=1e-3, atol=1e-3)
            assert guided.report.evaluations == cost[row : row + 1]
    assert [2] in stops
    assert stops[0] != stops[1]
    with guide(pipe, AdaptiveGuidance(threshold=(first + second) / 2, warm_up=0.25)):
        assert not torch.allclose(family(pipe, [1, 2], steps=8), together, atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sana"])  # the others take embeddings as they are, one for each image
def test_images_per_prompt(name, pipelines):
    family, pipe = FAMILIES[name], pipelines[name]
    noise = torch.stack([draw(family.latent, seed, "noise") for seed in (5, 6, 7, 8)])
    with guide(pipe, HALF) as guided:
        several = family(pipe, [1, 2], latents=noise, num_images_per_prompt=2)
        single = family(pipe, [1, 1, 2, 2], latents=noise)
    assert guided.reports[0].evaluations == [9] * 4
    torch.testing.assert_close(several, single, rtol=1e-4, atol=1e-4)


# --- runs ---------------------------------------------------------------------------------------------------------------------------


def test_two_calls_in_a_row_are_fresh(family, pipe):
    with guide(pipe, PER_SAMPLE) as guided:
        first, second = family(pipe, [1, 2]), family(pipe, [1, 2])
        other = family(pipe, [3], steps=4)
    assert torch.equal(first, second)
    assert guided.reports[0] == guided.reports[1]
    assert guided.reports[2].steps == 4
    with guide(pipe, PER_SAMPLE):
        assert torch.equal(family(pipe, [3], steps=4), other)


def test_a_call_after_an_exception_is_fresh(family, pipe):
    with guide(pipe, HALF):
        expected = family(pipe, [1, 2])
    network = getattr(pipe, family.attribute)
    inner = next(module for module in network.modules() if isinstance(module, torch.nn.Linear))
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("planted")

    handle = inner.register_forward_pre_hook(fail)
    with guide(pipe, HALF) as guided:
        with pytest.raises(RuntimeError, match="planted"):
            family(pipe, [1, 2])
        handle.remove()
        assert torch.equal(family(pipe, [1, 2]), expected)
        assert len(guided.reports) == 1
    calls.clear()
    handle = inner.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"), guide(pipe, HALF):
        family(pipe, [1, 2])
    handle.remove()
    stock = family(pipe, [1, 2])
    with guide(pipe, RECORD):
        assert torch.equal(family(pipe, [1, 2]), stock)


def test_the_block_is_not_left_to_a_second_method(pipelines):
    pipe = pipelines["sd"]
    told = "already at work on this pipeline; 'interval' cannot be added"
    with guide(pipe, HALF), pytest.raises(ValueError, match=told), guide(pipe, IntervalGuidance()):
        pass
    stock = FAMILIES["sd"](pipe, [1])
    with guide(pipe, RECORD):
        assert torch.equal(FAMILIES["sd"](pipe, [1]), stock)


# --- other methods ------------------------------------------------------------------------------------------------------------------


def test_reuse_and_interval(family, pipe):
    with guide(pipe, DeltaReuse(fraction=0.5)) as guided:
        reused = family(pipe, [1, 2])
    assert guided.report.evaluations == [9, 9]
    with guide(pipe, HALF):
        assert not torch.allclose(family(pipe, [1, 2]), reused, atol=1e-4)
    with guide(pipe, IntervalGuidance(low=0.0, high=1.5)) as guided:
        family(pipe, [1, 2])
    assert 6 < guided.report.evaluations[0] < 12


def test_the_unconditional_branch_alone(family, pipe):
    """A searched policy may do without the conditional branch, where both are one call."""
    scale = {} if family.scale == "guidance_scale" and family.name != "pixart" else {"guidance_scale": 4.0}
    method = SearchedGuidance((4.0, 4.0, 0.0, 1.0))
    if family.two_calls:
        with pytest.raises(ValueError, match="evaluates the conditional branch first"), guide(pipe, method, **scale):
            family(pipe, [1], steps=4)
        return
    with Counted(family, pipe) as counted, guide(pipe, method, **scale) as guided:
        found = family(pipe, [1, 2], steps=4)
    assert guided.report.evaluations == [6, 6]
    assert counted.sizes == [4, 4, 2, 2]
    # the same with both branches evaluated everywhere
    network = getattr(pipe, family.attribute)
    original, calls = network.forward, []

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        calls.append(1)
        u, c = output[0].chunk(2)
        return (torch.cat({3: [u, u], 4: [c, c]}.get(len(calls), [u, c])), *output[1:])

    network.forward = forward
    try:
        expected = family(pipe, [1, 2], steps=4)
    finally:
        del network.forward
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
