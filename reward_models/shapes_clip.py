"""`shapes-clip`: CLIPScore with the open_clip model of the shapes world. Score = 100 x cosine(image, prompt), as in torchmetrics.

The folder is open_clip's own layout: open_clip_config.json ({"model_cfg", "preprocess_cfg"}), model.safetensors, a CLIPTokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip
from jaxtyping import Float
from torch import Tensor

from reward_models.base import Images, RewardModel, Scores, cosine
from reward_models.checkpoints import load_strict, read_json, read_tokenizer, read_weights, tokenize
from reward_models.pixels import Preprocess
from reward_models.sources import Source
from reward_models.spec import Spec

GEOMETRY_OF = {"squash": "squash", "shortest": "shortest+crop", "longest": "longest+pad"}  # open_clip's resize_mode -> ours


class ShapesCLIP(RewardModel):
    """Cosines are those of the network; the factor 100 is the field's, not the trained logit scale."""

    text_modules = ("clip.transformer", "clip.token_embedding", "clip.ln_final")

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.clip, self.pixels = load_open_clip(sources["model"])
        self.tokenizer = read_tokenizer(sources["model"])
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n d"]:
        ids = tokenize(self.tokenizer, prompts, self.name).to(self.clip.logit_scale.device)
        return self.clip.encode_text(ids).float()

    def score(self, images: Images, texts: Float[Tensor, "b d"] | None) -> Scores:
        return 100 * cosine(self.clip.encode_image(self.pixels(images).to(self.clip.visual.proj.dtype)), texts)


def load_open_clip(source: Source) -> tuple[open_clip.CLIP, Preprocess]:
    """The model (float32) and the preprocessing of a folder in open_clip's layout.

    Raises FileNotFoundError and ValueError, naming the file that is missing or damaged.
    """
    path = source.file("open_clip_config.json")
    config = read_json(path, ("model_cfg", "preprocess_cfg"))
    try:
        model = open_clip.CLIP(**config["model_cfg"])
        pixels = _preprocess(config["preprocess_cfg"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not describe an open_clip model ({error})") from error
    weights = source.file("model.safetensors")
    load_strict(model, read_weights(weights), weights)
    return model, pixels


def _preprocess(config: dict[str, Any]) -> Preprocess:
    if config.get("interpolation", "bicubic") != "bicubic":
        raise ValueError(f"interpolation must be bicubic, got {config['interpolation']!r}")
    geometry = GEOMETRY_OF[config.get("resize_mode", "shortest")]
    return Preprocess(config["size"], tuple(config["mean"]), tuple(config["std"]), geometry, round_crop=True)
