"""Experts of ranges of noise: the update by hand, a reward that stays untouched, what they learn, and how a run goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign.files import read_json
from diffalign.methods import FKSteering, Guide, SeedPruning
from diffalign.methods.experts import Experts, adaptable_layers
from diffalign.methods.experts_fit import ExpertSettings, train_experts, within_prompts
from diffalign.types import RewardScores
from tests.methods.test_particles import problem
from tests.test_sampling import Gaussian


class Net(nn.Module):
    """A little reward of weights: a convolution, a linear layer; its text layer sees prompts alone."""

    differentiable = True
    text_modules = ("text",)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.head = nn.Linear(4, 1)
            self.text = nn.Linear(2, 2)
        self.requires_grad_(False)

    def prepare(self, prompts) -> None:
        pass

    def forward(self, images, prompts) -> RewardScores:
        total = self.head(torch.relu(self.conv(2 * images - 1)).mean(dim=(2, 3))).squeeze(1)
        return RewardScores(total, {"net": total})


class Toy(Gaussian):
    """The Gaussian world with images in [0, 1]; every entry of a sample moves its brightness."""

    def __init__(self) -> None:
        super().__init__("flow", spread=1.0)
        self.requires_grad_(False)

    def encode(self, prompts, unconditional=True):
        return super().encode(prompts)

    def schedule(self, steps=4):
        return super().schedule()

    def noise_shape(self):
        return (1, 4, 4)

    def decode(self, latents):
        return (0.5 + 0.1 * latents).clamp(0, 1).expand(-1, 3, -1, -1)


def random_experts(reward, bounds=(0.5, 0.9), **settings) -> Experts:
    experts = Experts(reward, bounds, rank=2, **settings)
    for part in experts.weights:
        for tensor in part.values():
            tensor.normal_(generator=torch.Generator().manual_seed(len(part)))
    return experts


def pictures(count=3, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", ["conv", "head"])
def test_an_update_is_scale_times_up_times_down(layer):
    reward = Net()
    experts = Experts(reward, (0.5,), rank=2, scale=0.5)
    weights = experts.weights[1]
    down, up = weights[f"reward.{layer}.down"], weights[f"reward.{layer}.up"]
    up.normal_(generator=torch.Generator().manual_seed(0))
    with experts.in_force(1):
        found = reward(pictures(), ["1"] * 3).total
    part = getattr(reward, layer)
    part.weight.copy_(part.weight + 0.5 * (up @ down.flatten(1)).view_as(part.weight))
    torch.testing.assert_close(found, reward(pictures(), ["1"] * 3).total)
    assert not torch.equal(found, Net()(pictures(), ["1"] * 3).total)


def test_the_reward_itself_is_never_touched():
    reward = Net()
    before, names = reward(pictures(), ["1"] * 3).total, set(reward.state_dict())
    fresh = Experts(reward, (0.5,))
    assert torch.equal(fresh.at(1.0)(pictures(), ["1"] * 3).total, before), "each begins as the reward"
    experts = random_experts(reward)
    assert not torch.equal(experts.at(1.0)(pictures(), ["1"] * 3).total, before)
    with pytest.raises(RuntimeError), experts.in_force(0):
        reward(torch.zeros(1, 5, 8, 8), ["1"])  # five channels
    assert torch.equal(reward(pictures(), ["1"] * 3).total, before)
    assert set(reward.state_dict()) == names
    assert not any(part._forward_hooks for part in reward.modules())


def test_a_gradient_may_be_taken_after_the_call():
    experts = random_experts(Net())
    x = pictures().requires_grad_()
    total = experts.at(0.7)(x, ["1"] * 3).total
    (later,) = torch.autograd.grad(total.sum(), x)
    with experts.in_force(1):
        (within,) = torch.autograd.grad(experts.reward(x, ["1"] * 3).total.sum(), x)
    assert torch.equal(later, within)


def test_ranges_and_layers():
    experts = Experts(Net(), (0.5, 0.85))
    assert [experts.range_of(share) for share in (0.0, 0.5, 0.51, 0.85, 0.86, 1.0)] == [0, 0, 1, 1, 2, 2]
    assert set(experts.layers) == {"reward.conv", "reward.head"}, "not the text's"

    class Mix:
        def __init__(self, model) -> None:
            self.members = {"net": (model, 1.0), "function": (len, 2.0)}

    assert set(adaptable_layers(Mix(Net()))) == {"net.conv", "net.head"}
    attention = Net()
    attention.mix = nn.MultiheadAttention(4, 2)  # calls its projection by the weights, where no hook would be heard
    assert set(adaptable_layers(attention)) == {"reward.conv", "reward.head"}


def test_saved_experts_are_the_same_and_fit_their_own_reward_alone(tmp_path):
    reward = Net()
    experts = random_experts(reward, scale=0.5)
    experts.save(tmp_path)
    again = Experts.load(tmp_path, reward)
    for share in (0.1, 0.7, 1.0):
        assert torch.equal(experts.at(share)(pictures(), ["1"] * 3).total, again.at(share)(pictures(), ["1"] * 3).total)
    other = Net()
    other.head = nn.Linear(5, 1)
    with pytest.raises(ValueError, match=r"made for another reward: '0/reward.head.down' does not fit"):
        Experts.load(tmp_path, other)


@pytest.mark.parametrize("use", [lambda r, e: Guide(r, ranges=e, strength=0.2), lambda r, e: FKSteering(r, ranges=e),
                                 lambda r, e: SeedPruning(r, budget=4, ranges=e)])  # fmt: skip
def test_methods_ask_the_expert_of_each_step(use):
    """Shares of noise at the toy's steps: 1, .92, .55, .24. Finished images are the plain reward's."""
    asked = []

    class Spy(Experts):
        def at(self, share):
            asked.append(round(share, 2))
            return super().at(share)

    given, reward = problem((0, 1), Gaussian("flow", spread=0.5)), Net()
    experts = Spy(reward, (0.5, 0.9))
    out = use(reward, experts).search(given)
    assert asked
    assert set(asked) <= {1.0, 0.92, 0.55, 0.24}
    assert out.trace.settings["ranges"] == "experts"
    best = [totals[k] for totals, k in zip(out.trace.rewards["total"], out.trace.best, strict=True)]
    assert reward(out.images, given.prompts).total.tolist() == pytest.approx(best, abs=1e-5)


# ---- training ----------------------------------------------------------------------------------------------------------------

PROMPTS = [str(k / 4) for k in (-1, -5, -4, -3, -2, 1, 0, 2, 3, 4)]  # the first and the sixth are held out
SETTINGS = ExpertSettings(bounds=(0.6, 0.95), rank=2, samples=8, steps=60, batch_size=16, lr=0.02)


def test_an_expert_learns_what_becomes_of_a_prediction(tmp_path):
    """A prediction at share .92 lies near its prompt's mean: the reward hears too little of what the noise will add."""
    backbone, reward = Toy(), Net()
    experts = train_experts(backbone, reward, PROMPTS, tmp_path, SETTINGS, steps=4)
    parts = [load_file(path) for path in sorted((tmp_path / "samples").iterdir())]
    shown = torch.cat([part["predicted"][:, 1] for part in parts]).float() / 255
    final, numbers = torch.cat([part["scores"] for part in parts]), torch.cat([part["prompts"] for part in parts])
    texts = [PROMPTS[int(n)] for n in numbers]
    held = numbers % SETTINGS.held_out == 0

    def error(scorer):
        return F.mse_loss(scorer(shown, texts).total[held], final[held]).item()

    assert error(experts.at(0.92)) < 0.7 * error(reward), "not all: without the prompt its part and that of the noise look alike"
    ranges = read_json(tmp_path / "report.json")["ranges"]
    assert [row["bounds"] for row in ranges] == [[0.0, 0.6], [0.6, 0.95], [0.95, 1.0]]
    assert [row["samples"] for row in ranges] == [16, 16, 16]
    told = within_prompts(experts.at(0.92)(shown[held], [t for t, h in zip(texts, held, strict=True) if h]).total, numbers[held])
    known = torch.corrcoef(torch.stack([told, within_prompts(final[held], numbers[held])]))[0, 1].item()
    assert ranges[1]["expert"] == pytest.approx(known, abs=1e-3)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    settings = replace(SETTINGS, steps=5, samples=2)
    whole = train_experts(Toy(), Net(), PROMPTS, tmp_path / "whole", settings, steps=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for lost in ("samples/00001.safetensors", "range-1.safetensors", "experts.safetensors", "report.json"):
        (tmp_path / "stopped" / lost).unlink()
    backbone = Toy()
    again = train_experts(backbone, Net(), PROMPTS, tmp_path / "stopped", settings, steps=4)
    assert backbone.calls == [4] * 4, "of 20 samples in batches of 16 the last 4 are made again"
    for one, two in zip(whole.weights, again.weights, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="begun with other settings"):
        train_experts(Toy(), Net(), PROMPTS, tmp_path / "whole", replace(settings, lr=0.1), steps=4)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no step falls into range 0 .* shares of noise are 1.000, 0.919, 0.555, 0.243"):
        train_experts(Toy(), Net(), PROMPTS, tmp_path, replace(SETTINGS, bounds=(0.1,)), steps=4)
    for bounds in ((0.5, 0.5), (0.9, 0.5), (1.0,)):
        with pytest.raises(ValueError, match="bounds must be"):
            ExpertSettings(bounds=bounds)
    with pytest.raises(ValueError, match="a function cannot have experts"):
        Experts(lambda images, prompts: images, (0.5,))


def test_scores_within_prompts_by_hand():
    scores, prompts = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0]), torch.tensor([7, 7, 2, 2, 2])
    assert within_prompts(scores, prompts).tolist() == [-1.0, 1.0, -10.0, 0.0, 10.0]


def test_prompts_that_are_held_out_teach_nothing(tmp_path):
    """The scores of prompt 0, the first of every five, may be anything; those of prompt 1 matter."""
    settings = replace(SETTINGS, steps=5, samples=2)
    whole = train_experts(Toy(), Net(), PROMPTS, tmp_path / "whole", settings, steps=4)
    for prompt, same in ((0, True), (1, False)):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(prompt))
        path = folder / "samples" / "00000.safetensors"
        part = load_file(path)
        part["scores"][part["prompts"] == prompt] += 5
        save_file(part, path)
        for learned in folder.glob("range-*"):
            learned.unlink()
        again = train_experts(Toy(), Net(), PROMPTS, folder, settings, steps=4)
        assert all(torch.equal(again.weights[0][name], tensor) for name, tensor in whole.weights[0].items()) == same
