"""The training loop: stopping and resuming changes nothing, a failure loses nothing, the schedule is what it says."""

import math

import pytest
import torch
from torch import nn

from diffalign.shapes.train import loop


def trainee(path, steps=8):
    torch.manual_seed(0)
    config = loop.LoopConfig(steps=steps, lr=0.1, seed=3, warmup=2, save_every=3, ema_decay=0.9)
    return loop.Trainee({"line": nn.Linear(3, 1)}, config, path)


def fit(one, stop_at=None):
    line = one.modules["line"]

    def loss_of(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(5, 3, generator=generator)
        loss = (line(x) - x.sum(dim=1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    loop.train(one, loss_of, "test")


@pytest.mark.parametrize("stop_at", [1, 3, 7])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path, stop_at):
    whole = trainee(tmp_path / "whole.safetensors")
    fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(trainee(tmp_path / "parts.safetensors"), stop_at)
    resumed = trainee(tmp_path / "parts.safetensors")
    assert resumed.step == stop_at
    fit(resumed)
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.parameters[name])
        assert torch.equal(whole.average[name], resumed.average[name])


def test_training_moves_every_parameter_and_lowers_the_loss(tmp_path):
    one = trainee(tmp_path / "state.safetensors", steps=200)
    before = {name: p.detach().clone() for name, p in one.parameters.items()}
    fit(one)
    assert all(not torch.equal(before[name], p) for name, p in one.parameters.items())
    assert torch.allclose(one.parameters["line.weight"], torch.ones(1, 3), atol=0.05)


def test_a_loss_that_is_not_finite_stops_with_the_step_named_and_keeps_what_was_saved(tmp_path):
    one = trainee(tmp_path / "state.safetensors")

    def loss_of(step, generator):
        loss = one.parameters["line.weight"].sum() * (math.nan if step == 4 else 1.0)
        return loss, {}

    with pytest.raises(FloatingPointError, match="test: the loss is nan at step 4"):
        loop.train(one, loss_of, "test")
    assert loop.progress(tmp_path / "state.safetensors")[0] == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_companions_are_saved_and_resumed_with_the_trainee(tmp_path):
    one, other = trainee(tmp_path / "one.safetensors"), trainee(tmp_path / "other.safetensors")

    def loss_of(step, generator):
        other.parameters["line.bias"].data.add_(1)
        other.step = step + 1
        return one.parameters["line.weight"].square().sum(), {}

    loop.train(one, loss_of, "test", companions=(other,))
    again = trainee(tmp_path / "other.safetensors")
    assert again.step == 8
    assert torch.equal(again.parameters["line.bias"], other.parameters["line.bias"])


def test_learning_rate_rises_linearly_then_falls_along_a_cosine_to_zero():
    config = loop.LoopConfig(steps=12, lr=1.0, warmup=2)
    assert [loop.learning_rate(config, s) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert loop.learning_rate(config, 7) == pytest.approx(0.5)
    assert loop.learning_rate(config, 12) == pytest.approx(0.0)


def test_moments_of_weights_stored_channels_last_are_resumed_in_their_order(tmp_path):
    """The fused optimiser walks weight and moments in storage order; a moment loaded in another layout would meet other weights."""

    def trainee():
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return loop.Trainee({"conv": conv}, loop.LoopConfig(steps=4, lr=0.1, warmup=1, save_every=1), tmp_path / "state.safetensors")

    def loss_of(one: loop.Trainee, stop: int = 99):
        def loss(step: int, generator: torch.Generator):
            if step == stop:
                raise KeyboardInterrupt
            return one.modules["conv"](torch.randn(2, 3, 8, 8, generator=generator)).square().sum(), {}

        return loss

    whole = trainee()
    loop.train(whole, loss_of(whole), "whole")
    (tmp_path / "state.safetensors").unlink()
    stopped = trainee()
    with pytest.raises(KeyboardInterrupt):
        loop.train(stopped, loss_of(stopped, 2), "stopped")
    resumed = trainee()
    assert resumed.step == 2
    loop.train(resumed, loss_of(resumed), "resumed")
    assert torch.equal(whole.modules["conv"].weight, resumed.modules["conv"].weight)
