"""`diffalign caption`: a caption for each image of preference pairs, for DCPO."""

from __future__ import annotations

from tqdm import tqdm

from diffalign.cli.commands import CaptionPairs
from diffalign.hub import load_reward
from diffalign.loading import find_device
from diffalign.shapes.pairs import describe
from diffalign.shapes.perturb import otherwise
from diffalign.training.captioning import CAPTIONED, Captioning, caption_gap, caption_pairs
from diffalign.training.vlm import VLM

EXACT = "shapes"


def run(options: CaptionPairs, command: str) -> int:
    """Captions, and prints how many and how well they fit. Raises ValueError or OSError with the sentence to show."""
    how = captioning(options)
    with tqdm(unit="answer", disable=None) as bar:
        pairs = caption_pairs(options.data, how, progress=bar.update)
    same = sum(pair.winner_caption == pair.loser_caption for pair in pairs)
    print(f"{len(pairs)} pairs in {options.data / CAPTIONED}; {same} of them have one caption for both images")
    if options.score is not None:
        reward = load_reward(options.score, device=options.device)
        means = caption_gap(pairs, lambda images, texts: reward(images.to(find_device(options.device)), texts).total)
        print(f"{options.score}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in means.items()))
    return 0


def captioning(options: CaptionPairs) -> Captioning:
    """Who says what. Raises ValueError or OSError where the model cannot be had."""
    said_by = f"{options.captioner} {options.strength}"
    if options.captioner == EXACT:
        return Captioning(options.strategy, describe, EXACT, otherwise(options.strength), said_by, options.batch_size)
    model = VLM(options.captioner, device=find_device(options.device))
    return Captioning(options.strategy, model.caption, options.captioner, model.perturb(options.strength), said_by, options.batch_size)
