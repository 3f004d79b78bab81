"""`image-sentiment`: whether a picture evokes pleasant or unpleasant emotions, as CLIP sees it; the prompt plays no part.

    p = normalised mean of CLIP's embeddings of captions with pleasant emotions, n of those with unpleasant ones
    score = 100 (p - n) . normalised image embedding          log-odds of pleasant over unpleasant in CLIP's zero-shot classification

Sentiment is the fourth reward of Parrot (Lee et al., arXiv 2401.05675). Its model is not published: a classifier of Google's after Serra et
al., The Emotions of the Crowd (arXiv 2304.14942), whose own weights come in no layout that could be read here. This stands in for it,
with OpenAI's CLIP ViT-L/14, prompt ensembles as in Radford et al. (arXiv 2103.00020, section 3.1.4), and the eight emotions that visual
sentiment is commonly labelled with (Mikels et al., 2005). We give log-odds, not a probability, whose gradient would fade at the ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.reward_models.base import Images, RewardModel, Scores
from diffalign.reward_models.clip_files import load_clip, place_of, text_modules
from diffalign.reward_models.clip_text import open_clip_tokens
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

PLEASANT = ("amusement", "awe", "contentment", "excitement")
UNPLEASANT = ("anger", "disgust", "fear", "sadness")
CAPTIONS = ("a photo that evokes {}.", "a picture full of {}.", "an image that fills the viewer with {}.", "an expression of {}.")
SCALE = 100.0  # of the logits of OpenAI's models


class ImageSentiment(RewardModel):
    """The captions are encoded once, when it is made; all of the score is then one direction, and the text tower is dropped."""

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.clip, self.pixels = load_clip(sources["model"], quick_gelu=True)
        direction = SCALE * (self._meaning(PLEASANT) - self._meaning(UNPLEASANT))
        self.head = nn.Linear(len(direction), 1, bias=False)
        self.head.load_state_dict({"weight": direction.unsqueeze(0)})
        self.text_modules = text_modules(self.clip, "clip")
        self.drop_text_encoder()
        self.text_modules = ()
        self.train(False)

    @torch.no_grad()
    def _meaning(self, emotions: Sequence[str]) -> Float[Tensor, " d"]:
        captions = [caption.format(emotion) for emotion in emotions for caption in CAPTIONS]
        embeddings = self.clip.float().encode_text(open_clip_tokens(captions, self.name))
        return nn.functional.normalize(nn.functional.normalize(embeddings, dim=1).mean(dim=0), dim=0)

    def score(self, images: Images, texts: Tensor | None) -> Scores:
        _, dtype = place_of(self.clip)
        features = nn.functional.normalize(self.clip.encode_image(self.pixels(images).to(dtype)).float(), dim=1)
        return nn.functional.linear(features, self.head.weight.float())[:, 0]
