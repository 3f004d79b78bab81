"""`shapes-clip`: CLIPScore with the open_clip model of the shapes world. Score = 100 x cosine(image, prompt), as in torchmetrics.

The folder is open_clip's own layout: open_clip_config.json ({"model_cfg", "preprocess_cfg"}), model.safetensors, a CLIPTokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from diffalign.reward_models.base import Images, RewardModel, Scores, cosine
from diffalign.reward_models.checkpoints import read_tokenizer, tokenize
from diffalign.reward_models.clip_files import OPEN_CLIP_TEXT, load_open_clip
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec


class ShapesCLIP(RewardModel):
    """Cosines are those of the network; the factor 100 is the field's, not the trained logit scale."""

    text_modules = tuple(f"clip.{name}" for name in OPEN_CLIP_TEXT)

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.clip, self.pixels = load_open_clip(sources["model"], weights=("model.safetensors",))
        self.tokenizer = read_tokenizer(sources["model"])
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n d"]:
        ids = tokenize(self.tokenizer, prompts, self.name).to(self.clip.logit_scale.device)
        return self.clip.encode_text(ids).float()

    def score(self, images: Images, texts: Float[Tensor, "b d"] | None) -> Scores:
        return 100 * cosine(self.clip.encode_image(self.pixels(images).to(self.clip.visual.proj.dtype)), texts)
