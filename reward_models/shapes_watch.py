"""`shapes-watch`: a reward for watching only, unlike any that is optimised. Score = log-odds that the prompt is true of the image.

When an optimised reward rises and this one does not, the first has been fooled. It has an architecture, a seed and votes of its own
(`shapes_film.py`, `diffalign/shapes/train/rewards_watch.py`). The folder: config.json, model.safetensors, a CLIPTokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from diffalign.files import read_json
from diffalign.reward_models.base import Images, RewardModel, Scores
from diffalign.reward_models.checkpoints import load_strict, read_tokenizer, read_weights, tokenize
from diffalign.reward_models.pixels import Preprocess
from diffalign.reward_models.shapes_film import SIZE, FilmConfig, FilmScorer
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

KEYS = tuple(field.name for field in dataclasses.fields(FilmConfig))


class ShapesWatch(RewardModel):
    """What is kept of a prompt is the state that its reader ends in."""

    full_precision = ()
    text_modules = ("net.words", "net.reader")

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        path = sources["model"].file("config.json")
        config = read_json(path, KEYS)
        sizes = {key: config[key] for key in KEYS}
        if not all(type(value) is int and value >= 0 for value in sizes.values()):
            raise ValueError(f"{path} must give whole numbers for {', '.join(KEYS)}; got {sizes}")
        self.net = FilmScorer(FilmConfig(**sizes))
        weights = sources["model"].file("model.safetensors")
        load_strict(self.net, read_weights(weights), weights)
        self.tokenizer = read_tokenizer(sources["model"])
        self.pixels = Preprocess(SIZE, (0.0,) * 3, (1.0,) * 3, geometry="squash")
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n t"]:
        return self.net.read(tokenize(self.tokenizer, prompts, self.name).to(self.net.grid.device)).float()

    def score(self, images: Images, texts: Float[Tensor, "b t"] | None) -> Scores:
        dtype = self.net.head[0].weight.dtype
        return self.net(self.net.encode_image(self.pixels(images).to(dtype)), texts.to(dtype))
