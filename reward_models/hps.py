"""Human Preference Score v2 and v2.1. Score = cosine(image, prompt), as the published code returns it; the paper prints 100 times that.

Paper: Wu et al., Human Preference Score v2 (arXiv 2306.09341). An open_clip ViT-H/14 tuned on ranked pictures; no logit scale, no head.
Preprocessing as there: the longer side becomes 224 and the rest is padded with black *before* normalisation. The published code resizes
float tensors, over both axes at once and uncut, without antialiasing before torchvision 0.17 and with it since; here always with.
"""

from __future__ import annotations

from collections.abc import Mapping

import open_clip
from jaxtyping import Float
from torch import Tensor

from diffalign.reward_models.base import Images, RewardModel, Scores, cosine
from diffalign.reward_models.checkpoints import load_strict, read_weights, without_weights
from diffalign.reward_models.clip_files import OPEN_CLIP_TEXT, place_of
from diffalign.reward_models.clip_text import open_clip_tokens
from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec


class HPS(RewardModel):
    """The file is a training checkpoint, {"state_dict": ...} in float16 under open_clip's names, and brings no configuration.

    Options: file, its name in a folder or repository; architecture, open_clip's name for what it holds.
    """

    text_modules = tuple(f"clip.{name}" for name in OPEN_CLIP_TEXT)

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        config = open_clip.get_model_config(str(spec.options["architecture"]))
        self.clip = without_weights(lambda: open_clip.CLIP(**config))
        path = sources["model"].file(str(spec.options["file"]))
        load_strict(self.clip, read_weights(path, None), path)
        self.pixels = Preprocess(config["vision_cfg"]["image_size"], OPENAI_MEAN, OPENAI_STD, "longest+pad", bytes_between=False)
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n d"]:
        device, _ = place_of(self.clip)
        return self.clip.encode_text(open_clip_tokens(prompts, self.name).to(device)).float()

    def score(self, images: Images, texts: Float[Tensor, "b d"] | None) -> Scores:
        _, dtype = place_of(self.clip)
        return cosine(self.clip.encode_image(self.pixels(images).to(dtype)), texts)
