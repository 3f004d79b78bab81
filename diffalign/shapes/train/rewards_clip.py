"""`shapes-clip`: a small open_clip CLIP, trained from nothing on drawn scenes, with hard negatives on both sides.

A batch holds scenes and their twins (scenes that differ in one respect). Each image is contrasted with every caption of the batch and with
wrong captions of every image; each caption with every image and with ruined ones. Pairs that happen to be true are masked exactly.
Small data leaves a transformer little to find shapes with, so two linear heads, dropped afterwards, also ask: what covers each patch
(from the patch tokens), and which facts hold of the scene (from the image embedding).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from diffalign.shapes.captions import draw_scene, long_caption, short_caption
from diffalign.shapes.scenes import COLORS, SHAPES, SIZE, render
from diffalign.shapes.train import card, loop
from diffalign.shapes.train import rewards_scenes as worlds
from diffalign.shapes.train.rewards_convert import save_half
from diffalign.shapes.train.rewards_images import autoencoded, disturb, ruin
from diffalign.shapes.train.rewards_report import RETRIEVAL_NOTE, SPLITS, retrieval

CONFIG = loop.LoopConfig(steps=2000, lr=1.2e-3, seed=21, warmup=100, ema_decay=0.995, weight_decay=0.02, save_every=200)
SCENES = 12_000  # as many twins are drawn beside them
BATCH = 48  # images: half scenes, half their twins
RUINED = 6  # further images that no caption fits
TRUE_CAPTIONS, WRONG_CAPTIONS = 3, 3  # drawn for each image
WRONG_COLUMNS = 2  # wrong captions of each image in one step
LONG_STEPS = 0.15  # share of steps in which scenes of at most two things show their long caption
LARGEST_SCALE = 50.0
PATCH = 8
WIDTH = 128


def model_config(tokenizer: CLIPTokenizer) -> dict:
    """The open_clip configuration: ViT 4 layers, text 3 layers, both of width 128, embedding 128; about 1 M weights."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": 4, "head_width": 32, "mlp_ratio": 2.0},
        "text_cfg": {
            "context_length": tokenizer.model_max_length,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "./",  # open_clip then reads the tokenizer from the model's own folder
            "width": WIDTH,
            "heads": 4,
            "layers": 3,
            "mlp_ratio": 2.0,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }


PREPROCESS = {"size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def build_clip(config: dict) -> open_clip.CLIP:
    """A CLIP whose image tower starts out looking near: sine-cosine positions, and keys equal to queries, so that like attends to like."""
    model = open_clip.CLIP(**config)
    side = SIZE // config["vision_cfg"]["patch_size"]
    width = config["vision_cfg"]["width"]
    with torch.no_grad():
        model.visual.positional_embedding[1:].copy_(0.4 * _positions(side, width))
        for block in model.visual.transformer.resblocks:
            block.attn.in_proj_weight[width : 2 * width].copy_(block.attn.in_proj_weight[:width])
    return model


def _positions(side: int, width: int) -> Float[Tensor, "p width"]:
    """Sines and cosines of row and column, wavelengths from 2 pi / 1 to 2 pi / 0.05 patches."""
    frequency = torch.logspace(0, np.log10(0.05), width // 4)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (row, column)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


@dataclass
class Pool:
    """Scenes 0..n-1 and their twins n..2n-1; token ids and claims of their captions (the last true one is long where it fits)."""

    images: UInt8[Tensor, "m h w 3"]
    tables: worlds.Tables
    true_ids: Int[Tensor, "m k l"]
    true_claims: Int[Tensor, "m k 6"]
    wrong_ids: Int[Tensor, "m w l"]
    wrong_claims: Int[Tensor, "m w 6"]


def draw_pool(count: int, seed: int, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL | None = None) -> Pool:
    """`count` training scenes and a twin of each; every other picture passed through the autoencoder. The same seed gives the same pool."""
    rng = np.random.default_rng([seed, 0])
    scenes, twins = [], []
    for _ in tqdm(range(count), desc="drawing scenes and twins", mininterval=5):
        pair = None
        while pair is None:
            scene = draw_scene(rng)
            pair = worlds.twin(rng, scene)
        scenes.append(scene)
        twins.append(pair[0])
    scenes += twins
    true, wrong = [], []
    for scene in tqdm(scenes, desc="captions", mininterval=5):
        captions = [short_caption(rng, scene) for _ in range(TRUE_CAPTIONS)]
        true.append([*captions, long_caption(rng, scene) if len(scene.things) <= 2 else captions[0]])
        wrong.append(worlds.wrong_captions(rng, scene, WRONG_CAPTIONS))
    images = torch.from_numpy(np.stack([render(scene) for scene in tqdm(scenes, desc="drawing", mininterval=5)]))
    if autoencoder is not None:
        images[::2] = autoencoded(images[::2], autoencoder, seed)
    return Pool(images, worlds.tabulate(scenes), _ids(tokenizer, true), _claims(true), _ids(tokenizer, wrong), _claims(wrong))


def _ids(tokenizer: CLIPTokenizer, captions: list[list[str]]) -> Int[Tensor, "m k l"]:
    flat = [caption for group in captions for caption in group]
    ids = tokenizer(flat, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.view(len(captions), -1, ids.shape[-1])


def _claims(captions: list[list[str]]) -> Int[Tensor, "m k 6"]:
    def encoded(caption: str) -> list[int]:
        return worlds.UNKNOWN if " at the " in caption else worlds.read_claim(caption).encode()

    return torch.tensor([[encoded(caption) for caption in group] for group in captions])


def normalise(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    return (images - 0.5) / 0.5


def encode_text(model: open_clip.CLIP, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
    """`model.encode_text`, cut to the longest caption of the batch: the mask is causal, so what follows the end token changes nothing."""
    end = (ids == model.text_eos_id).int().argmax(dim=1)
    length = int(end.max()) + 1
    x = model.token_embedding(ids[:, :length]) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x), device=x.device), end] @ model.text_projection


def contrastive_loss(
    images: Float[Tensor, "r d"], texts: Float[Tensor, "c d"], scale: Tensor, truth: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, "b b"]]:
    """InfoNCE in both directions; also the logits of images against their own captions.

    The first b = len(truth) images and texts belong together; later images and texts are negatives only. truth "b c" says which texts
    hold of which of those images: all but an image's own are left out of its softmax, since they are no negatives.
    """
    b = len(truth)
    own = torch.eye(b, len(texts), dtype=torch.bool, device=texts.device)
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    by_image = logits[:b].masked_fill(truth & ~own, -torch.inf)
    by_text = torch.cat([by_image[:, :b], logits[b:, :b]]).T
    target = torch.arange(b, device=texts.device)
    return 0.5 * (F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)), logits[:b, :b]


class Heads(nn.Module):
    """The two auxiliary questions of training."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.patch = nn.Linear(width, len(SHAPES) + 1 + len(COLORS) + 1)
        self.facts = nn.Linear(width, worlds.FACTS)

    def loss(self, embeddings: Float[Tensor, "b d"], tokens: Float[Tensor, "b p d"], tables: worlds.Tables) -> Float[Tensor, ""]:
        device = tokens.device
        shape, color = self.patch(tokens).split([len(SHAPES) + 1, len(COLORS) + 1], dim=-1)
        shape_label, color_label = (label.to(device) for label in patch_labels(tables))
        patch = F.cross_entropy(shape.transpose(1, 2), shape_label) + F.cross_entropy(color.transpose(1, 2), color_label)
        taught = worlds.taught_facts().to(device)
        asked = self.facts(embeddings)[:, taught]
        facts = F.binary_cross_entropy_with_logits(asked, tables.facts.to(device)[:, taught].float(), reduction="none")
        return patch + facts.sum(dim=1).mean() / 8  # a scene has two to eight facts among a hundred; a mean would drown them


def patch_labels(tables: worlds.Tables) -> tuple[Int[Tensor, "b p"], Int[Tensor, "b p"]]:
    """Shape and colour of the thing whose circle holds each patch's centre; the last index is the ground."""
    side = SIZE // PATCH
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centres = torch.stack([column.flatten(), row.flatten()], dim=1) * PATCH + PATCH / 2
    distance = torch.cdist(centres.expand(len(tables.places), -1, -1), tables.places[..., :2]) - tables.places[..., 2].unsqueeze(1)
    inside, nearest = distance.min(dim=2)
    ground = inside > 0
    return (
        tables.shapes.gather(1, nearest).masked_fill(ground, len(SHAPES)),
        tables.colors.gather(1, nearest).masked_fill(ground, len(COLORS)),
    )


def clip_loss(model: open_clip.CLIP, heads: Heads, pool: Pool, device: str) -> Callable:
    """The loss of one step, as the loop wants it."""
    pairs = len(pool.images) // 2

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(pairs, (BATCH // 2,), generator=generator)
        rows = torch.cat([index, index + pairs])
        long = torch.rand((), generator=generator) < LONG_STEPS
        choice = torch.full((BATCH,), TRUE_CAPTIONS) if long else torch.randint(TRUE_CAPTIONS, (BATCH,), generator=generator)
        columns = torch.rand(BATCH, WRONG_CAPTIONS, generator=generator).argsort(dim=1)[:, :WRONG_COLUMNS]
        ids = torch.cat([pool.true_ids[rows, choice], pool.wrong_ids[rows[:, None], columns].flatten(0, 1)])
        claims = torch.cat([pool.true_claims[rows, choice], pool.wrong_claims[rows[:, None], columns].flatten(0, 1)])
        tables = pool.tables.rows(rows)
        truth = worlds.holds(tables, claims).to(device)
        clean = pool.images[rows].to(device).permute(0, 3, 1, 2).float() / 255
        ruined = ruin(clean[torch.randperm(BATCH, generator=generator)[:RUINED].to(device)], generator)
        images = disturb(torch.cat([clean, ruined]), generator)
        embeddings, tokens = model.visual(normalise(images))
        scale = model.logit_scale.exp().clamp(max=LARGEST_SCALE)
        contrast, logits = contrastive_loss(embeddings, encode_text(model, ids.to(device)), scale, truth)
        extra = heads.loss(embeddings[:BATCH], tokens[:BATCH], tables)
        hits = (logits.argmax(dim=1) == torch.arange(BATCH, device=device)).float().mean().item()
        return contrast + extra, {"contrast": contrast.item(), "heads": extra.item(), "top1": hits}

    return loss_of


def train_clip(
    run: Path,
    tokenizer: CLIPTokenizer,
    folder: Path,
    config: loop.LoopConfig = CONFIG,
    scenes: int = SCENES,
    autoencoder: AutoencoderKL | None = None,
    device: str = "cpu",
    command: str = "python -m diffalign.shapes.train shapes-clip",
    per_kind: int = 200,
) -> Path:
    """Train (or resume from `run`) and write `folder`: open_clip_config.json, model.safetensors (float16), tokenizer, card. Returns it.

    autoencoder: the generators' own; with it the reward learns on their kind of pictures too, which is where it will be used.
    """
    torch.manual_seed(config.seed)
    layout = model_config(tokenizer)
    model, heads = build_clip(layout).to(device), Heads().to(device)
    trainee = loop.Trainee({"clip": model, "heads": heads}, config, run / "clip.safetensors")
    pool = draw_pool(scenes, config.seed, tokenizer, autoencoder)
    model.visual.output_tokens = True
    loop.train(trainee, clip_loss(model, heads, pool, device), "shapes-clip")
    model.visual.output_tokens = False
    trainee.use_average()
    save_clip(folder, model.eval(), layout, tokenizer)
    score = clip_scores(model, tokenizer, device)
    figures = {split: retrieval(score, split, config.seed, per_kind) for split in SPLITS}
    card.write_card(
        folder,
        title="shapes-clip",
        command=command,
        config=config,
        seconds=trainee.seconds,
        figures=figures,
        data={
            "scenes": scenes,
            "twins": scenes,
            "through the autoencoder": "every other picture" if autoencoder else "none",
            "batch": f"{BATCH} images, {BATCH * (1 + WRONG_COLUMNS)} captions",
        },
        device=device,
        notes=[
            "An open_clip CLIP (ViT, 64 px, patch 8) trained from nothing on scenes of the shapes world. Score: 100 x cosine.",
            RETRIEVAL_NOTE,
        ],
    )
    return folder


def clip_scores(model: open_clip.CLIP, tokenizer: CLIPTokenizer, device: str) -> Callable[[UInt8[Tensor, "b h w 3"], list[str]], Tensor]:
    """images, captions -> cosines, row by row."""

    @torch.no_grad()
    def score(images: UInt8[Tensor, "b h w 3"], captions: list[str]) -> Float[Tensor, " b"]:
        pixels = images.to(device).permute(0, 3, 1, 2).float() / 255
        ids = _ids(tokenizer, [captions])[0].to(device)
        return F.cosine_similarity(model.encode_image(normalise(pixels)), encode_text(model, ids)).cpu()

    return score


def save_clip(folder: Path, model: open_clip.CLIP, layout: dict, tokenizer: CLIPTokenizer) -> None:
    """The folder open_clip loads with `create_model("local-dir:FOLDER")`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    save_half(model.state_dict(), folder / "model.safetensors")
    text = json.dumps({"model_cfg": layout, "preprocess_cfg": PREPROCESS}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
