"""`shapes-preference`: PickScore's recipe on the shapes world. Score = exp(logit_scale) x cosine(image, prompt).

softmax of the scores of several images of one prompt is the probability that each is preferred. The folder is an ordinary
transformers CLIPModel folder (config.json, model.safetensors, preprocessor_config.json) with a CLIPTokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from diffalign.reward_models.base import Images, RewardModel, Scores, cosine
from diffalign.reward_models.checkpoints import read_tokenizer, tokenize
from diffalign.reward_models.clip_files import TRANSFORMERS_TEXT, load_transformers_clip, read_preprocess
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec


class ShapesPreference(RewardModel):
    """A CLIPModel of transformers."""

    text_modules = tuple(f"clip.{name}" for name in TRANSFORMERS_TEXT)

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.clip = load_transformers_clip(sources["model"], weights=("model.safetensors",))
        self.scale = self.clip.logit_scale.float().exp().item()  # a number, for bfloat16 would move it by a per cent
        self.pixels = read_preprocess(sources["model"].file("preprocessor_config.json"))
        self.tokenizer = read_tokenizer(sources["model"])
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n d"]:
        ids = tokenize(self.tokenizer, prompts, self.name).to(self.clip.device)
        return self.clip.get_text_features(input_ids=ids).pooler_output.float()

    def score(self, images: Images, texts: Float[Tensor, "b d"] | None) -> Scores:
        features = self.clip.get_image_features(pixel_values=self.pixels(images).to(self.clip.dtype)).pooler_output
        return self.scale * cosine(features, texts)
