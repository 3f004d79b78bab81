"""`shapes-aesthetic`: a small head on the patch features of shapes-clip that scores composition from 0 to 10, whatever the prompt.

The folder holds the head alone (head.safetensors, config.json); the features come from the shapes-clip folder beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import open_clip
from torch import Tensor, nn

from diffalign.files import read_json
from diffalign.reward_models.base import Images, RewardModel, Scores
from diffalign.reward_models.checkpoints import load_strict, read_weights
from diffalign.reward_models.clip_files import load_open_clip
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

KEYS = ("features", "width", "patches", "channels", "hidden")


class ShapesAesthetic(RewardModel):
    """What is "well composed" is stated in diffalign/shapes/train/rewards_aesthetic.py and in the weights' card."""

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        path = sources["model"].file("config.json")
        config = read_json(path, KEYS)
        features = Source(spec.name, "features", path.parents[1] / str(config["features"]))
        clip, self.pixels = load_open_clip(features, weights=("model.safetensors",), text=False)
        self.tower: open_clip.transformer.VisionTransformer = clip.visual
        self.tower.output_tokens = True  # its call then gives (embedding, patch features)
        width, patches, channels, hidden = (config[key] for key in KEYS[1:])
        grid = self.tower.positional_embedding.shape
        if (patches, width) != (grid[0] - 1, grid[1]):
            raise ValueError(f"{path} asks for {patches} patches of width {width}, but the features are {grid[0] - 1} of {grid[1]}")
        self.head = nn.Sequential(
            nn.Linear(width, channels), nn.GELU(), nn.Flatten(), nn.Linear(channels * patches, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )
        weights = sources["model"].file("head.safetensors")
        load_strict(self.head, read_weights(weights), weights)
        self.train(False)

    def score(self, images: Images, texts: Tensor | None) -> Scores:
        _, patches = self.tower(self.pixels(images).to(self.tower.conv1.weight.dtype))
        return self.head(patches.to(self.head[0].weight.dtype)).squeeze(1)
