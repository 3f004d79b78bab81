"""Trajectories: what they hold, what they depend on, and that evaluating them again changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.diffusion import Step
from diffalign.training.objectives.d3po import D3PO
from diffalign.training.objectives.ddpo import DDPO
from diffalign.training.objectives.parrot import Parrot
from diffalign.training.policy import Adaptation, Policy
from diffalign.training.rollouts import Rollouts, as_rewards, finite_rows, log_ratio, score_figures, step_kl
from tests.training.rollout_toys import QUICK, REAL, Network, assert_gradients, brightness, frozen, mean_value, prompts, real, toy

SETTINGS = {
    "ddim": Rollouts(images=3),
    "guided": Rollouts(images=3, guidance_scale=2.5, eta=0.6),
    "window": Rollouts(images=3, window=(1, 3)),
    "chunks": Rollouts(images=3, batch_size=4, guidance_scale=2.0),
    "sde": Rollouts(images=3, sampler="flow_sde", eta=0.7),
}


@pytest.fixture(params=["flow", "epsilon", "v_prediction"])
def policy(request):
    return toy(request.param)


@pytest.mark.parametrize("name", SETTINGS)
def test_evaluated_again_nothing_has_changed_to_the_bit(policy, name):
    rollouts = SETTINGS[name]
    if name == "sde" and policy.backbone.prediction != "flow":
        pytest.skip("the flow SDE is for flows")
    made = rollouts.make(policy, prompts(policy, "1", "2"))
    for i in made.steps:
        step = rollouts.step(policy, made, i)
        ratio = log_ratio(step, made, i)
        assert torch.equal(ratio.detach(), torch.zeros(6))
        (gradient,) = torch.autograd.grad(ratio[0], policy.backbone.gain)
        assert gradient != 0
        assert torch.equal(step_kl(step, rollouts.step(frozen(policy), made, i)).detach(), torch.zeros(6))


def test_what_is_held(policy):
    made = Rollouts(images=3).make(policy, prompts(policy, "1", "2"))
    assert made.steps == (0, 1, 2)  # the fourth ends at a clean image
    assert sorted(made.states) == [0, 1, 2, 3]
    assert made.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert made.conditioning.prompts == ("1", "1", "1", "2", "2", "2")
    assert (len(made), made.entries, made.evaluations) == (6, 16, 24)
    assert not made.latents.requires_grad
    assert (made.row(1, 0), made.row(0, 2)) == (3, 2)
    with pytest.raises(IndexError, match="group 0 holds 3 images, and there is no number 3"):
        made.row(0, 3)
    part = made.take([4, 0])
    assert part.groups.tolist() == [1, 0]
    assert part.conditioning.prompts == ("2", "1")
    for i in part.steps:
        assert torch.equal(log_ratio(Rollouts(images=3).step(policy, part, i), part, i).detach(), torch.zeros(2))


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("flow_sde", 0.7)])
def test_the_step_to_a_clean_image_is_deterministic(sampler, eta):
    made = Rollouts(images=2, sampler=sampler, eta=eta).make(toy(), prompts(toy(), "1"))
    assert made.steps == (0, 1, 2)


def test_images_depend_on_their_prompts_seed_and_number_alone(policy):
    batch = prompts(policy, "1", "2", first=4)
    whole = Rollouts(images=3).make(policy, batch)
    assert torch.equal(whole.latents, Rollouts(images=3).make(policy, batch).latents)
    assert torch.equal(whole.latents, Rollouts(images=3, batch_size=2).make(policy, batch).latents)
    alone = Rollouts(images=2).make(policy, prompts(policy, "2", first=5))
    assert torch.equal(alone.latents, whole.latents[3:5])
    assert torch.equal(alone.log_probs[1], whole.log_probs[1][3:5])
    turned = Rollouts(images=3).make(policy, type(batch)(batch.conditioning.rows([1, 0]), (5, 4)))
    assert torch.equal(turned.latents, whole.latents[[3, 4, 5, 0, 1, 2]])
    others = Rollouts(images=3).make(policy, prompts(policy, "1", "2", first=50))
    assert not torch.isclose(others.latents, whole.latents).any()
    assert len({float(x.sum()) for x in whole.states[0]}) == 6


def test_shared_noise_and_windows(policy):
    made = Rollouts(images=3, shared_noise=True, window=(1, 3)).make(policy, prompts(policy, "1", "2"))
    assert made.steps == (1, 2)
    first = made.states[1]  # after a deterministic step from the same noise
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[3])
    assert not torch.equal(made.states[2][0], made.states[2][2])


def test_the_steps_of_a_loss_are_drawn_from_the_generator(policy):
    rollouts = Rollouts(images=2, trained=2)
    made = rollouts.make(policy, prompts(policy, "1"))
    drawn = [rollouts.chosen(made, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert drawn == [rollouts.chosen(made, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert set(drawn) == {(0, 1), (0, 2), (1, 2)}
    assert Rollouts(images=2, trained=9).chosen(made, torch.Generator()) == (0, 1, 2)


def test_checkpointing_changes_no_gradient(policy):
    found = []
    for rollouts in (Rollouts(images=2, guidance_scale=2.0), Rollouts(images=2, guidance_scale=2.0, checkpoint=True, batch_size=3)):
        made = rollouts.make(policy, prompts(policy, "1", "2"))
        found.append(torch.autograd.grad(log_ratio(rollouts.step(policy, made, 1), made, 1).sum(), policy.backbone.gain)[0])
    torch.testing.assert_close(*found)


def test_log_ratio_and_divergence_by_hand():
    """Two entries, std 2. Mean moved from (0, 0) to (1, 0), and (1, 2) was drawn: (1 + 4 - 0 - 4) / 8 = 1/8; |(1, 0)|^2 / 8 = 1/8."""
    made = Rollouts(images=2).make(toy(), prompts(toy(), "1"))
    x = torch.tensor([[1.0, 2.0]])
    step, before = Step(torch.tensor([[1.0, 0.0]]), 2.0, x), Step(torch.zeros(1, 2), 2.0, x)
    held = type(made)(made.conditioning, made.groups[:1], made.schedule, (0,), {0: x, 1: x}, {}, x, 0)
    then = torch.tensor([-(1 + 4) / 8 - 2 * (math.log(2) + 0.5 * math.log(2 * math.pi))])
    assert log_ratio(step, held, 0, then).item() == pytest.approx(1 / 8)
    assert step_kl(step, before).item() == pytest.approx(1 / 8)


# ---- scores ------------------------------------------------------------------------------------------------------------------


def test_scores_come_by_name_and_in_parts(policy):
    def largest(images, texts):
        return torch.tensor([float(text) for text in texts])

    rollouts = Rollouts(images=2, batch_size=3)
    made = rollouts.make(policy, prompts(policy, "1", "2"))
    scores = rollouts.score(policy.backbone, made, {"value": mean_value, "text": largest})
    torch.testing.assert_close(scores[:, 0], made.latents.flatten(1).mean(1))
    assert scores[:, 1].tolist() == [1, 1, 2, 2]
    assert list(as_rewards(mean_value)) == ["reward"]
    broken = torch.tensor([[1.0, 2.0], [float("nan"), 2.0], [3.0, float("inf")], [3.0, 4.0]])
    assert finite_rows(broken).tolist() == [True, False, False, True]
    assert score_figures(broken, ["a", "b"]) == {"score/a": 2.0, "score/b": 3.0, "broken": 0.5}
    with pytest.raises(ValueError, match=r"reward gave scores of shape \(1,\) for 3 images"):
        rollouts.score(policy.backbone, made, lambda images, texts: torch.zeros(1))
    with pytest.raises(ValueError, match="rewards is empty"):
        as_rewards({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "images must be a whole number of at least 1, got 0"),
        ({"images": None}, "images must be a whole number"),
        ({"trained": 0}, "trained must be a whole number"),
        ({"sampler": "euler"}, "sampler must be 'ddim' or 'flow_sde', got 'euler'"),
        ({"eta": 0.0}, "eta must be above 0"),
        ({"eta": 1.2}, "eta must be above 0, and for 'ddim' at most 1"),
        ({"window": (2, 2)}, "window must be"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Rollouts(**changes)


def test_a_window_without_decisions_is_refused():
    with pytest.raises(ValueError, match="no step within window"):
        Rollouts(images=2, window=(3, 4)).make(toy(), prompts(toy(), "1"))


# ---- real networks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_tiny_pipelines_give_a_ratio_of_one_and_gradients_everywhere(name):
    policy, batch = real(name)
    made = QUICK.make(policy, batch)
    nats = [log_ratio(QUICK.step(policy, made, i), made, i) for i in made.steps]
    assert len(nats) >= 2
    for each in nats:
        assert each.abs().max() == 0
    assert QUICK.score(policy.backbone, made, brightness).shape == (4, 1)
    torch.stack(nats).sum().backward()
    assert_gradients({name: weight.grad for name, weight in policy.module.named_parameters()})


@pytest.mark.parametrize("name", ["sd15", "sd3-medium"])
def test_adapters_learn_on_rollouts(name):
    """The policy as tuning makes it: each objective begins at the reference, moves the adapter, and leaves the reference where it was."""
    network, batch = real(name)
    learner = Policy(network.backbone, network.backbone.denoiser, Adaptation(rank=2))
    policy, reference = learner.denoiser(), learner.reference()
    before = reference(*first_call(policy, batch))
    for objective in (
        DDPO(brightness, rollouts=QUICK, kl=0.1),
        D3PO(brightness, rollouts=QUICK, anchor="reference"),
        Parrot(brightness, rollouts=QUICK),
    ):
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(learner.parameters.values(), lr=3e-4)
        collected = objective.collect(policy, batch, generator)
        first, _ = objective.loss(policy, reference, collected, generator)
        optimizer.zero_grad(set_to_none=True)
        first.backward()
        assert_gradients({key: p.grad for key, p in learner.parameters.items() if "lora_B" in key and "1.attn.add_q_proj" not in key})
        optimizer.step()
        second, _ = objective.loss(policy, reference, collected, generator)
        assert second < first
    assert torch.equal(reference(*first_call(policy, batch)), before)
    assert not torch.equal(policy(*first_call(policy, batch)), before)


def first_call(policy, batch):
    """The arguments of the first evaluation of a rollout."""
    made = QUICK.make(Network(policy.backbone), batch)
    shape = made.states[made.steps[0]][:2].shape
    return torch.ones(shape), made.schedule.timesteps[0], batch.conditioning, 1.0
