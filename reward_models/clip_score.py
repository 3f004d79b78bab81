"""CLIPScore: how well a picture fits its prompt, as CLIP sees it. Score = 100 x cosine(image, prompt).

Paper: Hessel et al. (arXiv 2104.08718). Their own CLIP-S is 2.5 x max(cosine, 0) of ViT-B/32, with "A photo depicts" before the caption;
for text-to-image models 100 x cosine has become usual (torchmetrics), and is what this gives. Models: Radford et al. (arXiv 2103.00020)
and Cherti et al. (arXiv 2212.07143).
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from diffalign.reward_models.base import Images, RewardModel, Scores, cosine
from diffalign.reward_models.clip_files import load_clip, place_of, text_modules
from diffalign.reward_models.clip_text import open_clip_tokens
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec


class CLIPScore(RewardModel):
    """Reads open_clip's layout or transformers'; prompts are cleaned as open_clip does it, whichever it is.

    Option quick_gelu: 1 where the model was trained with the approximate activation (OpenAI's) and an open_clip file may not say so.
    """

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.clip, self.pixels = load_clip(sources["model"], quick_gelu=bool(spec.options.get("quick_gelu", 0)))
        self.text_modules = text_modules(self.clip, "clip")
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n d"]:
        device, _ = place_of(self.clip)
        return self.clip.encode_text(open_clip_tokens(prompts, self.name).to(device)).float()

    def score(self, images: Images, texts: Float[Tensor, "b d"] | None) -> Scores:
        _, dtype = place_of(self.clip)
        return 100 * cosine(self.clip.encode_image(self.pixels(images).to(dtype)), texts)
