"""How pleasing a picture is, whatever the prompt: LAION's aesthetic predictor v2, and v2.5 on SigLIP. Score = w . feature + b.

Both heads are five linear layers with nothing but dropout between them, so each is one affine map of the normalised image feature; the
layers are multiplied out once, in float64. The score is one direction in feature space, and easy to climb far beyond any real picture.

laion-aesthetic-v2   Schuhmann et al., LAION-5B (arXiv 2210.08402), github.com/christophschuhmann/improved-aesthetic-predictor:
                     OpenAI's CLIP ViT-L/14
aesthetic-v2.5       github.com/discus0434/aesthetic-predictor-v2-5, code and weights under AGPL-3.0: SigLIP so400m/14, pictures squashed to
                     384 x 384. The weights are downloaded when asked for, and no part of this package.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from diffalign.files import read_json
from diffalign.reward_models.base import Images, RewardModel, Scores
from diffalign.reward_models.checkpoints import collapse, load_strict, read_weights, weights_file
from diffalign.reward_models.clip_files import TRANSFORMERS_WEIGHTS, built, load_clip, place_of, width_of
from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

WIDTHS = (1024, 128, 64, 16, 1)
LAION_LAYERS = (0, 2, 4, 6, 7)  # places of the linear layers in their nn.Sequential; dropout lies between
SIGLIP_LAYERS = (0, 2, 4, 6, 8)


class LaionAesthetic(RewardModel):
    """Parts: encoder, CLIP in either layout, whose text tower is never read; head, the .pth file.

    Preprocessing as OpenAI's: shortest side and centre crop, an odd margin rounded as torchvision does.
    """

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.clip, pixels = load_clip(sources["encoder"], text=False, quick_gelu=True)
        self.pixels = Preprocess(pixels.size, OPENAI_MEAN, OPENAI_STD, round_crop=True)
        self.head = read_head(sources["head"], "sac+logos+ava1-l14-linearMSE.pth", "layers", LAION_LAYERS, width_of(self.clip))
        self.train(False)

    def score(self, images: Images, texts: Tensor | None) -> Scores:
        _, dtype = place_of(self.clip)
        return affine(self.head, self.clip.encode_image(self.pixels(images).to(dtype)))


class SiglipAesthetic(RewardModel):
    """Parts: encoder, a transformers folder of SigLIP, whose text tower is never read; head, the .pth file, in bfloat16."""

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        path = sources["encoder"].file("config.json")
        config = read_json(path, ("vision_config",))["vision_config"]
        self.tower = built(SiglipVisionModel, lambda: SiglipVisionConfig(**config), path)
        weights = weights_file(sources["encoder"], *TRANSFORMERS_WEIGHTS)
        tensors = read_weights(weights, None, skip=("text_model.", "logit_"))
        load_strict(nn.ModuleDict({"vision_model": self.tower}), tensors, weights, unused=("vision_model.embeddings.position_ids",))
        self.pixels = Preprocess(self.tower.config.image_size, (0.5,) * 3, (0.5,) * 3, "squash")
        self.head = read_head(sources["head"], "aesthetic_predictor_v2_5.pth", "scoring_head", SIGLIP_LAYERS, self.tower.config.hidden_size)
        self.train(False)

    def score(self, images: Images, texts: Tensor | None) -> Scores:
        features = self.tower(pixel_values=self.pixels(images).to(self.tower.dtype)).pooler_output
        return affine(self.head, features)


def affine(head: nn.Linear, features: Float[Tensor, "b d"]) -> Scores:
    return head(F.normalize(features.float(), dim=-1).to(head.weight.dtype)).squeeze(1)


def read_head(source: Source, file: str, prefix: str, places: tuple[int, ...], width: int) -> nn.Linear:
    """The published layers, multiplied out. Raises ValueError naming the layers that are missing or do not fit features of this width."""
    sizes = (width, *WIDTHS)
    layers = [nn.Dropout() for _ in range(places[-1] + 1)]
    for place, (inside, outside) in zip(places, itertools.pairwise(sizes), strict=True):
        layers[place] = nn.Linear(inside, outside)
    path = source.file(file)
    load_strict(nn.ModuleDict({prefix: (published := nn.Sequential(*layers))}), read_weights(path), path)
    return collapse([layer for layer in published if isinstance(layer, nn.Linear)])
