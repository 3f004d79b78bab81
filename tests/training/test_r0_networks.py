"""R0 and R0+ on tiny networks of the real classes: gradients, adapters and their length, memory."""

from __future__ import annotations

import pytest
import torch

from diffalign.rewards.gradients import EqualRMS
from diffalign.training.climbing import Climb
from diffalign.training.contract import PromptBatch
from diffalign.training.objectives.r0 import R0, R0Plus
from diffalign.training.policy import Adaptation, Policy
from tests.families.test_contract import peak_bytes
from tests.families.tiny import ROWS
from tests.training.chained import (
    Weights,
    generator,
    loss_of,
    mean_value,
)

BOTH = pytest.mark.parametrize("kind", [R0, R0Plus])
PREDICTIONS = pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction"])
ALONE = {"guidance_reward": 0.0, "anchor": 0.0}


# ---- networks ----------------------------------------------------------------------------------------------------------------


@BOTH
def test_networks_get_a_finite_gradient_in_every_tensor(kind, pipelines):
    policy, reference, batch = pipelines
    objective = kind(Climb({"mean": mean_value, "contrast": lambda x, p: x.flatten(1).std(1)}, rule=EqualRMS()), steps=2)
    loss, figures = loss_of(objective, policy, reference, batch)
    network = getattr(policy.backbone, policy.backbone.denoiser)
    named = dict(network.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    reached = [name for name, g in zip(named, found, strict=True) if g is not None and g.isfinite().all() and g.any()]
    missed = sorted(set(named) - set(reached))
    assert len(reached) > 0.8 * len(named), missed
    assert all(g is None or g.isfinite().all() for g in found)
    assert figures["departure"] == pytest.approx(0, abs=1e-4)
    assert {"reward/mean", "reward/contrast", "guidance_cosine", "saturated"} <= set(figures)
    again, _ = loss_of(objective, policy, reference, batch)
    assert torch.equal(loss, again)


@BOTH
def test_networks_batch_equals_singles(kind, pipelines):
    policy, reference, batch = pipelines
    objective = kind(Climb({"contrast": lambda x, p: x.flatten(1).std(1)}), steps=2)
    _, whole = loss_of(objective, policy, reference, batch)
    singles = [
        loss_of(objective, policy, reference, PromptBatch(batch.conditioning.rows([i]), batch.seeds[i : i + 1]))[1] for i in range(2)
    ]
    for name in ("reward", "guidance_cosine", "image_gradient/contrast"):
        assert whole[name] == pytest.approx(sum(single[name] for single in singles) / 2, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("rank", [2, None])
def test_the_distance_of_the_weights_is_that_of_the_whole_network(rank):
    """An adapter's is the size of what it adds to the weights when it is made part of them."""
    row = ROWS["sd15"]
    policy = Policy(row.pipeline(row.aligned_class()), "unet", Adaptation(rank=rank, alpha=4.0))
    before = {name: p.clone() for name, p in row.pipeline(row.aligned_class()).unet.named_parameters()}
    assert policy.weight_distance().item() == 0
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(1)))
    distance = policy.weight_distance()
    gradients = torch.autograd.grad(distance, list(policy.parameters.values()))
    assert all(g.any() for g in gradients)
    if rank is not None:
        policy.backbone.fuse_lora()
        policy.backbone.unload_lora_weights()
    moved = sum((p - before[name]).square().sum() for name, p in policy.network.named_parameters())
    assert distance.item() == pytest.approx(moved.item(), rel=1e-3)


@pytest.mark.parametrize(("kind", "name"), [(R0, "sd3-medium"), (R0Plus, "sd15")])
def test_an_adapter_learns_what_the_reward_says_and_the_penalty_keeps_it_short(kind, name):
    row = ROWS[name]

    def learn(penalty: float) -> tuple[list[float], float]:
        pipe = row.pipeline(row.aligned_class())
        policy = Policy(pipe, pipe.denoiser, Adaptation(rank=4))
        batch = PromptBatch(pipe.encode(["a red circle", "two blue cups"], size=pipe.size_of(row.call)), (4, 9))
        objective = kind(Climb({"mean": mean_value}), steps=2, guidance_reward=0.0, anchor=0.01, weight_penalty=penalty,
                         weight_distance=policy.weight_distance)  # fmt: skip
        optimizer = torch.optim.Adam(policy.parameters.values(), 0.02)
        rewards = []
        for step in range(6):
            loss, figures = loss_of(objective, policy.denoiser(), policy.reference(), batch, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rewards.append(figures["reward"])
        assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters.values())
        return rewards, policy.weight_distance().item()

    (rewards, far), (_, near) = learn(0.0001), learn(10.0)
    assert rewards == sorted(rewards)
    assert rewards[-1] > rewards[0] + 0.001
    assert near < 0.7 * far


class LastStep(R0Plus):
    """R0+ where it costs most."""

    def stops(self, seeds, steps):
        return [steps - 1] * len(seeds)


def test_memory_of_r0_plus_does_not_grow_with_the_steps():
    row = ROWS["sd15"]
    pipe = row.pipeline(row.aligned_class())
    pipe.vae.requires_grad_(False)
    network = getattr(pipe, pipe.denoiser)
    policy, batch = Weights(pipe), PromptBatch(pipe.encode(["a red circle"], size=pipe.size_of(row.call)), (4,))

    def peak(kind, steps: int) -> int:
        def run():
            loss, _ = loss_of(kind(Climb({"mean": mean_value}), steps=steps), policy, policy, batch)
            loss.backward()
            network.zero_grad(set_to_none=True)

        return peak_bytes(run)

    peak(LastStep, 2)  # what the first call alone allocates
    flat = [peak(LastStep, steps) for steps in (2, 4, 8)]
    growing = [peak(R0, steps) for steps in (1, 2, 4, 8)]
    assert max(flat) < 1.02 * min(flat)
    assert max(flat) < 1.001 * min(flat)
    assert growing[3] - growing[2] == pytest.approx(2 * (growing[2] - growing[1]), rel=0.01)  # so much a step
    assert growing[3] > 1.5 * max(flat)
