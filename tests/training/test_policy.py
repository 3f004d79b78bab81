"""The policy and its reference on tiny complete pipelines: an eps network and a flow network."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from diffalign.diffusion import DDIM
from diffalign.sampling import rollout
from diffalign.training.policy import Adaptation, Policy
from tests.families.tiny import ROWS

STOCK = {"sd15": StableDiffusionPipeline, "sd3-medium": StableDiffusion3Pipeline}


def pipeline(name: str):
    row = ROWS[name]
    return row.pipeline(row.aligned_class())


def made(name: str, **settings) -> Policy:
    pipe = pipeline(name)
    return Policy(pipe, pipe.denoiser, Adaptation(**settings))


def probe(backbone, count: int = 2):
    noise = backbone.draw_noise([torch.Generator().manual_seed(i) for i in range(count)])
    return noise, torch.tensor([300.0, 700.0])[:count], backbone.encode(["red", "a cat"][:count])


def nudge(policy: Policy, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    policy.set_weights({name: w + size * torch.randn(w.shape, generator=generator) for name, w in policy.weights().items()})


@pytest.fixture(params=STOCK)
def name(request):
    return request.param


@pytest.mark.parametrize("rank", [4, None])
def test_the_reference_is_the_network_as_it_was(name, rank):
    before, policy = pipeline(name), made(name, rank=rank)
    x, t, texts = probe(before)
    with torch.no_grad():
        was = before.denoise(x, t, texts, 3.0)
        assert torch.equal(policy.denoiser()(x, t, texts, 3.0), was)
        assert torch.equal(policy.reference()(x, t, texts, 3.0), was)
        nudge(policy)
        assert not torch.allclose(policy.denoiser()(x, t, texts, 3.0), was, atol=1e-4)
        assert torch.equal(policy.reference()(x, t, texts, 3.0), was)
        assert torch.equal(policy.reference().as_backbone().predict(x, t, texts.conditional(), texts), before.denoise(x, t, texts))


@pytest.mark.parametrize("rank", [4, None])
def test_every_weight_that_learns_has_a_gradient_and_no_other(name, rank):
    """Also after the reference was asked in between, which switches the adapter off and on."""
    policy = made(name, rank=rank)
    nudge(policy, 0.01)
    x, t, texts = probe(policy.backbone)
    output = policy.denoiser()(x, t, texts)
    known = policy.reference()(x, t, texts)
    assert not known.requires_grad
    ((output - known - 1) ** 2).mean().backward()
    unused = {n for n, p in policy.parameters.items() if p.grad is None or not p.grad.any()}
    dead = (
        "to_k.bias",
        "add_k_proj.bias",
        "transformer_blocks.1.attn.add_q_proj",
    )  # softmax does not see them; no text leaves SD3's last block
    unused = {n for n in unused if not any(part in n for part in dead)}
    assert not unused
    parts = [part for part in policy.backbone.components.values() if isinstance(part, torch.nn.Module)]
    learning = [p for part in parts for p in part.parameters() if p.requires_grad]
    assert len(learning) == len(policy.parameters)
    assert all(p.dtype == torch.float32 for p in learning)
    assert rank is None or all("lora_" in n for n in policy.parameters)
    assert not policy.network.training


def test_the_reference_of_an_adapter_costs_no_memory():
    pipe = pipeline("sd3-medium")
    before = sum(p.numel() for p in getattr(pipe, pipe.denoiser).parameters())
    policy = Policy(pipe, pipe.denoiser, Adaptation(rank=2))
    adapter = sum(p.numel() for p in policy.parameters.values())
    assert sum(p.numel() for p in policy.network.parameters()) == before + adapter
    assert adapter < before / 5
    assert policy._copy is None


def test_checkpointing_gives_the_same_gradient_and_recomputes(name):
    found, calls = [], []
    for checkpointing in (False, True):
        policy = made(name, rank=4, checkpointing=checkpointing)
        nudge(policy)
        x, t, texts = probe(policy.backbone)
        layers = [part for part in policy.network.modules() if hasattr(part, "lora_A")]
        count = [0]
        for layer in layers:
            layer.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        output = policy.denoiser()(x, t, texts)
        policy.reference()(x, t, texts)
        count[0] = 0
        output.square().mean().backward()
        calls.append(count[0])
        found.append({n: p.grad for n, p in policy.parameters.items()})
    assert calls[0] == 0 < calls[1]
    for n in found[0]:
        torch.testing.assert_close(found[0][n], found[1][n])


def test_a_rollout_of_the_policy_is_not_that_of_the_reference(name):
    policy = made(name, rank=4)
    nudge(policy, 0.2)
    noise, _, texts = probe(policy.backbone)
    plan = policy.backbone.schedule(2)
    with torch.no_grad():
        runs = [rollout(d.as_backbone(), noise, texts, plan, DDIM()).latents for d in (policy.denoiser(), policy.reference())]
        stock = rollout(pipeline(name), noise, texts, plan, DDIM()).latents
    assert torch.equal(runs[1], stock)
    assert not torch.allclose(runs[0], stock, atol=1e-3)


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_the_saved_lora_makes_the_same_image_in_the_stock_pipeline(name, alpha, tmp_path):
    policy = made(name, rank=4, alpha=alpha)
    nudge(policy, 0.1)
    policy.save(tmp_path)
    call = {"prompt": "a red cat", **ROWS[name].call, "output_type": "np"}
    ours = policy.backbone(**call, generator=torch.Generator().manual_seed(5)).images
    stock = ROWS[name].pipeline(STOCK[name])
    plain = stock(**call, generator=torch.Generator().manual_seed(5)).images
    stock.load_lora_weights(tmp_path)
    tuned = stock(**call, generator=torch.Generator().manual_seed(5)).images
    assert abs(tuned - ours).max() < 1e-5
    assert abs(plain - ours).max() > 1e-3


def test_all_weights_are_saved_as_a_pipeline(tmp_path):
    policy = made("sd15", rank=None)
    nudge(policy, 0.01)
    policy.save(tmp_path)
    call = {"prompt": "a red cat", **ROWS["sd15"].call, "output_type": "np"}
    ours = policy.backbone(**call, generator=torch.Generator().manual_seed(5)).images
    stock = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert abs(stock(**call, generator=torch.Generator().manual_seed(5)).images - ours).max() < 1e-5


def test_the_seed_decides_the_start():
    one, same, other = (made("sd15", rank=2, seed=seed).weights() for seed in (0, 0, 1))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_an_adapter_on_half_precision_learns_in_float32():
    row = ROWS["sd15"]
    pipe = row.pipeline(row.aligned_class(), torch.bfloat16)
    policy = Policy(pipe, "unet", Adaptation(rank=2))
    x, t, texts = probe(pipe)
    policy.denoiser()(x, t, texts).float().square().mean().backward()
    assert {p.grad.dtype for p in policy.parameters.values()} == {torch.float32}
    with pytest.raises(ValueError, match="float32"):
        Policy(row.pipeline(row.aligned_class(), torch.bfloat16), "unet", Adaptation(rank=None))


def test_what_cannot_be_is_refused():
    policy = made("sd15", rank=2)
    with pytest.raises(ValueError, match="fuse_lora"):
        Policy(policy.backbone, "unet")
    with pytest.raises(ValueError, match="targets"):
        made("sd15", targets=("nothing",))
    with pytest.raises(ValueError, match="rank"):
        Adaptation(rank=0)
    with pytest.raises(ValueError, match="do not fit"):
        policy.set_weights({})
    with pytest.raises(ValueError, match="LoRA format"):
        Policy(pipeline("pixart-sigma"), "transformer")


@pytest.mark.parametrize("rank", [2, None])
def test_weights_are_drawn_back_to_their_budget(rank):
    policy = made("sd15", rank=rank)
    nudge(policy)
    far = float(policy.weight_distance().detach().sqrt())
    moved = policy.weights()
    assert policy.draw_back(2 * far) == pytest.approx(far, rel=1e-5)
    assert all(torch.equal(moved[name], weights) for name, weights in policy.weights().items())  # within the budget nothing happens
    assert policy.draw_back(far / 4) == pytest.approx(far, rel=1e-5)
    assert float(policy.weight_distance().detach().sqrt()) == pytest.approx(far / 4, rel=1e-3)
    ahead = {name: weights for name, weights in policy.weights().items() if "lora_A" in name}
    assert all(torch.equal(moved[name], weights) for name, weights in ahead.items())
