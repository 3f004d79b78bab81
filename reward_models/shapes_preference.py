"""`shapes-preference`: PickScore's recipe on the shapes world. Score = exp(logit_scale) x cosine(image, prompt).

softmax of the scores of several images of one prompt is the probability that each is preferred. The folder is an ordinary
transformers CLIPModel folder (config.json, model.safetensors, preprocessor_config.json) with a CLIPTokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from reward_models.base import Images, RewardModel, Scores, cosine
from reward_models.checkpoints import load_strict, read_json, read_tokenizer, read_weights, tokenize
from reward_models.pixels import Preprocess
from reward_models.sources import Source
from reward_models.spec import Spec


class ShapesPreference(RewardModel):
    """A CLIPModel of transformers, in float32."""

    text_modules = ("clip.text_model", "clip.text_projection")

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.clip = load_clip_model(sources["model"])
        self.pixels = read_preprocess(sources["model"].file("preprocessor_config.json"))
        self.tokenizer = read_tokenizer(sources["model"])
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n d"]:
        ids = tokenize(self.tokenizer, prompts, self.name).to(self.clip.device)
        return self.clip.get_text_features(input_ids=ids).pooler_output.float()

    def score(self, images: Images, texts: Float[Tensor, "b d"] | None) -> Scores:
        features = self.clip.get_image_features(pixel_values=self.pixels(images).to(self.clip.dtype)).pooler_output
        return self.clip.logit_scale.float().exp() * cosine(features, texts)


def load_clip_model(source: Source) -> CLIPModel:
    """The model of a transformers folder, strictly: from_pretrained would fill missing tensors with random ones."""
    path = source.file("config.json")
    config = read_json(path, ("text_config", "vision_config"))
    try:
        model = CLIPModel(CLIPConfig.from_dict(config))
    except Exception as error:  # transformers validates configurations with exceptions of its own
        raise ValueError(f"{path} does not describe a CLIPModel ({error})") from error
    weights = source.file("model.safetensors")
    load_strict(model, read_weights(weights), weights)
    return model


def read_preprocess(path: Path) -> Preprocess:
    """The preprocessing a transformers image processor file describes: bicubic, shortest side and centre crop, or squashed."""
    config = read_json(path, ("size", "image_mean", "image_std"))
    try:
        return _preprocess(config)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} describes a preprocessing we do not have ({error!r})") from error


def _preprocess(config: dict[str, Any]) -> Preprocess:
    if config.get("resample", 3) != 3:
        raise ValueError(f"resample must be 3 (bicubic), got {config['resample']}")
    size, mean, std = config["size"], tuple(config["image_mean"]), tuple(config["image_std"])
    if "shortest_edge" in size:
        crop = config["crop_size"]["height"]
        if crop != size["shortest_edge"]:
            raise ValueError(f"crop_size {crop} differs from shortest_edge {size['shortest_edge']}")
        return Preprocess(crop, mean, std, "shortest+crop")
    if size["height"] != size["width"]:
        raise ValueError(f"size must be square, got {size}")
    return Preprocess(size["height"], mean, std, "squash")
