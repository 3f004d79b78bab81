"""`shapes-reward`, first part: a captioner learns log p(caption | image) from drawn scenes.

Two terms, on scenes and their near copies (`rewards_captions.py`), s(x, c) = log p(c | x) in nats:
  captioning   -s(x, c) over its tokens, held-out continuations left out of the softmax;
  ranking      softplus(s(x', c) - s(x, c)) where c is true of x and false of its near copy x': the comparison that a reward is asked for.

The second part (`rewards_captioner_tune.py`) goes on from here with images that generators made.
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
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from diffalign.reward_models.shapes_captioner import Captioner, CaptionerConfig
from diffalign.shapes.train import loop
from diffalign.shapes.train import rewards_captions as captions
from diffalign.shapes.train.rewards_convert import save_half
from diffalign.shapes.train.rewards_images import autoencoded, disturb

CONFIG = loop.LoopConfig(steps=4400, lr=1e-3, seed=31, warmup=250, ema_decay=0.998, weight_decay=0.02, save_every=200)
SCENES = 20_000  # as many near copies are drawn beside them


@dataclass(frozen=True)
class CaptioningConfig:
    """What a step looks at."""

    batch: int = 64  # images: half scenes, half their near copies
    ranking: float = 1.0  # weight of the ranking term
    words: float = 0.1  # weight of the captioning term, whose nats are summed over a caption
    until: int = 2400  # steps taken of the schedule; the rounds that follow begin near the rate it ends with, and bring it down
    bfloat16: bool = True  # multiply in bfloat16; weights and likelihoods stay float32


def build(tokenizer: CLIPTokenizer) -> Captioner:
    """A new captioner for this tokenizer's words."""
    ids = CaptionerConfig(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length)
    return Captioner(ids).to(memory_format=torch.channels_last)


def caption_terms(
    model: Captioner,
    memory: Float[Tensor, "m 64 d"],
    ids: Int[Tensor, "m l"],
    blocked: Tensor,
    differs: Tensor,
    other: Int[Tensor, " m"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], float]:
    """(captioning, ranking, share ranked rightly); other: which image of the batch each caption is compared on."""
    m = len(ids)
    rows = torch.cat([torch.arange(m, device=ids.device), other[differs]])
    chosen = torch.cat([torch.arange(m, device=ids.device), differs.nonzero().squeeze(1)])
    nats = model.log_likelihood(memory, ids[chosen], rows, blocked[chosen])
    total = nats.sum(dim=1)
    margin = total[:m][differs] - total[m:]
    ranked = (margin > 0).float().mean().item() if len(margin) else 1.0
    ranking = F.softplus(-margin).sum() / max(len(margin), 1)
    return -total[:m].mean(), ranking, ranked


def captioning_loss(
    model: Captioner, pool: captions.CaptionPool, tokenizer: CLIPTokenizer, settings: CaptioningConfig, device: str
) -> Callable:
    """The loss of one step, as the loop wants it."""
    table = captions.blocked_words(tokenizer).to(device)
    half = settings.batch // 2
    other = torch.arange(2 * half).roll(half).to(device)

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(pool.images) // 2, (half,), generator=generator)
        rows = torch.cat([index, index + len(pool.images) // 2])
        choice = torch.randint(pool.ids.shape[1], (2 * half,), generator=generator)
        clean = pool.images[rows].to(device).permute(0, 3, 1, 2).float() / 255
        images = disturb(clean, generator).contiguous(memory_format=torch.channels_last)
        ids, differs = pool.ids[rows, choice].to(device), pool.differs[rows, choice].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.bfloat16):
            memory = model.encode_image(images)
            blocked = table[pool.blocked[rows, choice].long().to(device)]
            words, ranking, ranked = caption_terms(model, memory, ids, blocked, differs, other)
        return settings.words * words + settings.ranking * ranking, {"nats": words.item(), "ranking": ranking.item(), "ranked": ranked}

    return loss_of


def train_captioner(
    run: Path,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL | None,
    config: loop.LoopConfig = CONFIG,
    settings: CaptioningConfig = CaptioningConfig(),
    scenes: int = SCENES,
    device: str = "cpu",
    finished: bool = False,
) -> Captioner:
    """Train (or resume from `run`); returns the captioner with averaged weights.

    autoencoder: the generators' own; every other picture passes through it, since it is on such pictures that the reward will be used.
    finished: read what an earlier run reached, however far, and train no more. Raises FileNotFoundError where there is none.
    """
    torch.manual_seed(config.seed)
    model = build(tokenizer).to(device)
    state = run / "captioner.safetensors"
    if finished and not state.is_file():
        raise FileNotFoundError(f"{state} is missing; run `python -m diffalign.shapes.train captioner --run {run}` first")
    trainee = loop.Trainee({"captioner": model}, config, state)
    if not finished and trainee.step < min(config.steps, settings.until):
        pool = captions.draw_pool(scenes, config.seed, tokenizer)
        if autoencoder is not None:
            pool.images[::2] = autoencoded(pool.images[::2], autoencoder, config.seed)
        loop.train(trainee, captioning_loss(model, pool, tokenizer, settings, device), "captioner", until=settings.until)
    trainee.use_average()
    return model.eval()


def save_reward(folder: Path, model: Captioner, tokenizer: CLIPTokenizer) -> None:
    """The folder that `diffalign.load_reward("shapes-reward", source=folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n", encoding="utf-8")
    save_half(model.state_dict(), folder / "model.safetensors")


def load_captioner(folder: Path) -> Captioner:
    """A saved captioner in float32. Raises FileNotFoundError where the stage that writes it has not run."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no captioner; run `python -m diffalign.shapes.train captioner shapes-reward` first")
    config = CaptionerConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = Captioner(config).to(memory_format=torch.channels_last)
    model.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
    return model.eval()
