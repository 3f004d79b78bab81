"""`shapes-preference`: shapes-clip as a transformers CLIPModel, tuned on simulated noisy votes with PickScore's loss.

score(x, p) = exp(logit_scale) cos(x, p); the two scores of a pair go through a softmax, and the loss is the cross-entropy to the share of
votes each picture got (Kirstain et al., "Pick-a-Pic", arXiv 2305.01569, section 3).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffalign.shapes.train import card, loop
from diffalign.shapes.train.rewards_clip import normalise
from diffalign.shapes.train.rewards_convert import convert, save_half
from diffalign.shapes.train.rewards_images import Images
from diffalign.shapes.train.rewards_report import EVALUATION_SEED, RETRIEVAL_NOTE, SPLITS, retrieval
from diffalign.shapes.train.rewards_votes import FAITHFUL, LAPSE, VOTES, Votes, draw_votes

CONFIG = loop.LoopConfig(steps=700, lr=3e-4, seed=22, warmup=50, ema_decay=0.99, weight_decay=0.02, save_every=200)
PAIRS = 8_000
BATCH = 24  # pairs
EVALUATED_PAIRS = 1_000
IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"height": 64, "width": 64},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def load_clip(folder: Path) -> CLIPModel:
    """A shapes-clip folder as a transformers CLIPModel in float32."""
    layout = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    return convert(layout, {name: t.float() for name, t in load_file(folder / "model.safetensors").items()})


def scores(model: CLIPModel, images: Images, ids: Int[Tensor, "b l"]) -> Float[Tensor, " b"]:
    """exp(logit_scale) cos of each image with its own prompt; ids are cut after the longest prompt of the batch."""
    length = int((ids == model.config.text_config.eos_token_id).int().argmax(dim=1).max()) + 1
    image = model.get_image_features(pixel_values=normalise(images)).pooler_output
    text = model.get_text_features(input_ids=ids[:, :length]).pooler_output
    return model.logit_scale.exp() * F.cosine_similarity(image, text)


def preference_loss(first: Float[Tensor, " b"], second: Float[Tensor, " b"], share: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """Cross-entropy of softmax(first, second) to (share, 1 - share), where share is the part of the votes the first picture got."""
    return F.binary_cross_entropy_with_logits(first - second, share)


def _pixels(images: UInt8[Tensor, "b h w 3"], device: str) -> Images:
    return images.to(device).permute(0, 3, 1, 2).float() / 255


def vote_loss(model: CLIPModel, votes: Votes, shares: Float[Tensor, " n"], ids: Int[Tensor, "n l"], device: str) -> Callable:
    """The loss of one step, as the loop wants it."""

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(shares), (BATCH,), generator=generator)
        images = _pixels(votes.images[index].flatten(0, 1), device)
        both = scores(model, images, ids[index].repeat_interleave(2, dim=0).to(device)).view(BATCH, 2)
        share = shares[index].to(device)
        loss = preference_loss(both[:, 0], both[:, 1], share)
        right = ((both[:, 0] > both[:, 1]) == (share > 0.5))[share != 0.5].float().mean().item()
        return loss, {"loss": loss.item(), "agreement": right}

    return loss_of


def preference_scores(model: CLIPModel, tokenizer: CLIPTokenizer, device: str) -> Callable[[UInt8[Tensor, "b h w 3"], list[str]], Tensor]:
    """images, prompts -> scores, row by row."""

    @torch.no_grad()
    def score(images: UInt8[Tensor, "b h w 3"], prompts: list[str]) -> Float[Tensor, " b"]:
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        parts = zip(images.split(256), ids.split(256), strict=True)
        return torch.cat([scores(model, _pixels(some, device), tokens) for some, tokens in parts]).cpu()

    return score


def vote_figures(score: Callable, split: str, seed: int, pairs: int = EVALUATED_PAIRS) -> dict[str, object]:
    """How often the reward foretells one new vote on held-out pairs, beside the best that is possible."""
    votes = draw_votes(pairs, seed + EVALUATION_SEED, split)
    cast = votes.cast(torch.Generator().manual_seed(seed), 1)
    first = score(votes.images[:, 0], votes.prompts) > score(votes.images[:, 1], votes.prompts)
    surely = votes.probability > 0.5
    return {
        "votes foretold": card.interval(int((first == (cast > 0.5)).sum()), pairs),
        "better picture found": card.interval(int((first == surely).sum()), pairs),
        "ceiling of votes foretold": round(votes.ceiling, 4),
    }


def train_preference(
    run: Path,
    clip_folder: Path,
    folder: Path,
    config: loop.LoopConfig = CONFIG,
    pairs: int = PAIRS,
    device: str = "cpu",
    command: str = "python -m diffalign.shapes.train shapes-preference",
    per_kind: int = 200,
    evaluated_pairs: int = EVALUATED_PAIRS,
) -> Path:
    """Tune (or resume from `run`) and write `folder`: an ordinary transformers CLIPModel folder (float16) with tokenizer and card."""
    torch.manual_seed(config.seed)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    model = load_clip(clip_folder).to(device)
    trainee = loop.Trainee({"clip": model}, config, run / "preference.safetensors")
    votes = draw_votes(pairs, config.seed)
    shares = votes.cast(torch.Generator().manual_seed(config.seed), VOTES)
    ids = tokenizer(votes.prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    loop.train(trainee, vote_loss(model, votes, shares, ids, device), "shapes-preference")
    trainee.use_average()
    model.config.text_config.bos_token_id = tokenizer.bos_token_id
    save_preference(folder, model.eval(), tokenizer)
    score = preference_scores(model, tokenizer, device)
    figures: dict[str, dict] = {split: vote_figures(score, split, config.seed, evaluated_pairs) for split in SPLITS}
    for split in SPLITS:
        figures[split] |= retrieval(score, split, config.seed, per_kind)
    card.write_card(
        folder,
        title="shapes-preference",
        command=command,
        config=config,
        seconds=trainee.seconds,
        figures=figures,
        data={"pairs": pairs, "votes per pair": VOTES, "batch": f"{BATCH} pairs"},
        device=device,
        notes=[
            "shapes-clip as a transformers CLIPModel, tuned on simulated pairwise votes with PickScore's loss."
            " Score: exp(logit_scale) x cosine.",
            f"The simulated annotator values faithfulness to the prompt ({FAITHFUL} nats), then cleanliness, pure colours, size and nothing"
            f" superfluous; votes are Bradley-Terry, and {LAPSE:.0%} are cast without looking (diffalign/shapes/train/rewards_votes.py).",
            RETRIEVAL_NOTE,
        ],
    )
    return folder


def save_preference(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """The folder `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(folder)
    save_half(model.state_dict(), folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2) + "\n", encoding="utf-8")
