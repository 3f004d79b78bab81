"""`shapes-watch`: a reward of another kind than those that are optimised, for watching them (network: `reward_models/shapes_film.py`).

It learns from drawn scenes and their near copies, from voters of its own: asked of which of two pictures a caption is true, and which of
two captions is true of a picture, FLIPPED of them say the opposite. With s the score, the loss of each vote is Bradley and Terry's,

    -log sigmoid(s(preferred) - s(other)),

and a plain cross-entropy of s against the vote keeps it a log-odds. It never sees a generated image or a verdict of the judge.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from diffalign.reward_models.shapes_film import FilmConfig, FilmScorer
from diffalign.shapes.train import loop
from diffalign.shapes.train import rewards_captions as captions
from diffalign.shapes.train.rewards_convert import save_half
from diffalign.shapes.train.rewards_images import autoencoded, disturb

CONFIG = loop.LoopConfig(steps=1800, lr=1.5e-3, seed=41, warmup=100, ema_decay=0.995, weight_decay=0.01, save_every=200)
FLIPPED = 0.1  # share of votes that are wrong


@dataclass(frozen=True)
class WatchConfig:
    """What a step looks at."""

    batch: int = 64  # pictures: half scenes, half their near copies
    scenes: int = 10_000  # drawn, and as many near copies
    odds: float = 0.5  # weight of the plain cross-entropy
    bfloat16: bool = True  # multiply in bfloat16, the reader apart


def build(tokenizer: CLIPTokenizer) -> FilmScorer:
    return FilmScorer(FilmConfig(len(tokenizer), tokenizer.eos_token_id)).to(memory_format=torch.channels_last)


def vote_loss(own: Float[Tensor, " b"], crossed: Float[Tensor, " b"], flipped: Tensor) -> Float[Tensor, ""]:
    """Bradley and Terry's loss where `own` should win, or where a vote was flipped, `crossed`."""
    sign = 1 - 2 * flipped.float()
    return F.softplus(-sign * (own - crossed)).mean()


def watch_loss(model: FilmScorer, pool: captions.CaptionPool, settings: WatchConfig, device: str) -> Callable:
    """The loss of one step, as the loop wants it."""
    half = settings.batch // 2
    other = torch.arange(2 * half).roll(half).to(device)

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(pool.images) // 2, (half,), generator=generator)
        rows = torch.cat([index, index + len(pool.images) // 2])
        choice = torch.randint(pool.ids.shape[1], (2 * half,), generator=generator)
        clean = pool.images[rows].to(device).permute(0, 3, 1, 2).float() / 255
        images = disturb(clean, generator).contiguous(memory_format=torch.channels_last)
        differs = pool.differs[rows, choice].to(device)
        prompts = model.read(pool.ids[rows, choice].to(device))
        crossed = other[differs]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.bfloat16):
            maps = model.encode_image(images)
            mine = torch.arange(2 * half, device=device)
            s = model(maps, torch.cat([prompts, prompts[differs]]), torch.cat([mine, crossed]))
        own, wrong = s[: 2 * half], s[2 * half :]
        flips = (torch.rand(2 * len(wrong) + len(s), generator=generator) < FLIPPED).to(device)
        first, second, rest = flips.split([len(wrong), len(wrong), len(s)])
        by_image = vote_loss(own[differs], wrong, first)  # one caption, a picture against its near copy
        by_caption = vote_loss(own[crossed], wrong, second)  # one picture, its own caption against that of its near copy
        votes = torch.cat([~rest[: len(own)], rest[len(own) :]]).float()
        odds = F.binary_cross_entropy_with_logits(s, votes)
        ranked = (own[differs] > wrong).float().mean().item()
        return by_image + by_caption + settings.odds * odds, {"votes": by_image.item(), "odds": odds.item(), "ranked": ranked}

    return loss_of


def train_watch(
    run: Path,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL | None,
    config: loop.LoopConfig = CONFIG,
    settings: WatchConfig = WatchConfig(),
    device: str = "cpu",
) -> FilmScorer:
    """Train (or resume from `run`); returns the scorer with averaged weights. autoencoder: every other picture passes through it."""
    torch.manual_seed(config.seed)
    model = build(tokenizer).to(device)
    trainee = loop.Trainee({"watch": model}, config, run / "watch.safetensors")
    if trainee.step < config.steps:
        pool = captions.draw_pool(settings.scenes, config.seed, tokenizer)
        if autoencoder is not None:
            pool.images[::2] = autoencoded(pool.images[::2], autoencoder, config.seed)
        loop.train(trainee, watch_loss(model, pool, settings, device), "shapes-watch")
    trainee.use_average()
    return model.eval()


def save_watch(folder: Path, model: FilmScorer, tokenizer: CLIPTokenizer) -> None:
    """The folder that `diffalign.load_reward("shapes-watch", source=folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n", encoding="utf-8")
    save_half(model.state_dict(), folder / "model.safetensors")


def load_watch(folder: Path) -> FilmScorer:
    """A saved scorer in float32. Raises FileNotFoundError where the stage that writes it has not run."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no scorer; run `python -m diffalign.shapes.train shapes-watch` first")
    model = FilmScorer(FilmConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    model.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
    return model.eval()


def watch_scores(model: FilmScorer, tokenizer: CLIPTokenizer, device: str) -> Callable[[Tensor, list[str]], Tensor]:
    """8-bit images "b h w 3", prompts -> scores."""

    def score(images: Tensor, texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        pixels = images.to(device).permute(0, 3, 1, 2).float() / 255
        return model(model.encode_image(pixels), model.read(ids))

    return score
