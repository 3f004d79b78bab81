"""AmortisedNoise through a pipeline: one evaluation and one pass, batches, several candidates, what it refuses."""

from __future__ import annotations

import pytest
import torch

from diffalign.methods import AmortisedNoise, BestOfN
from diffalign.noise_policy import NoisePolicy, PolicyShape
from diffalign.types import RewardScores
from tests.tiny import WIDTH, tiny_stable_diffusion

PROMPTS = ["a red ring", "a blue star", "two hearts"]


class Redness:
    """The mean of the red channel."""

    name, differentiable = "redness", True

    def prepare(self, prompts):
        pass

    def __call__(self, images, prompts):
        total = images[:, 0].mean((1, 2))
        return RewardScores(total, {"red": total})


@pytest.fixture(scope="module")
def pipe():
    return tiny_stable_diffusion()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipe):
    """A policy with an output layer that is not zero."""
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    policy = NoisePolicy(PolicyShape(pipe.noise_shape(), WIDTH, width=16, heads=2))
    torch.nn.init.normal_(policy.write.weight, std=0.3)
    policy.save(folder)
    return folder


def call(pipe, prompts, seed, method):
    return pipe(prompts, seed=seed, num_inference_steps=1, guidance_scale=1.0, output_type="pt", plugins=[method])


def test_one_call_costs_one_evaluation_and_one_pass_of_the_policy(pipe, folder, monkeypatch):
    passes = {"unet": 0, "policy": 0}
    method = AmortisedNoise(folder)
    for name, module in (("unet", pipe.unet), ("policy", method.policy)):
        forward = module.forward

        def counted(*args, name=name, forward=forward, **named):
            passes[name] += 1
            return forward(*args, **named)

        monkeypatch.setattr(module, "forward", counted)
    out = call(pipe, PROMPTS, 3, method)
    assert passes == {"unet": 1, "policy": 1}
    assert out.trace.best == [0, 0, 0]
    assert [(cost.evaluations, cost.backward_passes, cost.reward_calls) for cost in out.cost] == [(1, 0, 0)] * 3
    again = pipe(PROMPTS, latents=out.noise, num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    torch.testing.assert_close(again, out.images, atol=1e-5, rtol=1e-5)
    stock = pipe(PROMPTS, seed=3, num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    assert (stock - out.images).abs().max() > 1e-3


def test_the_noise_is_the_policys_of_the_models_own_text(pipe, folder):
    out = call(pipe, PROMPTS, 3, AmortisedNoise(folder))
    conditioning = pipe.encode(PROMPTS, unconditional=False)
    drawn = pipe.draw_noise([torch.Generator().manual_seed(3 + i) for i in range(3)])
    expected = NoisePolicy.load(folder)(drawn, conditioning.tensors["prompt_embeds"]).noise
    torch.testing.assert_close(out.noise, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 3])
def test_a_batch_equals_its_samples_alone(budget, pipe, folder):
    method = AmortisedNoise(folder, Redness(), budget=budget, batch_size=2)
    together = call(pipe, PROMPTS, [5, 6, 7], method)
    for i in range(3):
        alone = call(pipe, [PROMPTS[i]], [5 + i], method)
        torch.testing.assert_close(alone.images[0], together.images[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.noise[0], together.noise[i], atol=1e-5, rtol=1e-5)
        assert alone.trace.rewards["total"][0] == pytest.approx(together.trace.rewards["total"][i], abs=1e-5)


def test_several_candidates_are_those_of_best_of_n_moved(pipe, folder, tmp_path):
    """A policy of zeros moves nothing: then it is best-of-N."""
    NoisePolicy(PolicyShape(pipe.noise_shape(), WIDTH, width=16, heads=2)).save(tmp_path)
    drawn = call(pipe, PROMPTS, 5, BestOfN(Redness(), budget=4))
    same = call(pipe, PROMPTS, 5, AmortisedNoise(tmp_path, Redness(), budget=4))
    torch.testing.assert_close(same.noise, drawn.noise, atol=1e-5, rtol=1e-5)
    moved = call(pipe, PROMPTS, 5, AmortisedNoise(folder, Redness(), budget=4))
    assert [len(series) for series in moved.trace.rewards["total"]] == [4, 4, 4]
    for series, best in zip(moved.trace.rewards["total"], moved.trace.best, strict=True):
        assert series.index(max(series)) == best
        assert series != pytest.approx(drawn.trace.rewards["total"][0], abs=1e-4)
    assert moved.trace.settings["budget"] == 4


def test_what_it_refuses(pipe, folder, tmp_path, curved):
    with pytest.raises(ValueError, match=r"budget=4 needs reward="):
        AmortisedNoise(folder, budget=4)
    with pytest.raises(ValueError, match="budget must be"):
        AmortisedNoise(folder, Redness(), budget=0)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        AmortisedNoise(tmp_path / "nothing")
    with pytest.raises(ValueError, match="trained for one model"):
        AmortisedNoise(folder, curved.reward()).search(curved.problem([3]))
    NoisePolicy(PolicyShape((4, 8, 8), WIDTH, width=16)).save(tmp_path)
    with pytest.raises(ValueError, match=r"noise of shape \(4, 8, 8\)"):
        call(pipe, PROMPTS, 5, AmortisedNoise(tmp_path))
