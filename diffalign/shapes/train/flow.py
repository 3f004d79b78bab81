"""`shapes-flow`: Stable Diffusion 3's architecture at toy size, trained by flow matching (Esser et al., arXiv 2403.03206).

    x_t = (1 - t) x_0 + t eps,   loss = ||v(x_t, t, c) - (eps - x_0)||^2,   t = sigmoid(n), n ~ N(0, 1)

(their eq. 13 with a rectified flow, and the logit-normal density of section 3.1). x_0: latents of the autoencoder of `shapes`, scaled
to unit deviation. One empty prompt in ten for guidance. A folder that StableDiffusion3Pipeline loads, with two text encoders and no T5:

- SD3 reads an encoder's penultimate state. The first encoder is the one of `shapes` with an empty layer behind it, so that this is its
  last state; the second is its first layer alone with an empty one behind it, so it says which word stands where.
- Where T5 is missing the pipeline appends `max_sequence_length` (256) zero vectors to the prompt. All are alike, and stay alike through
  every layer, so n of them are one of them whose attention logit is higher by log n. Training draws n: the stock call (256) and a
  fast one (`max_sequence_length=1`) then both are what was trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.shapes.train import base, data, export, loop

CONFIG = loop.LoopConfig(steps=5000, lr=1.2e-3, seed=15, ema_decay=0.999, warmup=300, save_every=200)
JUDGED_STEPS = 20
FAST = {"max_sequence_length": 1}  # for calls of the pipeline: one zero vector in T5's place rather than 256


@dataclass(frozen=True)
class FlowConfig:
    """What a step looks at."""

    batch: int = 64  # scenes
    scenes: int = 30_000  # drawn, four captions each
    empty_prompts: float = 0.1  # share of prompts left out, for guidance
    length: int = 24  # tokens of a prompt that are read; a long caption of two things has 22
    zeros: tuple[int, ...] = (1, 256)  # how many zero vectors follow a prompt, drawn anew in each step
    bfloat16: bool = True  # multiply in bfloat16


def build_transformer(encoders: tuple[CLIPTextModelWithProjection, ...]) -> SD3Transformer2DModel:
    """Six joint blocks of width 128 over 64 image tokens; every gate starts closed, as in DiT (arXiv 2212.09748)."""
    width = sum(encoder.config.hidden_size for encoder in encoders)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=width,
        pooled_projection_dim=sum(encoder.config.projection_dim for encoder in encoders),
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    closed = [model.norm_out.linear, model.proj_out]
    closed += [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in closed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def build_encoders(encoder: CLIPTextModel) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The two text encoders of the folder, of all and of the first layer of the given one; frozen."""
    return _with_empty_layer(encoder, encoder.config.num_hidden_layers), _with_empty_layer(encoder, 1)


def _with_empty_layer(encoder: CLIPTextModel, layers: int) -> CLIPTextModelWithProjection:
    """The first `layers` layers of an encoder, then one that adds nothing; the projection is the identity."""
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers, config.projection_dim = layers + 1, config.hidden_size
    model = CLIPTextModelWithProjection(config)
    own = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    extra = f"encoder.layers.{layers}."
    kept = {name: t for name, t in own.items() if not name.startswith("encoder.layers.") or int(name.split(".")[2]) < layers}
    missing, unknown = model.text_model.load_state_dict(kept, strict=False)
    if unknown or any(not name.startswith(extra) for name in missing):
        raise ValueError(f"the text encoder has other parts than a CLIPTextModel: {[*unknown, *missing][:4]}")
    last = model.text_model.encoder.layers[layers]
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    nn.init.eye_(model.text_projection.weight)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def read_prompts(
    encoders: tuple[CLIPTextModelWithProjection, ...], ids: Int[Tensor, "b l"]
) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b p"]]:
    """(states with one zero vector behind them, pooled) as StableDiffusion3Pipeline.encode_prompt makes them, k = l + 1."""
    read = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([one.hidden_states[-2] for one in read], dim=-1)
    return F.pad(states, (0, 0, 0, 1)), torch.cat([one.text_embeds for one in read], dim=-1)


class CountedZeros:
    """SD3's joint attention, where the last key of the context stands for `count` equal ones."""

    def __init__(self) -> None:
        self.count = 1

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        parts = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
        tokens = hidden_states.shape[1]
        streams = []
        for x, linears, normed in zip((hidden_states, encoder_hidden_states), parts, norms, strict=True):
            q, k, v = (linear(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for linear in linears)
            streams.append([*(n(part) for n, part in zip(normed, (q, k), strict=True)), v])
        q, k, v = (torch.cat(both, dim=2) for both in zip(*streams, strict=True))
        logits = (q.to(v.dtype) @ k.to(v.dtype).transpose(2, 3)).float() * q.shape[-1] ** -0.5
        more = logits.new_zeros(logits.shape[-1])
        more[-1] = math.log(self.count)
        mixed = ((logits + more).softmax(dim=3).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        image, context = mixed[:, :tokens], mixed[:, tokens:]
        return attn.to_out[1](attn.to_out[0](image)), context if attn.context_pre_only else attn.to_add_out(context)


def flow_loss(
    model: SD3Transformer2DModel, zeros: CountedZeros, latents: Tensor, ids: Tensor, empty: Tensor, encoders: tuple, settings: FlowConfig
) -> Callable:
    """The loss of one step, as the loop wants it."""
    device = next(model.parameters()).device

    def loss_of(step: int, generator: torch.Generator):
        b = settings.batch
        index = torch.randint(len(latents), (b,), generator=generator)
        tokens = ids[index, base.caption_choice(generator, b)]
        tokens = torch.where(torch.rand(b, 1, generator=generator) < settings.empty_prompts, empty, tokens)
        t = torch.randn(b, generator=generator).sigmoid().view(-1, 1, 1, 1)
        noise = torch.randn(latents[index].shape, generator=generator)
        zeros.count = settings.zeros[int(torch.randint(len(settings.zeros), (), generator=generator))]
        x = latents[index]
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            states, pooled = read_prompts(encoders, tokens.to(device))
            noisy = ((1 - t) * x + t * noise).to(device)
            predicted = model(noisy, states, pooled, 1000 * t.flatten().to(device)).sample
        error = F.mse_loss(predicted.float(), (noise - x).to(device))
        return error, {"mse": error.item()}

    return loss_of


def train(
    run: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    config: loop.LoopConfig = CONFIG,
    settings: FlowConfig = FlowConfig(),
    device: str = "cpu",
) -> SD3Transformer2DModel:
    """Train (or resume) the transformer; returns it with averaged weights."""
    torch.manual_seed(config.seed)
    encoders = tuple(one.to(device) for one in build_encoders(encoder))
    model = build_transformer(encoders).to(device)
    trainee = loop.Trainee({"transformer": model}, config, run / "flow.safetensors")
    zeros = CountedZeros()
    stock = model.attn_processors
    model.set_attn_processor(zeros)
    if trainee.step < config.steps:
        dataset = data.draw(settings.scenes, config.seed)
        latents = base.encode_images(vae.to(device), dataset.images, device)
        ids = cut(data.tokenize(tokenizer, dataset.captions), settings.length, tokenizer)
        empty = cut(data.tokenize(tokenizer, [[""]]), settings.length, tokenizer)[0, 0]
        loop.train(trainee, flow_loss(model, zeros, latents, ids, empty, encoders, settings), "shapes-flow")
    model.set_attn_processor(stock)
    trainee.use_average()
    return model.eval()


def cut(ids: Int[Tensor, "n k l"], length: int, tokenizer: CLIPTokenizer) -> Int[Tensor, "n k length"]:
    """Token ids of at most `length`, the last one an end token in any case, as a tokenizer of that length gives them."""
    ids = ids[..., :length].clone()
    ids[..., -1] = tokenizer.eos_token_id
    return ids


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    transformer: SD3Transformer2DModel,
    length: int = FlowConfig.length,
) -> None:
    """Write a StableDiffusion3Pipeline folder in float16. The models given are left as they are."""
    vae, transformer = (copy.deepcopy(m).to("cpu", torch.float16) for m in (vae, transformer))
    vae.register_to_config(shift_factor=0.0)  # SD3's pipeline asks for one
    first, second = (m.to(torch.float16) for m in build_encoders(encoder.cpu().float()))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = length
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    export.save(pipeline, folder)


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """A finished pipeline in float32. Raises FileNotFoundError where the stage "flow" has not run.

    A folder without T5 loads only where the missing parts are named, as in diffusers' own advice for SD3.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished pipeline; run `python -m diffalign.shapes.train flow` first")
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)
