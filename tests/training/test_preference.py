"""The preference kernel, DPO and DCPO: values worked by hand, symmetries, gradients, and a toy that they move the right way."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from diffalign.diffusion import add_noise
from diffalign.sampling import rollout
from diffalign.training.contract import PairBatch
from diffalign.training.denoising import errors, in_one_batch, space_weight
from diffalign.training.objectives.dcpo import DCPO
from diffalign.training.objectives.inpo import InPO
from diffalign.training.objectives.preference import DPO, accuracy, preference_loss, score_weights
from diffalign.training.policy import Adaptation, Policy
from tests.families.tiny import ROWS
from tests.test_sampling import Gaussian
from tests.training.preference_toy import (
    Scripted,
    frozen,
    nudge,
    pairs,
    real,
    real_pairs,
    seeded,
    silence,
    swapped,
    toy,
    train,
    unreached,
    unused,
)

PREDICTIONS = ("epsilon", "v_prediction", "flow")


# ---- by hand -------------------------------------------------------------------------------------------------------------------


def test_a_loss_worked_by_hand():
    """Errors .01 and .09 of the policy, .04 and .04 of the reference: logit -25 ((.01 - .04) - (.09 - .04)) = 2."""
    policy, reference = Scripted(0.1, 0.3), Scripted(0.2, 0.2)
    loss, figures = DPO(beta=50).compare(policy, reference, pairs(1), seeded(), silence)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)
    assert figures["margin"] == pytest.approx(2, rel=1e-5)
    assert figures["implicit_accuracy"] == 1
    assert figures["winner_drift"] == pytest.approx(-0.03, rel=1e-5)
    assert figures["loser_drift"] == pytest.approx(0.05, rel=1e-5)
    assert figures["winner_error"] == pytest.approx(0.01, rel=1e-5)


def test_its_gradient_worked_by_hand():
    """d loss / d e_w = beta / 2 sigmoid(-2), and d e_w / d output = 2 output; for the loser the sign is the other."""
    policy = Scripted(0.1, 0.3)
    loss, _ = DPO(beta=50).compare(policy, Scripted(0.2, 0.2), pairs(1), seeded(), silence)
    loss.backward()
    wrong = 1 / (1 + math.exp(2))
    torch.testing.assert_close(policy.outputs.grad, torch.tensor([25 * wrong * 0.2, -25 * wrong * 0.6]))


def test_forms_smoothing_and_anchor_worked_by_hand():
    logits = torch.tensor([2.0, -1.0])
    torch.testing.assert_close(preference_loss(logits, "ipo"), torch.tensor([2.25, 2.25]))
    torch.testing.assert_close(preference_loss(logits, "hinge"), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(preference_loss(logits, "hinge", 0.25), torch.tensor([0.25 * 3, 0.75 * 2]))
    policy, reference = Scripted(0.1, 0.3), Scripted(0.2, 0.2)
    plain, _ = DPO(beta=50).compare(policy, reference, pairs(1), seeded(), silence)
    anchored, _ = DPO(beta=50, anchor=3).compare(policy, reference, pairs(1), seeded(), silence)
    assert (anchored - plain).item() == pytest.approx(0.03, rel=1e-4)


def test_weights_worked_by_hand():
    """Logits 2 and 2; weights .5 and 0 count the loss half and not at all, or make the logits 1 and 0."""
    policy, reference = Scripted(0.1, 0.1, 0.3, 0.3), Scripted(0.2, 0.2, 0.2, 0.2)
    batch = replace(pairs(2), weights=torch.tensor([0.5, 0.0]))
    loss, _ = DPO(beta=50).compare(policy, reference, batch, seeded(), silence)
    assert loss.item() == pytest.approx(0.25 * math.log(1 + math.exp(-2)), rel=1e-5)
    loss, _ = DPO(beta=50, weights_on="logit").compare(policy, reference, batch, seeded(), silence)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2, rel=1e-5)


def test_weights_from_scores():
    """p = sigmoid(.01 / .1666) = .515: a hundredth of PickScore counts .3; the sign follows the judge."""
    weights = score_weights(torch.tensor([0.22, 0.21, 0.2, 9.0]), torch.tensor([0.21, 0.22, 0.2, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([0.3001, -0.3001, 0.0, 10.0]), rtol=0, atol=1e-3)


def test_a_pair_that_is_undecided_counts_half():
    assert accuracy(torch.tensor([1.0, -1.0, 0.0, 3.0])) == 0.625


# ---- symmetries ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("objective", [DPO(), InPO(steps=3), DCPO(), DCPO(InPO(steps=3))], ids=lambda o: o.name)
def test_the_policy_as_it_was_gives_exactly_log_2(prediction, objective):
    policy = toy(prediction)
    loss, figures = objective.loss(policy, frozen(policy), pairs(captions=objective.name == "dcpo"), seeded())
    assert loss.item() == torch.tensor(2.0).log().item()
    assert (figures["margin"], figures["implicit_accuracy"], figures["winner_drift"]) == (0, 0.5, 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("captions", [False, True])
def test_swapping_winner_and_loser_flips_the_sign(prediction, captions):
    policy, reference, batch = toy(prediction, gain=1.1), toy(prediction), pairs(captions=captions)
    for objective in (DPO(beta=20), InPO(DPO(beta=20), steps=3)):
        margins = [objective.loss(policy, reference, each, seeded())[1]["margin"] for each in (batch, swapped(batch))]
        assert abs(margins[0]) > 1e-3
        assert margins[0] == pytest.approx(-margins[1], rel=1e-4)


def test_a_batch_equals_its_pairs_alone_in_any_order():
    """Mixed t, states held fixed: each pair's loss is its own."""
    policy, reference, batch = toy("v_prediction", gain=1.1), toy("v_prediction"), pairs(4, captions=True)
    samples = in_one_batch(batch, policy.backbone, seeded())
    eps = torch.randn(samples.clean.shape, generator=seeded(1))
    x = add_noise(samples.clean, eps, samples.signal, samples.noise)
    order = [2, 0, 3, 1]
    for rows in ([0], [1], [2], [3], order):
        some = [*rows, *(4 + row for row in rows)]
        part = replace(samples, clean=samples.clean[some], conditioning=samples.conditioning.rows(some), timesteps=samples.timesteps[some],
                       signal=samples.signal[some], noise=samples.noise[some])  # fmt: skip
        for network in (policy, reference):
            together = errors(network, samples, x, eps, "network")[some]
            torch.testing.assert_close(errors(network, part, x[some], eps[some], "network"), together)


def test_the_same_seed_gives_the_same_loss_to_the_bit():
    policy, reference = toy(gain=1.1), toy()
    for objective in (DPO(beta=5), InPO(DPO(beta=5), steps=2, injection=0.1)):
        first, again, other = (objective.loss(policy, reference, pairs(), seeded(seed))[0].item() for seed in (4, 4, 5))
        assert first == again != other


def test_winner_and_loser_share_noise_and_time():
    seen = []
    policy = toy()
    policy.backbone.denoise = lambda x, t, c, w=1.0: seen.append((x, t)) or torch.zeros_like(x)
    batch = pairs(4)
    same = PairBatch(batch.winners, batch.winners, batch.conditioning)
    DPO().loss(policy, policy, same, seeded())
    assert len(seen) == 2  # one call of the policy, one of the reference, on the same states
    assert torch.equal(seen[0][0], seen[1][0])
    for x, t in seen:
        assert torch.equal(*x.chunk(2))
        assert torch.equal(*t.chunk(2))
        assert len(t.unique()) == 4


# ---- what the errors are of -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["epsilon", "x0"])
def test_eps_v_and_sample_networks_of_one_oracle_agree(space):
    objective = DPO(beta=2, space=space)
    figures = [objective.loss(toy(kind, gain=1.1), toy(kind), pairs(), seeded())[1] for kind in ("epsilon", "v_prediction", "sample")]
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=2e-3)


def test_a_flow_network_is_weighed_by_a_squared():
    signal = torch.tensor([0.75, 0.25])
    torch.testing.assert_close(space_weight("epsilon", "flow", signal, 1 - signal), torch.tensor([0.5625, 0.0625]))
    torch.testing.assert_close(space_weight("x0", "flow", signal, 1 - signal), torch.tensor([0.0625, 0.5625]))
    assert space_weight("network", "flow", signal, 1 - signal) == 1
    with pytest.raises(ValueError, match=r"space.*'x0'.*epsilon"):
        space_weight("x0", "epsilon", torch.zeros(1), torch.ones(1))


# ---- real networks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_on_tiny_networks(prediction):
    """log 2 at the start; then a gradient for every tensor of the policy, none for the reference."""
    policy, reference = real(prediction)
    batch = real_pairs(policy, captions=True)
    for objective in (DPO(), DCPO(InPO(steps=2))):
        loss, _ = objective.loss(policy, reference, batch, seeded())
        assert loss.item() == torch.tensor(2.0).log().item()
    nudge(policy)
    idle = unused(policy, batch)
    assert len(idle) < 5
    for objective in (DPO(beta=10), DCPO(InPO(DPO(beta=10), steps=2))):
        loss, figures = objective.loss(policy, reference, batch, seeded())
        assert loss.item() != torch.tensor(2.0).log().item()
        loss.backward()
        assert unreached(policy) == idle
        assert len(unreached(reference)) == len(list(getattr(reference.backbone, reference.backbone.denoiser).parameters()))
        assert all(math.isfinite(value) for value in figures.values())
        getattr(policy.backbone, policy.backbone.denoiser).zero_grad()


@pytest.mark.parametrize("family", ["sdxl", "flux-dev", "pixart-sigma", "sana-sprint", "wan2.1-1.3b"])
def test_other_families_take_pairs_too(family):
    """Packed latents, video, an embedded scale, angles for times: nothing of it is the kernel's business."""
    network = real(family=family)[0]
    scale = 3.5 if family in ("flux-dev", "sana-sprint") else None
    size = network.backbone.size_of({**network.backbone.defaults, **ROWS[family].call})
    batch = real_pairs(network, captions=True, size=size, embedded_scale=scale)
    for objective in (DPO(), DCPO(InPO(steps=2))):
        loss, figures = objective.loss(network, network, batch, seeded())
        assert loss.item() == torch.tensor(2.0).log().item()
        assert 0 < figures["winner_error"] < 5


def test_an_adapter_that_is_switched_off_is_the_reference():
    """As the loop trains: exactly log 2 before the first step, and a step lowers the loss of the same batch."""
    row = ROWS["sd-turbo"]
    policy = Policy(row.pipeline(row.aligned_class()), "unet", Adaptation(rank=4))
    batch = real_pairs(policy.denoiser())
    for objective in (DPO(beta=20), InPO(DPO(beta=20), steps=2)):
        optimizer = torch.optim.Adam(policy.parameters.values(), lr=1e-3)
        losses = []
        for _ in range(4):
            loss, _ = objective.loss(policy.denoiser(), policy.reference(), batch, seeded())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        if objective.name == "dpo":
            assert losses[0] == torch.tensor(2.0).log().item()


# ---- captions ------------------------------------------------------------------------------------------------------------------


def test_dcpo_with_one_caption_is_dpo_to_the_bit():
    policy, reference, batch = toy(gain=1.1), toy(), pairs()
    double = replace(batch, losers_conditioning=batch.conditioning)
    for inner in (DPO(beta=20), InPO(DPO(beta=20), steps=3)):
        plain, _ = inner.loss(policy, reference, batch, seeded())
        dual, figures = DCPO(inner).loss(policy, reference, double, seeded())
        assert plain.item() == dual.item()
        assert figures["same_captions"] == 1


def test_each_image_is_seen_under_its_own_caption():
    """Losers exactly at their caption's number: the policy's error on them is that of its caption, not of the winner's."""
    policy, batch = toy(), pairs(captions=True)
    own = DCPO(DPO(beta=1)).loss(policy, toy(gain=0.5), batch, seeded())[1]
    foreign = DPO(beta=1).loss(policy, toy(gain=0.5), replace(batch, losers_conditioning=None), seeded())[1]
    assert own["winner_error"] == foreign["winner_error"]
    assert own["loser_drift"] < 0 < foreign["loser_drift"]
    assert own["same_captions"] == 0


def test_dcpo_needs_captions_that_fit():
    policy, batch = toy(), pairs()
    with pytest.raises(ValueError, match="losers_conditioning"):
        DCPO().loss(policy, policy, batch, seeded())
    texts = batch.conditioning
    longer = replace(texts, tensors={"prompt_embeds": torch.zeros(3, 2), "negative_prompt_embeds": torch.zeros(3, 2)})
    for other, match in ((longer, "shapes"), (replace(texts, embedded_scale=3.5), "embedded_scale"), (texts.rows([0]), "as many prompts")):
        with pytest.raises(ValueError, match=match):
            DCPO().loss(policy, policy, replace(batch, losers_conditioning=other), seeded())


# ---- learning -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("form", ["sigmoid", "ipo", "hinge"])
def test_what_is_preferred_becomes_more_frequent(prediction, form):
    """Images of "2" lie around 2. After training with winners around 3 and losers around 1, more than 2 is what most images are."""
    policy = toy(prediction)
    before = frozen(policy)
    objective = DPO(beta=0.5 if form == "ipo" else 5, form=form)  # IPO stops where the logit is 1/2
    losses = train(objective, policy, (pairs(8, seed=100 + step) for step in range(40)))
    assert sum(losses[-5:]) < sum(losses[:5])
    _, figures = objective.loss(policy, before, pairs(200, seed=1), seeded(99))
    assert figures["implicit_accuracy"] > 0.9
    shares = [above_two(network, prediction) for network in (before, policy)]
    assert shares[0] < 0.7
    assert shares[1] > shares[0] + 0.2


def above_two(network, prediction) -> float:
    """The share of generated pixels above 2, by rollout."""
    sampler = Gaussian(prediction, spread=0.3)
    with torch.no_grad():
        sampler.gain.copy_(network.backbone.gain)
        noise = torch.randn(64, 1, 4, 4, generator=seeded(11))
        return (rollout(sampler, noise, sampler.encode(["2"] * 64), sampler.schedule()).latents > 2).float().mean().item()


# ---- settings -------------------------------------------------------------------------------------------------------------------


def test_settings_are_plain_and_checked():
    for objective in (DPO.paper(), InPO.paper(), DCPO.paper(), DCPO(InPO(DPO(form="ipo")))):
        settings = objective.settings()
        assert json.loads(json.dumps(settings)) == settings
        assert settings["name"] == objective.name
        batch = pairs()
        assert objective.collect(toy(), batch, seeded()) is batch
    wrong = {"beta": 0, "form": "log", "label_smoothing": 0.5, "anchor": -1, "space": "v", "weights_on": ""}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            DPO(**{name: value})


def test_pairs_are_of_one_size():
    batch = pairs()
    with pytest.raises(ValueError, match="losers have shape"):
        DPO().loss(toy(), toy(), replace(batch, losers=batch.losers[..., :2]), seeded())
