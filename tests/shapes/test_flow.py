"""`shapes-flow`: what is trained is what StableDiffusion3Pipeline runs, resumed trainings go on where they were, its folder is ordinary."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from diffalign.shapes.train import data, evaluate, flow, loop, text

FEW = loop.LoopConfig(steps=4, lr=1e-3, seed=9, warmup=1, save_every=1)
LITTLE = flow.FlowConfig(batch=3, scenes=5)


@pytest.fixture(scope="module")
def tokenizer():
    return text.build_tokenizer()


@pytest.fixture(scope="module")
def parts(tokenizer):
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=8, norm_num_groups=4, layers_per_block=1, sample_size=64,
    )  # fmt: skip
    return vae.eval(), tokenizer, text.build_encoder(tokenizer).eval()


@pytest.fixture
def opened(monkeypatch):
    """A transformer of two blocks whose gates are open, so that everything in it matters from the first step."""
    build = flow.SD3Transformer2DModel
    monkeypatch.setattr(flow, "SD3Transformer2DModel", lambda **sizes: build(**sizes | {"num_layers": 2}))
    monkeypatch.setattr(flow.nn.init, "zeros_", lambda tensor: tensor)


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_first_encoder_gives_the_state_that_shapes_reads_and_the_second_its_words(parts, tokenizer):
    _, _, encoder = parts
    first, second = flow.build_encoders(encoder)
    ids = data.tokenize(tokenizer, [["a red circle left of a star"]])[0]
    own = encoder(ids, output_hidden_states=True)
    torch.testing.assert_close(first(ids, output_hidden_states=True).hidden_states[-2], own.hidden_states[-1])
    torch.testing.assert_close(first(ids).text_embeds, own.pooler_output)
    torch.testing.assert_close(second(ids, output_hidden_states=True).hidden_states[-2], own.hidden_states[1])


@pytest.mark.parametrize("zeros", [1, 256])
def test_one_counted_zero_is_what_the_stock_transformer_makes_of_as_many(parts, opened, zeros):
    _, tokenizer, encoder = parts
    torch.manual_seed(2)
    encoders = flow.build_encoders(encoder)
    model = flow.build_transformer(encoders).eval()
    states, pooled = flow.read_prompts(encoders, data.tokenize(tokenizer, [["a star", "two red hearts"]])[0])
    x, t = torch.randn(2, 8, 8, 8), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        more = torch.zeros(2, zeros - 1, states.shape[2])
        stock = model(x, torch.cat([states, more], dim=1), pooled, t).sample
        counted = flow.CountedZeros()
        counted.count = zeros
        model.set_attn_processor(counted)
        ours = model(x, states, pooled, t).sample
        counted.count = 17
        other = model(x, states, pooled, t).sample
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
    assert (other - stock).abs().max() > 1e-5


def test_prompts_are_read_as_the_pipeline_reads_them(parts, tmp_path):
    vae, tokenizer, encoder = parts
    encoders = flow.build_encoders(encoder)
    flow.save_pipeline(tmp_path / "shapes-flow", vae, tokenizer, encoder, flow.build_transformer(encoders))
    pipeline = flow.load_pipeline(tmp_path / "shapes-flow")
    assert type(pipeline) is StableDiffusion3Pipeline
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    texts = ["a photo of a large red circle at the top left and a small blue star at the bottom right", "", "a star"]
    states, _, pooled, _ = pipeline.encode_prompt(texts, None, None, do_classifier_free_guidance=False, max_sequence_length=1)
    ids = flow.cut(data.tokenize(tokenizer, [texts]), LITTLE.length, tokenizer)[0]
    ours, ours_pooled = flow.read_prompts(encoders, ids)
    torch.testing.assert_close(states, ours, atol=5e-3, rtol=5e-3)  # the folder is in half precision
    torch.testing.assert_close(pooled, ours_pooled, atol=5e-3, rtol=5e-3)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a star", num_inference_steps=2, output_type="np", **flow.FAST).images
    assert image.shape == (1, 64, 64, 3)


def test_the_loss_is_that_of_a_straight_path(parts, monkeypatch):
    """Worked by hand: a model that says nothing has the mean of (noise - x)^2 as its loss; one that says noise - x has none."""
    _, tokenizer, encoder = parts
    encoders = flow.build_encoders(encoder)
    latents = torch.full((5, 8, 8, 8), 2.0)
    ids = data.tokenize(tokenizer, [["a star"] * 4] * 5)
    seen: dict[str, torch.Tensor] = {}

    class Knowing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(()))

        def forward(self, noisy, states, pooled, t):
            seen["t"] = t / 1000
            noise = (noisy - (1 - seen["t"].view(-1, 1, 1, 1)) * 2.0) / seen["t"].view(-1, 1, 1, 1)
            return type("Out", (), {"sample": self.factor * (noise - 2.0)})

    model = Knowing()
    settings = flow.FlowConfig(batch=3, bfloat16=False)
    loss_of = flow.flow_loss(model, flow.CountedZeros(), latents, ids, ids[0, 0], encoders, settings)
    loss, _ = loss_of(0, torch.Generator().manual_seed(1))
    assert loss.item() < 1e-8
    assert ((seen["t"] > 0) & (seen["t"] < 1)).all()
    with torch.no_grad():
        model.factor.zero_()
    assert loss_of(0, torch.Generator().manual_seed(1))[0].item() == pytest.approx(5.0, rel=0.15)  # E (noise - 2)^2


def test_a_resumed_training_equals_an_uninterrupted_one_and_every_weight_learns(parts, opened, tmp_path, monkeypatch):
    whole = flow.train(tmp_path / "a", *parts, FEW, LITTLE)
    original = loop.train
    monkeypatch.setattr(loop, "train", lambda *args: original(*args, until=2))
    half = flow.train(tmp_path / "b", *parts, FEW, LITTLE)
    monkeypatch.setattr(loop, "train", original)
    resumed = flow.train(tmp_path / "b", *parts, FEW, LITTLE)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert not torch.equal(weights_of(half), weights_of(resumed))
    assert not any(isinstance(p, flow.CountedZeros) for p in resumed.attn_processors.values())


def test_every_weight_learns(parts, opened):
    _, tokenizer, encoder = parts
    encoders = flow.build_encoders(encoder)
    model = flow.build_transformer(encoders)
    zeros = flow.CountedZeros()
    model.set_attn_processor(zeros)
    ids = data.tokenize(tokenizer, [["a star"] * 4] * 5)
    loss, _ = flow.flow_loss(model, zeros, torch.randn(5, 8, 8, 8), ids, ids[0, 0], encoders, LITTLE)(0, torch.Generator().manual_seed(1))
    loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert all("transformer_blocks.1.attn" in name and "added_q" in name.replace("add_q", "added_q") for name in still)
    # Of the last block the context's queries lead nowhere: SD3 reads the image's tokens alone after it.


def test_new_gates_are_closed_so_that_the_model_begins_by_saying_nothing(parts):
    _, tokenizer, encoder = parts
    encoders = flow.build_encoders(encoder)
    model = flow.build_transformer(encoders)
    states, pooled = flow.read_prompts(encoders, data.tokenize(tokenizer, [["a star"]])[0])
    assert (model(torch.randn(1, 8, 8, 8), states, pooled, torch.tensor([500.0])).sample == 0).all()


def test_the_judge_counts_its_images(parts, opened, tmp_path):
    vae, tokenizer, encoder = parts
    flow.save_pipeline(tmp_path / "shapes-flow", vae, tokenizer, encoder, flow.build_transformer(flow.build_encoders(encoder)))
    pipeline = flow.load_pipeline(tmp_path / "shapes-flow")
    counts = evaluate.judge_accuracy(pipeline, steps=1, guidance=2.0, split="validation", per_task=1, call=flow.FAST)
    assert {task: total for task, (_, total) in counts.items()} == dict.fromkeys(counts, 1)


def test_a_folder_that_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train flow"):
        flow.load_pipeline(tmp_path)
