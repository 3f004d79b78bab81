"""PickScore v1: which of two pictures people would pick. Score = exp(logit scale) x cosine(image, prompt), about 100 x cosine.

Paper: Kirstain et al., Pick-a-Pic (arXiv 2305.01569). A CLIP ViT-H/14 of transformers, tuned on half a million choices; softmax of the
scores of several pictures of one prompt is the probability that each is picked. Tokens and preprocessing are those of the processor it was
trained with, LAION's for H/14: transformers' tokenizer, shortest side 224 and centre crop.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from diffalign.reward_models.base import Images, RewardModel, Scores, cosine
from diffalign.reward_models.clip_files import TRANSFORMERS_TEXT, check_vocabulary, load_transformers_clip
from diffalign.reward_models.clip_text import transformers_tokens
from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec


class PickScore(RewardModel):
    """The weights are a transformers folder (config.json, model.safetensors); nothing else of it is read."""

    text_modules = tuple(f"clip.{name}" for name in TRANSFORMERS_TEXT)

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.clip = load_transformers_clip(sources["model"])
        text, vision = self.clip.config.text_config, self.clip.config.vision_config
        check_vocabulary(text.vocab_size, text.max_position_embeddings, sources["model"].file("config.json"))
        self.scale = self.clip.logit_scale.float().exp().item()  # a number, for bfloat16 would move it by a per cent
        self.pixels = Preprocess(vision.image_size, OPENAI_MEAN, OPENAI_STD)
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n d"]:
        ids = transformers_tokens(prompts, self.name).to(self.clip.device)
        return self.clip.get_text_features(input_ids=ids).pooler_output.float()

    def score(self, images: Images, texts: Float[Tensor, "b d"] | None) -> Scores:
        features = self.clip.get_image_features(pixel_values=self.pixels(images).to(self.clip.dtype)).pooler_output
        return self.scale * cosine(features, texts)
