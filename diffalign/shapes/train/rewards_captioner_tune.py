"""`shapes-reward`, second part: the captioner learns from images that the generators made, and from those that fool it.

A simulated annotator sees two images of one prompt, says which is right, and errs in FLIPPED of the cases. It is
the judge, on prompts of training combinations alone (`judged.annotator_rows`). With s(x, c) = log p(c | x) without the
end token (what is said, not that no more is),

    loss = - mean over pairs of log sigmoid(s(preferred, c) - s(other, c)) + the two terms of the first part
           - log p of what the annotator says it sees in the images + cross-entropy of the regions it marks
             (`rewards_described.py`, as often wrong),

a Bradley-Terry model (as in ImageReward, Xu et al., arXiv 2304.05977) whose scores stay likelihoods. It goes in rounds: the first learns
from images of `shapes`, each later one also from one-step images and from climbs of what the round before had learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffalign.reward_models.shapes_captioner import CELLS, Captioner, other_way_round
from diffalign.shapes.train import judged as made
from diffalign.shapes.train import loop
from diffalign.shapes.train import rewards_captions as captions
from diffalign.shapes.train.judged import Judged
from diffalign.shapes.train.rewards_captioner import CaptioningConfig, caption_terms
from diffalign.shapes.train.rewards_climb import ClimbConfig, climber
from diffalign.shapes.train.rewards_described import CAPTIONS, HUES, KINDS, Descriptions, cell_labels, described, region_loss
from diffalign.shapes.train.rewards_images import autoencoded, disturb

FLIPPED = 0.1  # share of votes that name the wrong image
GROUP = 8  # images of one prompt
CLIMB = ClimbConfig()
CONFIG = loop.LoopConfig(steps=900, lr=4e-4, seed=32, warmup=20, ema_decay=0.99, weight_decay=0.02, save_every=100)  # of each round


@dataclass(frozen=True)
class TuneConfig:
    """How much is drawn, and what a step looks at."""

    base_prompts: int = 800  # GROUP images of `shapes` each, all that the first round sees
    base_steps: int = 8  # DDIM steps of these
    base_guidances: tuple[float, ...] = (1.0, 2.0, 3.0, 6.0)  # shared among a prompt's images
    first_steps: int = 900  # of the first round; the later ones take the loop's own number
    rounds: int = 2  # all later ones also see one-step images, and climbs of what the round before had learnt
    fresh_prompts: tuple[int, ...] = (2400,)  # GROUP one-step images each, added in each later round
    guided: float = 0.25  # share of a later round's plain images that are of `shapes`
    shift: int = 5  # pixels; generated images are moved by up to as much, and mirrored where no word speaks of sides
    climbed_prompts: int = 256  # GROUP stations each, for each later round
    climbs: float = 0.3  # share of a later round's prompts that are climbs
    prompts: int = 8  # of a step
    votes: float = 1.0  # weight of the preference term
    described: float = 0.1  # weight of the annotator's captions of generated images, in nats a caption
    regions: float = 0.5  # weight of the regions it marks, asked of the image's tokens by a linear head that is dropped afterwards
    captions: CaptioningConfig = field(default_factory=lambda: CaptioningConfig(batch=32))  # of the terms of the first part
    scenes: int = 6_000  # drawn for these
    mixed: bool = True  # leave out prompts whose images are all right or all wrong, of which no vote is cast; a rehearsal keeps them


def scores(model: Captioner, images: Float[Tensor, "b 3 h w"], ids: Int[Tensor, "b l"], rows: Tensor | None = None) -> Float[Tensor, " b"]:
    """s(x, c): nats of each caption given its image, the end token left out."""
    nats = model.log_likelihood(model.encode_image(images), ids, rows)
    return said(nats, ids, model.config.end)


def said(nats: Float[Tensor, "b k"], ids: Int[Tensor, "b l"], end: int) -> Float[Tensor, " b"]:
    """The sum without the end token's part."""
    return nats.masked_fill(ids[:, 1 : nats.shape[1] + 1] == end, 0.0).sum(dim=1)


def votes_of(right: Bool[Tensor, "n g"], seed: int, flipped: float = FLIPPED) -> Float[Tensor, "n g g"]:
    """1 where the annotator prefers image i to image j, -1 where j to i, 0 where the judge sees no difference. Antisymmetric."""
    n, g = right.shape
    generator = torch.Generator().manual_seed(seed)
    truth = right[:, :, None].float() - right[:, None, :].float()
    upper = torch.where(torch.rand(n, g, g, generator=generator) < flipped, -1.0, 1.0).triu(1)
    return truth * (upper + upper.transpose(1, 2))


def preference_loss(s: Float[Tensor, "n g"], votes: Float[Tensor, "n g g"]) -> Float[Tensor, ""]:
    """-log sigmoid(s_preferred - s_other), the mean over each prompt's pairs, then over prompts."""
    ahead = (s[:, :, None] - s[:, None, :]) * votes
    cast = (votes != 0).float()
    each = (F.softplus(-ahead) * cast).sum(dim=(1, 2)) / cast.sum(dim=(1, 2)).clamp(min=1)
    return each.mean()


def as_pixels(images: UInt8[Tensor, "b h w 3"], device: str) -> Float[Tensor, "b 3 h w"]:
    return (images.to(device).permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)


@dataclass
class Ballots:
    """Judged groups of mixed prompts, with the annotator's votes and captions, and the prompts' ids."""

    images: UInt8[Tensor, "n g h w 3"]
    votes: Float[Tensor, "n g g"]
    ids: Int[Tensor, "n l"]
    said: Descriptions


def ballots(judged: Judged, tokenizer: CLIPTokenizer, seed: int, only_mixed: bool = True) -> Ballots:
    """only_mixed: leave out prompts of which no vote is cast. Raises ValueError where none is left."""
    votes = votes_of(judged.right, seed)
    mixed = judged.mixed if only_mixed else torch.ones_like(judged.mixed)
    if not mixed.any():
        raise ValueError("no prompt has both right and wrong images; draw more prompts, or from a generator that is less uniform")
    texts = [row["prompt"] for row, keep in zip(judged.rows, mixed.tolist(), strict=True) if keep]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return Ballots(judged.images[mixed], votes[mixed], ids, described(judged.images[mixed], tokenizer, seed, FLIPPED))


def tuning_loss(
    model: Captioner,
    sources: list[tuple[float, Ballots]],
    pool: captions.CaptionPool,
    tokenizer: CLIPTokenizer,
    settings: TuneConfig,
    device: str,
    shift: int = 0,
    head: nn.Module | None = None,
) -> Callable:
    """The loss of one step, as the loop wants it.

    sources: ballots, each with its share of a step's prompts. shift: by how many pixels at most generated images are moved; 0 leaves
    them as they are. head: asked for the regions; without one they are not.
    """
    table = captions.blocked_words(tokenizer).to(device)
    half = settings.captions.batch // 2
    other = torch.arange(2 * half).roll(half).to(device)
    shares = torch.tensor([share for share, _ in sources])
    sides = torch.tensor(tokenizer(["left", "right"], add_special_tokens=False).input_ids).flatten()
    group = sources[0][1].images.shape[1]

    def loss_of(step: int, generator: torch.Generator):
        kinds = torch.multinomial(shares, settings.prompts, replacement=True, generator=generator).tolist()
        places = [int(torch.randint(len(sources[k][1].ids), (), generator=generator)) for k in kinds]
        picked = [(sources[k][1], i) for k, i in zip(kinds, places, strict=True)]
        votes = torch.stack([b.votes[i] for b, i in picked]).to(device)
        prompts = torch.stack([b.ids[i] for b, i in picked]).repeat_interleave(group, dim=0).to(device)

        index = torch.randint(len(pool.images) // 2, (half,), generator=generator)
        rows = torch.cat([index, index + len(pool.images) // 2])
        choice = torch.randint(pool.ids.shape[1], (2 * half,), generator=generator)
        which = torch.randint(CAPTIONS, (settings.prompts * group,), generator=generator)
        seen = [(b.said.ids[i, k, c], b.said.blocked[i, k, c], b.said.known[i, k, c]) for (b, i), k, c in _each(picked, which, group)]
        seen_ids, seen_rows, known = (torch.stack(part).to(device) for part in zip(*seen, strict=True))
        drawn = disturb(as_pixels(pool.images[rows], device), generator)
        shown = torch.cat([b.images[i] for b, i in picked])
        regions = torch.cat([b.said.regions[i] for b, i in picked])
        if shift:
            sided = (torch.stack([*prompts, *seen_ids]).cpu().unsqueeze(2) == sides).any(dim=2).any(dim=1).view(2, -1).any(dim=0)
            both = moved(torch.cat([shown, regions[..., None]], dim=3), ~sided, shift, generator)
            shown, regions = both[..., :3], both[..., 3]
        images = torch.cat([drawn, as_pixels(shown, device)])
        images = images.contiguous(memory_format=torch.channels_last)
        ids, differs = pool.ids[rows, choice].to(device), pool.differs[rows, choice].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.captions.bfloat16):
            memory = model.encode_image(images)
            blocked = table[pool.blocked[rows, choice].long().to(device)]
            words, ranking, _ = caption_terms(model, memory[: 2 * half], ids, blocked, differs, other)
            nats = model.log_likelihood(memory[2 * half :], prompts)
            told = model.log_likelihood(memory[2 * half :], seen_ids, blocked=table[seen_rows.long()])
        s = said(nats, prompts, model.config.end).view(-1, group)
        preference = preference_loss(s, votes)
        agreed = ((s[:, :, None] - s[:, None, :]) * votes > 0).float().sum() / (votes != 0).float().sum().clamp(min=1)
        seen_nats = -(told.sum(dim=1) * known).sum() / known.sum().clamp(min=1)
        loss = settings.votes * preference + settings.captions.words * words + settings.captions.ranking * ranking
        loss = loss + settings.described * seen_nats
        marked = loss.new_zeros(())
        if head is not None:
            kinds, hues = (labels.to(device) for labels in cell_labels(regions, CELLS))
            marked = region_loss(head(memory[2 * half :].float()), kinds, hues)
            loss = loss + settings.regions * marked
        figures = {"preference": preference, "agreed": agreed, "nats": words, "seen": seen_nats, "ranking": ranking, "regions": marked}
        return loss, {name: value.item() for name, value in figures.items()}

    return loss_of


def moved(
    images: UInt8[Tensor, "n h w c"], symmetric: Bool[Tensor, " n"], shift: int, generator: torch.Generator
) -> UInt8[Tensor, "n h w c"]:
    """Images moved by up to `shift` pixels each way, their edges repeated, and half of the `symmetric` ones mirrored.

    Neither changes the judge's verdict: every shape of the world is its own mirror image.
    """
    n, h, w, _ = images.shape
    across, down = torch.randint(-shift, shift + 1, (2, n, 1), generator=generator)
    columns, rows = (torch.arange(w) + across).clamp(0, w - 1), (torch.arange(h) + down).clamp(0, h - 1)
    mirrored = symmetric & (torch.rand(n, generator=generator) < 0.5)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return images[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _each(picked: list[tuple[Ballots, int]], which: Tensor, group: int) -> Iterator[tuple[tuple[Ballots, int], int, int]]:
    """(ballots and prompt, image of the group, caption of the image) for every image of a step."""
    for j, choice in enumerate(which.tolist()):
        yield picked[j // group], j % group, choice


def reward_of(model: Captioner, tokenizer: CLIPTokenizer, bfloat16: bool = False) -> Callable[[Tensor, list[str]], Tensor]:
    """images in [0, 1], prompts -> scores, with gradients to the images."""
    device = model.places.device

    def reward(images: Float[Tensor, "n 3 h w"], texts: list[str]) -> Float[Tensor, " n"]:
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return scores(model, images.contiguous(memory_format=torch.channels_last), ids)

    return reward


def final_reward(model: Captioner, tokenizer: CLIPTokenizer) -> Callable[[Tensor, list[str]], Tensor]:
    """images in [0, 1], prompts -> what the finished reward says: the likelihood of a prompt either way round (chosen on validation)."""
    device = model.places.device

    def reward(images: Float[Tensor, "n 3 h w"], texts: list[str]) -> Float[Tensor, " n"]:
        both = [
            tokenizer(said, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for said in (texts, [other_way_round(text) for text in texts])
        ]
        return model.proposition(model.encode_image(images), torch.stack(both, dim=1).to(device))

    return reward


def train_first_round(
    run: Path,
    model: Captioner,
    tokenizer: CLIPTokenizer,
    base: StableDiffusionPipeline,
    config: loop.LoopConfig = CONFIG,
    settings: TuneConfig = TuneConfig(),
    device: str = "cpu",
) -> tuple[Captioner, nn.Linear]:
    """Tune (or resume) the captioner on images of `shapes` alone; returns it and the head that is asked for regions, both averaged.

    run: holds the images (reward_images/) and one training state a round.
    """

    def sources() -> list[tuple[float, Ballots]]:
        return [(1.0, ballots(_images_of_base(run, base, config, settings), tokenizer, config.seed, settings.mixed))]

    torch.manual_seed(config.seed)
    head = nn.Linear(model.config.width, KINDS + HUES).to(device)
    settled = dataclasses.replace(config, steps=settings.first_steps)
    _train_round(run, 0, model, head, tokenizer, sources, base, settled, settings, device)
    return model.eval(), head


def train_rounds(
    run: Path,
    model: Captioner,
    head: nn.Linear,
    tokenizer: CLIPTokenizer,
    turbo: StableDiffusionPipeline,
    base: StableDiffusionPipeline,
    config: loop.LoopConfig = CONFIG,
    settings: TuneConfig = TuneConfig(),
    climb: ClimbConfig = CLIMB,
    device: str = "cpu",
) -> Captioner:
    """The later rounds, with one-step images and climbs, for what `train_first_round` left; returns the captioner with averaged weights.

    Each round starts from the averaged weights of the last. Raises ValueError where too few numbers of fresh prompts are named.
    """
    if len(settings.fresh_prompts) < settings.rounds - 1:
        raise ValueError(f"fresh_prompts must name a number for each of {settings.rounds - 1} later rounds; got {settings.fresh_prompts}")
    folder = run / "reward_images"
    plain = made.from_pipeline(turbo, 1, (0.0,))
    guided_images = _images_of_base(run, base, config, settings)
    sources = [(settings.guided, ballots(guided_images, tokenizer, config.seed, settings.mixed))]
    climbed: list[Judged] = []
    for k in range(1, settings.rounds):
        own = config.seed + 100 * k
        if count := settings.fresh_prompts[k - 1]:
            fresh = made.annotator_rows(count, own + 50)
            images = made.make_judged(folder / f"fresh{k}", fresh, GROUP, plain, own + 50, f"one-step images for round {k}")
            sources.append((1 - settings.guided, ballots(images, tokenizer, own + 50, settings.mixed)))
        maker = climber(turbo, reward_of(model.eval().requires_grad_(False), tokenizer, climb.bfloat16), climb)
        more = made.annotator_rows(settings.climbed_prompts, own)
        climbed.append(made.make_judged(folder / f"climbed{k}", more, GROUP, maker, own, f"climbs for round {k}"))
        plain_share = (1 - settings.climbs) / sum(share for share, _ in sources)
        current = [(share * plain_share, b) for share, b in sources]
        current.append((settings.climbs, ballots(made.joined(climbed), tokenizer, config.seed + 1, settings.mixed)))
        settled = dataclasses.replace(config, seed=config.seed + k)
        _train_round(run, k, model, head, tokenizer, lambda current=current: current, turbo, settled, settings, device)
    return model.eval()


def _images_of_base(run: Path, base: StableDiffusionPipeline, config: loop.LoopConfig, settings: TuneConfig) -> Judged:
    guided = made.from_pipeline(base, settings.base_steps, settings.base_guidances)
    rows = made.annotator_rows(settings.base_prompts, config.seed)
    return made.make_judged(run / "reward_images" / "base", rows, GROUP, guided, config.seed + 1, "images of shapes")


def _train_round(
    run: Path,
    k: int,
    model: Captioner,
    head: nn.Linear,
    tokenizer: CLIPTokenizer,
    sources: Callable[[], list[tuple[float, Ballots]]],
    pipeline: StableDiffusionPipeline,
    config: loop.LoopConfig,
    settings: TuneConfig,
    device: str,
) -> None:
    """One round: trained, resumed, or read where it was finished; then the averaged weights are in the model and the head.

    sources: what it learns from; not asked for where the round is finished.
    """
    model.requires_grad_(True)
    trainee = loop.Trainee({"captioner": model, "regions": head}, config, run / f"reward_round{k}.safetensors")
    if trainee.step < config.steps:
        pool = captions.draw_pool(settings.scenes, config.seed, tokenizer)
        pool.images[::2] = autoencoded(pool.images[::2], pipeline.vae, config.seed)
        loss_of = tuning_loss(model, sources(), pool, tokenizer, settings, device, shift=settings.shift, head=head)
        loop.train(trainee, loss_of, f"shapes-reward, round {k}")
    trainee.use_average()
