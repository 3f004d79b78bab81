"""The noise policy: patches by hand, an untrained policy that changes nothing, what it is built for, saving."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.noise import sample_norm
from diffalign.noise_policy import NoisePolicy, PolicyShape

SHAPES = [(4, 8, 6), (3, 2, 4, 4), (10, 5)]


def trained(shape: tuple[int, ...], form: str = "residual", **settings) -> NoisePolicy:
    """With an output layer that is not zero."""
    torch.manual_seed(0)
    policy = NoisePolicy(PolicyShape(shape, 12, form, width=16, heads=2, **settings))
    torch.nn.init.normal_(policy.write.weight, std=0.3)
    return policy


def draw(shape: tuple[int, ...], count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, generator=generator), torch.randn(count, 7, 12, generator=generator)


def test_patches_by_hand():
    """One channel, 2 x 4, patch 2: the left square row by row, then the right one."""
    policy = NoisePolicy(PolicyShape((1, 2, 4), 12, width=16))
    noise = torch.arange(8.0).view(1, 1, 2, 4)  # 0 1 2 3 / 4 5 6 7
    assert policy.patches(noise).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_patches_and_back(shape):
    noise, _ = draw(shape)
    policy = NoisePolicy(PolicyShape(shape, 12, width=16))
    assert policy.patches(noise).shape == (3, *policy.shape.tokens)
    assert torch.equal(policy.whole(policy.patches(noise)), noise)


@pytest.mark.parametrize("form", ["residual", "distribution"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_untrained_policy_changes_nothing_and_a_trained_one_keeps_norms(shape, form):
    noise, text = draw(shape)
    untrained = NoisePolicy(PolicyShape(shape, 12, form, width=16))(noise, text)
    torch.testing.assert_close(untrained.noise, noise)
    assert untrained.kl.abs().max() < 1e-6
    moved = trained(shape, form)(noise, text)
    assert (moved.noise - noise).abs().max() > 0.05
    assert (moved.kl > 0).all()
    torch.testing.assert_close(sample_norm(moved.noise), sample_norm(noise))


def test_a_residual_depends_on_the_noise_and_a_distribution_on_the_prompt_alone():
    """Two noises of one prompt: eps' - eps differs for a residual; (eps'_1 - eps'_2) / (eps_1 - eps_2) is exp(s) for the distribution."""
    shape = (2, 4, 4)
    noise, text = draw(shape, 2)
    text = text[:1].expand(2, -1, -1)
    residual = trained(shape)
    steps = residual.whole(residual.write(torch.zeros(1, 4, 16)))  # the bias alone: the same everywhere
    assert steps.std() == 0
    kl = residual(noise, text).kl
    assert not torch.isclose(kl[0], kl[1])
    kl = trained(shape, "distribution")(noise, text).kl
    assert kl[0].item() == pytest.approx(kl[1].item(), rel=1e-6)


def test_the_kl_by_hand():
    """Bias 0.5 and nothing else: a residual of 0.5 everywhere is 0.125 nats an entry. Mean 0.5 and s = ln 2: (4 + 0.25 - 1) / 2 - ln 2."""
    noise, text = draw((2, 4, 4))
    residual = NoisePolicy(PolicyShape((2, 4, 4), 12, width=16))
    torch.nn.init.constant_(residual.write.bias, 0.5)
    assert residual(noise, text).kl.tolist() == pytest.approx([0.125] * 3)
    policy = NoisePolicy(PolicyShape((2, 4, 4), 12, "distribution", width=16))
    with torch.no_grad():
        policy.write.bias[:8], policy.write.bias[8:] = 0.5, math.log(2)
    moved = policy(noise, text)
    assert moved.kl.tolist() == pytest.approx([1.625 - math.log(2)] * 3, rel=1e-5)
    expected = 0.5 + 2 * noise
    torch.testing.assert_close(moved.noise, expected * (sample_norm(noise) / sample_norm(expected)).view(3, 1, 1, 1))


@pytest.mark.parametrize("form", ["residual", "distribution"])
def test_a_batch_equals_its_samples_and_gradients_reach_every_weight(form):
    noise, text = draw((4, 8, 6))
    policy = trained((4, 8, 6), form)
    together = policy(noise, text)
    for i in range(3):
        alone = policy(noise[i : i + 1], text[i : i + 1])
        torch.testing.assert_close(alone.noise[0], together.noise[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.kl[0], together.kl[i], atol=1e-6, rtol=1e-5)
    (together.noise.square() * noise).sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_what_is_saved_loads_again_and_nothing_of_it_learns(tmp_path):
    noise, text = draw((4, 8, 6))
    policy = trained((4, 8, 6), patch=1)
    policy.save(tmp_path)
    again = NoisePolicy.load(tmp_path)
    assert again.shape == policy.shape
    assert torch.equal(again(noise, text).noise, policy(noise, text).noise)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_other_noise_other_text_and_damaged_files_are_refused(tmp_path):
    policy = trained((4, 8, 6))
    noise, text = draw((4, 8, 6))
    with pytest.raises(ValueError, match=r"\(4, 8, 6\).*got \(4, 6, 8\)"):
        policy(noise.transpose(2, 3), text)
    with pytest.raises(ValueError, match=r"embeddings of 12 entries.* 11"):
        policy(noise, text[..., :11])
    with pytest.raises(FileNotFoundError, match=r"noise_policy\.json is missing"):
        NoisePolicy.load(tmp_path)
    policy.save(tmp_path)
    config = tmp_path / "noise_policy.json"
    config.write_text(config.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(ValueError, match="damaged"):
        NoisePolicy.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "other"}, "form must be"),
        ({"patch": 5}, "patch must divide"),
        ({"heads": 3}, "multiple of heads"),
        ({"blocks": 0}, "blocks"),
        ({"noise": (4,)}, "2, 3 or 4 axes"),
    ],
)
def test_a_bad_shape_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        PolicyShape(**{"noise": (4, 8, 6), "text_width": 12, "width": 16, "heads": 4, **changes})
