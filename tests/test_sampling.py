"""rollout(): what it keeps, what on_step may change, what it costs; on a backbone whose denoiser is known in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffalign.backbone import Conditioning, Size
from diffalign.diffusion import DDIM, FlowSDE, Renoise, Schedule, from_x0, log_prob
from diffalign.sampling import rollout

LEVELS = (1.0, 0.7, 0.4, 0.2, 0.0)


class Gaussian(torch.nn.Module):
    """Data are N(target, spread^2): the best prediction of x0 is known. A prompt is its target; the unconditional target is 0.

    The targets are a weight, so that training can be tried too.
    """

    two_calls = False

    def __init__(self, prediction: str = "flow", spread: float = 0.0) -> None:
        super().__init__()
        self.prediction, self.spread = prediction, spread
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.calls: list[int] = []

    def schedule(self) -> Schedule:
        vp = self.prediction != "flow"
        noise = tuple(min(s, 0.999) for s in LEVELS) if vp else LEVELS
        signal = tuple((1 - s * s) ** 0.5 if vp else 1 - s for s in noise)
        return Schedule(tuple(1000 * s for s in noise[:-1]), signal, noise, self.prediction)

    def encode(self, prompts: list[str]) -> Conditioning:
        targets = torch.tensor([float(prompt) for prompt in prompts])
        return Conditioning(tuple(prompts), {"prompt_embeds": targets, "negative_prompt_embeds": torch.zeros_like(targets)})

    def predict(self, x, timestep, texts, conditioning):
        self.calls.append(len(x))
        plan = self.schedule()
        i = plan.timesteps.index(timestep)
        a, s = plan.signal[i], plan.noise[i]
        target = self.gain * texts["prompt_embeds"].view(-1, *[1] * (x.dim() - 1))
        weight = a * self.spread**2 / (a**2 * self.spread**2 + s**2)
        return from_x0(x, target + weight * (x - a * target), a, s, self.prediction)

    def denoise(self, x, timestep, conditioning, guidance_scale=1.0):
        if guidance_scale <= 1:
            return self.predict(x, timestep, conditioning.conditional(), conditioning)
        c = self.predict(x, timestep, conditioning.conditional(), conditioning)
        u = self.predict(x, timestep, conditioning.unconditional(), conditioning)
        return u + guidance_scale * (c - u)


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(9))


@pytest.fixture(params=["flow", "epsilon", "v_prediction"])
def backbone(request):
    return Gaussian(request.param, spread=0.3)


SAMPLERS = {"flow": [DDIM(), DDIM(1.0), Renoise(), FlowSDE()]}


def test_every_sampler_finds_the_data(backbone):
    for sampler in SAMPLERS.get(backbone.prediction, [DDIM(), DDIM(1.0), Renoise()]):
        with torch.no_grad():
            out = rollout(backbone, noise(400), backbone.encode(["2"] * 400), backbone.schedule(), sampler, generators=generators(400))
        assert out.latents.mean().item() == pytest.approx(2, abs=0.05)
        assert 0.1 < out.latents.std().item() < 0.4
        assert out.evaluations == [4] * 400


def test_guidance_costs_two_evaluations_and_moves_the_target(backbone):
    plain = rollout(backbone, noise(2), backbone.encode(["1", "2"]), backbone.schedule())
    guided = rollout(backbone, noise(2), backbone.encode(["1", "2"]), backbone.schedule(), guidance_scale=3.0)
    assert plain.evaluations == [4, 4]
    assert guided.evaluations == [8, 8]
    assert (guided.latents.mean(dim=(1, 2, 3)) > plain.latents.mean(dim=(1, 2, 3)) + 1).all()


# ---- what is kept ------------------------------------------------------------------------------------------------------------


def test_what_is_kept_adds_up(backbone):
    with torch.no_grad():
        out = rollout(backbone, noise(3), backbone.encode(["1", "2", "3"]), backbone.schedule(), DDIM(0.8), generators=generators(3),
                      keep=("states", "means", "x0", "log_probs"))  # fmt: skip
    assert [len(kept) for kept in (out.states, out.means, out.stds, out.x0, out.log_probs)] == [5, 4, 4, 4, 4]
    assert torch.equal(out.states[-1], out.latents)
    assert out.stds[-1] == 0
    assert out.log_probs[-1] is None
    for i in range(3):
        assert torch.equal(out.log_probs[i], log_prob(out.states[i + 1], out.means[i], out.stds[i]))
        streams = [torch.Generator().manual_seed(k) for k in range(3)]
        drawn = torch.stack([[torch.randn(1, 4, 4, generator=g) for _ in range(i + 1)][-1] for g in streams])
        torch.testing.assert_close(out.states[i + 1], out.means[i] + out.stds[i] * drawn)


def test_the_same_weights_give_a_ratio_of_exactly_one(backbone):
    """Every step evaluated again from the state that was kept, as policy-gradient training does."""
    sampler, conditioning, plan = DDIM(0.8), backbone.encode(["1", "2"]), backbone.schedule()
    with torch.no_grad():
        out = rollout(backbone, noise(2), conditioning, plan, sampler, guidance_scale=2.0, generators=generators(2),
                      keep=("states", "log_probs"))  # fmt: skip
    for i in range(plan.steps - 1):
        output = backbone.denoise(out.states[i], plan.timesteps[i], conditioning, 2.0)
        step = sampler.step(plan, i, out.states[i], output)
        ratio = (log_prob(out.states[i + 1], step.mean, step.std) - out.log_probs[i]).exp()
        assert torch.equal(ratio.detach(), torch.ones(2))
        (gradient,) = torch.autograd.grad(ratio.sum(), backbone.gain)
        assert gradient != 0


def test_a_rollout_goes_on_from_any_step(backbone):
    conditioning, plan = backbone.encode(["1", "2"]), backbone.schedule()
    with torch.no_grad():
        whole = rollout(backbone, noise(2), conditioning, plan, keep=("states",))
        rest = rollout(backbone, whole.states[2], conditioning, plan, first=2)
        part = rollout(backbone, noise(2), conditioning, plan, last=2)
    assert torch.equal(rest.latents, whole.latents)
    assert rest.evaluations == [2, 2]
    assert torch.equal(part.latents, whole.states[2])


def test_gradients_reach_noise_and_weights_and_checkpointing_keeps_them(backbone):
    found = []
    for checkpoint in (False, True):
        start = noise(2).requires_grad_()
        out = rollout(backbone, start, backbone.encode(["1", "2"]), backbone.schedule(), checkpoint=checkpoint)
        found.append(torch.autograd.grad(out.latents.sum(), [start, backbone.gain]))
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(plain, checkpointed)


# ---- on_step -----------------------------------------------------------------------------------------------------------------


def test_on_step_that_changes_nothing_changes_nothing(backbone):
    seen = []

    def look(state):
        seen.append((state.index, state.rows))
        return state if state.index % 2 else None

    call = (noise(2), backbone.encode(["1", "2"]), backbone.schedule(), DDIM(1.0))
    plain = rollout(backbone, *call, generators=generators(2))
    watched = rollout(backbone, *call, generators=generators(2), on_step=look)
    assert torch.equal(plain.latents, watched.latents)
    assert seen == [(i, (0, 1)) for i in range(4)]


def test_on_step_can_detach(backbone):
    """Back-propagation through the last step alone: the gradient to the noise is gone, that to the weights is the last step's."""

    def detach(state):
        return replace(state, x=state.x.detach()) if state.index < 3 else None

    start = noise(1).requires_grad_()
    out = rollout(backbone, start, backbone.encode(["2"]), backbone.schedule(), on_step=detach)
    gradient, to_noise = torch.autograd.grad(out.latents.sum(), [backbone.gain, start], allow_unused=True)
    assert to_noise is None
    whole = rollout(backbone, noise(1), backbone.encode(["2"]), backbone.schedule())
    (full,) = torch.autograd.grad(whole.latents.sum(), backbone.gain)
    assert 0 < abs(gradient) < abs(full)


def test_on_step_can_drop_and_repeat_rows():
    backbone = Gaussian("flow", spread=1.0)

    def resample(state):
        indices = {0: [0, 0, 2], 2: [1, 2]}.get(state.index)
        return None if indices is None else state.take(indices)

    out = rollout(backbone, noise(3), backbone.encode(["1", "20", "300"]), backbone.schedule(), DDIM(1.0), generators=generators(3),
                  on_step=resample, keep=("states",))  # fmt: skip
    assert out.rows == (0, 2)
    assert [len(state) for state in out.states] == [3, 3, 3, 2, 2]
    assert backbone.calls == [3, 3, 3, 2]
    assert torch.equal(out.states[1][0], out.states[1][1])  # copies, as they were taken
    assert not torch.equal(out.states[2][0], out.states[2][1])  # which part ways at the next draw
    assert out.latents[0].mean() < 20 < out.latents[1].mean()  # each row keeps its own prompt
    assert out.evaluations == [1 + 2 + 2 + 1, 1, 4]


def test_a_row_that_stays_draws_what_it_would_have_drawn():
    backbone = Gaussian("flow", spread=1.0)
    call = (noise(3), backbone.encode(["1", "2", "3"]), backbone.schedule(), DDIM(1.0))
    whole = rollout(backbone, *call, generators=generators(3))
    pruned = rollout(backbone, *call, generators=generators(3), on_step=lambda state: state.take([2, 0]) if state.index == 1 else None)
    assert pruned.rows == (2, 0)
    torch.testing.assert_close(pruned.latents, whole.latents[[2, 0]])


def test_resampling_by_weights_reaches_the_tilted_distribution():
    """Two modes, reward on the second: particles weighted by exp(r) at the noisiest step end as the tilted mixture, 1 : e."""
    backbone, count = Gaussian("flow", spread=0.1), 4000
    prompts = ["-2", "2"] * (count // 2)
    generator = torch.Generator().manual_seed(3)

    def resample(state):
        if state.index:
            return None
        weights = (state.x0.mean(dim=(1, 2, 3)) > 0).float().exp()
        return state.take(torch.multinomial(weights, count, replacement=True, generator=generator).tolist())

    with torch.no_grad():
        out = rollout(backbone, noise(count), backbone.encode(prompts), backbone.schedule(), DDIM(1.0), generators=generators(count),
                      on_step=resample)  # fmt: skip
    share = (out.latents.mean(dim=(1, 2, 3)) > 0).float().mean().item()
    e = torch.e
    assert share == pytest.approx(e / (1 + e), abs=0.03)


# ---- policies and mistakes ---------------------------------------------------------------------------------------------------


class Alternate:
    """Guides even steps; sample 1 is never guided."""

    diagnostics: dict = {}  # noqa: RUF012

    def plan(self, step):
        return ["both" if step % 2 == 0 else "conditional", "conditional"]

    def complete(self, step, x, c, u):
        filled = c.clone()
        if len(u):
            filled[:1] = u
        return c, filled


def test_a_policy_decides_sample_by_sample():
    backbone = Gaussian("flow", spread=0.3)
    conditioning, plan = backbone.encode(["1", "2"]), backbone.schedule()
    out = rollout(backbone, noise(2), conditioning, plan, guidance_scale=3.0, policy=Alternate())
    assert out.evaluations == [6, 4]
    plain = rollout(backbone, noise(2), conditioning, plan)
    torch.testing.assert_close(out.latents[1], plain.latents[1])
    assert out.latents[0].mean() > plain.latents[0].mean() + 0.5
    with pytest.raises(ValueError, match="changed the rows"):
        rollout(backbone, noise(2), conditioning, plan, guidance_scale=3.0, policy=Alternate(), on_step=lambda state: state.take([0, 0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": ("images",)}, "keep may name states, means, x0, log_probs; got images"),
        ({"sampler": DDIM(1.0)}, "pass generators"),
        ({"generators": generators(1)}, "generators holds 1 entries for 2 samples"),
        ({"noise": noise(3)}, "noise holds 3 samples and conditioning 2"),
        ({"first": 2, "last": 2}, "within 0..4, got 2 and 2"),
        ({"last": 5}, "within 0..4, got 0 and 5"),
        ({"sampler": DDIM(1.0), "generators": generators(2), "on_step": lambda state: state.take([0, 0, 1])}, "3 rows for 2 samples"),
        ({"on_step": lambda state: replace(state, rows=(0,))}, "2 states for 1 rows"),
    ],
)
def test_mistakes_are_named(changes, message):
    backbone = Gaussian()
    call = {"noise": noise(2), "conditioning": backbone.encode(["1", "2"]), "schedule": backbone.schedule(), **changes}
    with pytest.raises(ValueError, match=message):
        rollout(backbone, **call)


def test_conditioning_and_sizes():
    conditioning = Gaussian().encode(["1", "2"])
    with pytest.raises(IndexError, match=r"rows must lie in 0\.\.1"):
        conditioning.rows([2])
    assert conditioning.rows([1, 1]).prompts == ("2", "2")
    alone = replace(conditioning, tensors=conditioning.conditional())
    assert not alone.has_unconditional
    with pytest.raises(ValueError, match="unconditional branch was not encoded"):
        alone.unconditional()
    with pytest.raises(ValueError, match="frames must be a whole number of at least 1, got 0"):
        Size(8, 8, 0)
    with pytest.raises(IndexError, match=r"indices must lie in 0\.\.1"):
        rollout(Gaussian(), noise(2), conditioning, Gaussian().schedule(), on_step=lambda state: state.take([5]))
