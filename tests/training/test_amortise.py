"""Training a noise policy: its loss worked by hand, and from prompts to a folder that AmortisedNoise uses, stopped and resumed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import diffalign
from diffalign.backbone import Conditioning
from diffalign.noise_policy import NoisePolicy, PolicyShape
from diffalign.training.contract import PromptBatch
from diffalign.training.data import seeded
from diffalign.training.loop import LoopSettings
from diffalign.training.objectives.noise import NOISE, AmortiseNoise, NoiseLearner
from tests.methods.test_amortised import PROMPTS, Redness, call
from tests.tiny import tiny_stable_diffusion

SHAPE = (1, 2, 2)


def batch(count: int) -> PromptBatch:
    text = torch.randn(count, 5, 12, generator=torch.Generator().manual_seed(0))
    return PromptBatch(Conditioning(tuple("abcd"[:count]), {"prompt_embeds": text}), tuple(range(10, 10 + count)))


def learner(form: str = "residual") -> NoiseLearner:
    """The image of a noise is the noise; R = slope . eps, so that its gradient is the slope."""
    torch.manual_seed(0)
    return NoiseLearner(NoisePolicy(PolicyShape(SHAPE, 12, form, width=16, heads=2)), lambda noise, conditioning: noise)


def score(slope: float):
    return lambda images, prompts: slope * images.flatten(1).sum(1)


def test_the_loss_by_hand():
    """A bias of 0.5: kl 0.125. The slope 3 everywhere has norm 6, clipped to 1: 0.5 everywhere. loss = 8 * 0.125 - mean 0.5 sum eps'."""
    who = learner()
    torch.nn.init.constant_(who.policy.write.bias, 0.5)
    drawn = torch.stack([torch.randn(SHAPE, generator=seeded(seed, NOISE)) for seed in (10, 11)])
    moved = drawn + 0.5
    moved = moved * (drawn.flatten(1).norm(dim=1) / moved.flatten(1).norm(dim=1)).view(2, 1, 1, 1)
    loss, figures = AmortiseNoise(score(3.0), clip=1.0, pull=8.0).loss(who, who, batch(2), torch.Generator())
    assert loss.item() == pytest.approx(1.0 - (0.5 * moved.flatten(1).sum(1)).mean().item(), abs=1e-5)
    assert figures["kl_per_entry"] == pytest.approx(0.125)
    assert figures["noise_gradient"] == pytest.approx(6, rel=1e-5)
    assert figures["reward"] == pytest.approx((3 * moved.flatten(1).sum(1)).mean().item(), rel=1e-4)


def test_a_gradient_below_the_clip_is_left_as_it_is():
    """Slope 0.25: norm 0.5 < 1."""
    who = learner()
    loss, figures = AmortiseNoise(score(0.25), clip=1.0, pull=0.0).loss(who, who, batch(2), torch.Generator())
    assert loss.item() == pytest.approx(-figures["reward"], abs=1e-5)


@pytest.mark.parametrize("form", ["residual", "distribution"])
def test_steps_along_it_raise_the_reward_and_the_pull_holds_the_policy_back(form):
    def trained(pull: float) -> dict[str, float]:
        who, objective = learner(form), AmortiseNoise(score(1.0), pull=pull)
        optimizer = torch.optim.Adam(who.parameters.values(), lr=1e-2)
        for _ in range(40):
            loss, figures = objective.loss(who, who, batch(4), torch.Generator())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return figures

    _, before = AmortiseNoise(score(1.0)).loss(learner(form), None, batch(4), torch.Generator())
    free, held = trained(0.01), trained(100.0)
    assert free["reward"] > before["reward"] + 1
    assert held["kl_per_entry"] < 0.1 * free["kl_per_entry"]


def test_a_reward_or_a_model_without_what_it_needs_is_refused():
    who = learner()
    with pytest.raises(TypeError, match="no gradient"):
        AmortiseNoise(lambda images, prompts: torch.zeros(len(images))).loss(who, who, batch(2), torch.Generator())
    with pytest.raises(ValueError, match="reads prompt_embeds"):
        who.move(torch.zeros(1, *SHAPE), Conditioning(("a",), {"text": torch.zeros(1, 2)}))
    with pytest.raises(ValueError, match="clip must be above 0"):
        AmortiseNoise(score(1.0), clip=0.0)


def test_from_prompts_to_a_folder_stopped_and_resumed(tmp_path, monkeypatch):
    """Stopped inside the third step, after the second was saved."""

    def train(folder, **more):
        settings = LoopSettings(steps=3, lr=1e-2, batch_size=2, save_every=1, schedule="cosine")
        return diffalign.train_noise(
            PROMPTS, Redness(), pipeline=tiny_stable_diffusion(), out=tmp_path / folder, width=16, settings=settings, **more
        )

    assert train("whole").step == 3
    step, made = torch.optim.AdamW.step, []

    def interrupted(self, *args, **named):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    train("stopped", resume=True)
    one, two = (load_file(tmp_path / name / "noise_policy.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["write.weight"].abs().max() > 0
    card = json.loads((tmp_path / "whole" / "card.json").read_text())
    assert (card["steps"], card["data"]["prompts"], card["data"]["reward"]) == (3, 3, "redness")
    out = call(tiny_stable_diffusion(), PROMPTS, 3, diffalign.AmortisedNoise(tmp_path / "whole"))
    assert out.images.shape == (3, 3, 32, 32)
