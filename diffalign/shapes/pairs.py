"""Preferences in the shapes world: images of training prompts, and votes on them by a simulated annotator.

The annotator is the judge, wrong in a stated share of its votes. It sees prompts of training combinations alone, none of them a prompt of
validation or test under any carrier (`train.judged.annotator_rows`), so the judge stays one that nobody optimised. It compares two
images of one prompt where one is right and the other wrong; of two that are alike it says nothing. Beside its votes it says what each
image shows (for DCPO), in words that training may learn.

The folder holds

    images/       0012-3.png: image 3 of prompt 12
    images.jsonl  {"prompt", "image", "right", "caption"}: the prompt, the file, the verdict, what is seen (null where it may not be said)
    pairs.jsonl   {"prompt", "winner", "loser", "winner_caption", "loser_caption"}: the votes, a share `flips` of them the wrong way round
    votes.jsonl   {"prompt", "image", "good"}: a vote on each image alone, likewise

Images are drawn once, a stopped run goes on where it was, and image k of a prompt depends on (seed, prompt number, k) alone. The votes are
made anew by every call, so other flips cost nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from diffalign.backbone import Backbone, Size
from diffalign.diffusion import DDIM
from diffalign.files import appending, differing_settings, read_json, read_lines, whole_file, write_json, write_text
from diffalign.sampling import rollout
from diffalign.shapes.detector import judge_images
from diffalign.shapes.perturb import STRENGTHS, perturbed
from diffalign.shapes.scenes import Scene
from diffalign.shapes.train.judged import annotator_rows, eight_bit
from diffalign.shapes.train.rewards_captions import true_caption
from diffalign.shapes.train.rewards_described import TRIES, Seen, look, may_be_said

CAPTIONS = ("seen", "perturbed", "hybrid")
IMAGES, PAIRS, VOTES, ABOUT = "images.jsonl", "pairs.jsonl", "votes.jsonl", "about.json"


@dataclass(frozen=True)
class Drawing:
    """How the images are made."""

    prompts: int = 300
    """Different ones of training combinations, >= 1."""
    images: int = 8
    """Of each prompt, >= 2."""
    steps: int = 20
    """Of deterministic DDIM."""
    guidance_scale: float = 3.0
    """w in u + w (c - u)."""
    seed: int = 0
    """Of prompts and noise."""

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("images", 2), ("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


@dataclass(frozen=True)
class Annotator:
    """How they are voted on."""

    flips: float = 0.1
    """Share of votes that are the wrong way round, in [0, 0.5]."""
    votes: int | None = None
    """Pairs altogether, one of each prompt before a second of any; None: all there are."""
    pairs_per_prompt: int = 4
    """At most; no image is in two pairs."""
    captions: Literal["seen", "perturbed", "hybrid"] = "seen"
    """Of the two images (DCPO). seen: what each shows; perturbed: the prompt, the loser's perturbed; hybrid: seen, likewise."""
    strength: Literal["weak", "medium", "strong"] = "medium"
    """Of the perturbation (perturb.py)."""
    seed: int = 0
    """Of the pairing, the mistakes and the perturbations."""

    def __post_init__(self) -> None:
        if not 0 <= self.flips <= 0.5:
            raise ValueError(f"flips must lie in [0, 0.5], got {self.flips!r}")
        if (self.votes is not None and self.votes < 1) or self.pairs_per_prompt < 1:
            raise ValueError(f"votes and pairs_per_prompt must be at least 1, got {self.votes!r} and {self.pairs_per_prompt!r}")
        if self.captions not in CAPTIONS or self.strength not in STRENGTHS:
            raise ValueError(f"captions must be one of {', '.join(CAPTIONS)} and strength one of {', '.join(STRENGTHS)}; "
                             f"got {self.captions!r} and {self.strength!r}")  # fmt: skip


def make_pairs(
    backbone: Backbone,
    folder: Path,
    drawing: Drawing = Drawing(),
    annotator: Annotator = Annotator(),
    *,
    model: str = "",
    size: Size | None = None,
    batch_size: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Draws, votes and writes the folder above; returns what about.json holds: settings, counts and the judge's accuracy.

    model: what the backbone is called, for about.json. size: of the images; None: the model's own. progress(n) after n more images.
    Raises ValueError where the folder holds images of another model or drawing.
    """
    rows = annotator_rows(drawing.prompts, drawing.seed)
    told = {"model": model, **asdict(drawing)}
    if (folder / ABOUT).is_file():
        changed = differing_settings(read_json(folder / ABOUT, ("drawing",))["drawing"], told)
        if changed:
            raise ValueError(f"out: {folder} holds other images ({'; '.join(changed)}); choose another folder, or delete it")
    else:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        write_json(folder / ABOUT, {"drawing": told})
    records = _draw(backbone, folder, rows, drawing, size, batch_size, progress)
    pairs, votes = voted(records, annotator)
    for name, lines in ((PAIRS, pairs), (VOTES, votes)):
        write_text(folder / name, "".join(json.dumps(line) + "\n" for line in lines))
    right = [record["right"] for record in records]
    about = {"drawing": told, "annotator": asdict(annotator), "images": len(records), "right": sum(right) / len(right), "pairs": len(pairs),
             "prompts with pairs": len({pair["prompt"] for pair in pairs})}  # fmt: skip
    write_json(folder / ABOUT, about)
    return about


def _draw(
    backbone: Backbone, folder: Path, rows: list[dict], drawing: Drawing, size: Size | None, batch_size: int, progress: Any
) -> list[dict[str, Any]]:
    """The lines of images.jsonl, in order; those that are there are not drawn again."""
    wanted = [(number, k) for number in range(len(rows)) for k in range(drawing.images)]
    done = len(read_lines(folder / IMAGES))
    if progress is not None:
        progress(done)
    with appending(folder / IMAGES) as append:
        for start in range(done, len(wanted), batch_size):
            part = wanted[start : start + batch_size]
            images = draw_images(backbone, [rows[number]["prompt"] for number, _ in part], [noise_of(drawing.seed, *who) for who in part],
                                 drawing.steps, drawing.guidance_scale, size)  # fmt: skip
            verdicts = judge_images(images, [rows[number] for number, _ in part])
            lines = []
            for (number, k), image, verdict in zip(part, images, verdicts, strict=True):
                name = f"images/{number:04d}-{k}.png"
                with whole_file(folder / name) as temporary:
                    Image.fromarray(image).save(temporary, format="PNG")
                caption = _seen(image, np.random.default_rng([drawing.seed, 29, number, k]))
                lines.append({"prompt": rows[number]["prompt"], "image": name, "right": bool(verdict.correct), "caption": caption})
            append(lines)
            if progress is not None:
                progress(len(part))
    return read_lines(folder / IMAGES)


@torch.no_grad()
def draw_images(
    backbone: Backbone, prompts: list[str], noise: Sequence[torch.Generator], steps: int, guidance_scale: float, size: Size | None = None
) -> np.ndarray:
    """One image of each prompt as "b h w 3" uint8, by deterministic DDIM."""
    conditioning = backbone.encode(prompts, unconditional=True, size=size)
    out = rollout(backbone, backbone.draw_noise(noise, size), conditioning, backbone.schedule(steps, size=size), DDIM(),
                  guidance_scale=guidance_scale)  # fmt: skip
    return eight_bit(backbone.decode(out.latents, size).float().cpu()).numpy()


def noise_of(seed: int, number: int, k: int) -> torch.Generator:
    """Where the noise of image k of prompt `number` comes from."""
    hashed = np.random.SeedSequence([seed, 31, number, k]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(hashed >> np.uint64(1)))


def _seen(image: np.ndarray, rng: np.random.Generator) -> str | None:
    """A short caption that is true of the image by the detector; None where it sees nothing, or nothing that training may learn."""
    things, _ = look(image, rng, flipped=0.0)
    return exact_caption(things, rng)


def exact_caption(things: Sequence[Seen], rng: np.random.Generator) -> str | None:
    """A short caption of things as the detector sees them, out of a few that are tried; None where none may be said."""
    for _ in range(TRIES if things else 0):
        caption = true_caption(rng, Scene(tuple(things)))
        if may_be_said(caption):
            return caption
    return None


def describe(images: Sequence[Path], prompts: Sequence[str]) -> list[str]:
    """A short caption of each image file, always the same; its prompt where nothing is seen, or nothing that training may learn."""
    pixels = [np.asarray(Image.open(image).convert("RGB")) for image in images]
    seeds = [np.frombuffer(hashlib.sha256(each.tobytes()).digest(), np.uint32) for each in pixels]
    return [_seen(each, np.random.default_rng(seed)) or prompt for each, seed, prompt in zip(pixels, seeds, prompts, strict=True)]


def voted(records: Sequence[dict[str, Any]], annotator: Annotator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of pairs.jsonl, lines of votes.jsonl) for lines of images.jsonl."""
    rng, rng_of_captions = (np.random.default_rng([annotator.seed, purpose]) for purpose in (37, 41))
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["image"].rpartition("-")[0], []).append(record)
    rounds: list[list[dict[str, Any]]] = [[] for _ in range(annotator.pairs_per_prompt)]
    for group in groups.values():
        right, wrong = ([group[i] for i in rng.permutation(len(group)) if group[i]["right"] == side] for side in (True, False))
        for turn, better, worse in zip(rounds, right, wrong, strict=False):
            winner, loser = (worse, better) if rng.random() < annotator.flips else (better, worse)
            captions = two_captions(group[0]["prompt"], winner["caption"], loser["caption"], annotator, rng_of_captions)
            turn.append({"prompt": group[0]["prompt"], "winner": winner["image"], "loser": loser["image"], **captions})
    mistaken = rng.random(len(records)) < annotator.flips
    votes = [{"prompt": record["prompt"], "image": record["image"], "good": record["right"] != bool(wrong)}
             for record, wrong in zip(records, mistaken, strict=True)]  # fmt: skip
    return [pair for turn in rounds for pair in turn][: annotator.votes], votes


def two_captions(prompt: str, winner: str | None, loser: str | None, annotator: Annotator, rng: np.random.Generator) -> dict[str, str]:
    """winner_caption and loser_caption of a pair, from what is seen in its images; without those that there are not."""
    if annotator.captions == "perturbed":
        winner, loser = prompt, prompt
    if annotator.captions != "seen" and loser is not None:
        loser = perturbed(loser, annotator.strength, rng)
    captions = {"winner_caption": winner, "loser_caption": loser}
    return {name: caption for name, caption in captions.items() if caption is not None}
