"""`shapes-reward`: how likely a captioner finds the prompt, given the image. Score = log p(prompt | image) in nats, at most 0.

    s(x, c) = log (p(c | x) + p(c' | x)),    p(c | x) = prod_i p(c_i | c_<i, x)

over the words of the prompt c and, where it names two things, of c', the same said from the other ("a star right of a ring" for "a ring
left of a star"). The end of the text is left out: what is said counts, not that no more is.

The likelihood of a text as a score of alignment is that of VQAScore (Lin et al., arXiv 2404.01291) and CapPa (arXiv 2306.07915); pairs of
generated images with noisy votes tuned it, as in ImageReward (arXiv 2304.05977). Differences between images of one prompt mean something,
differences between prompts do not: a longer prompt is a less likely one. The folder: config.json, model.safetensors, a CLIPTokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from diffalign.files import read_json
from diffalign.reward_models.base import Images, RewardModel, Scores
from diffalign.reward_models.checkpoints import load_strict, read_tokenizer, read_weights, tokenize
from diffalign.reward_models.pixels import Preprocess
from diffalign.reward_models.shapes_captioner import SIZE, Captioner, CaptionerConfig, other_way_round
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

KEYS = tuple(field.name for field in dataclasses.fields(CaptionerConfig))


class ShapesReward(RewardModel):
    """Prompt and image run through the same layers, so there is no text encoder to drop; what is kept of a prompt is its token ids."""

    full_precision = ()

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        path = sources["model"].file("config.json")
        config = read_json(path, KEYS)
        self.captioner = Captioner(_sizes(path, config))
        weights = sources["model"].file("model.safetensors")
        load_strict(self.captioner, read_weights(weights), weights)
        self.tokenizer = read_tokenizer(sources["model"])
        if len(self.tokenizer) > self.captioner.config.vocabulary:
            raise ValueError(f"{path} is of {config['vocabulary']} words, but the tokenizer beside it has {len(self.tokenizer)}")
        self.pixels = Preprocess(SIZE, (0.0,) * 3, (1.0,) * 3, geometry="squash")
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Int[Tensor, "n 2 l"]:
        ids = tokenize(self.tokenizer, prompts, self.name)
        turned = ids.clone()
        two = [i for i, prompt in enumerate(prompts) if other_way_round(prompt) != prompt]
        if two:
            turned[two] = tokenize(self.tokenizer, [other_way_round(prompts[i]) for i in two], self.name)
        return torch.stack([ids, turned], dim=1)

    def score(self, images: Images, texts: Int[Tensor, "b 2 l"] | None) -> Scores:
        memory = self.captioner.encode_image(self.pixels(images).to(self.captioner.places.dtype))
        return self.captioner.proposition(memory, texts)


def _sizes(path: Path, config: Mapping[str, object]) -> CaptionerConfig:
    sizes = {key: config[key] for key in KEYS}
    if not all(type(value) is int and value >= 0 for value in sizes.values()):
        raise ValueError(f"{path} must give whole numbers for {', '.join(KEYS)}; got {sizes}")
    if sizes["width"] % max(sizes["heads"], 1) or sizes["width"] % 4:
        raise ValueError(f"{path}: width must be a multiple of heads and of 4; got {sizes['width']} and {sizes['heads']} heads")
    return CaptionerConfig(**sizes)
