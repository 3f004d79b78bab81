"""GenEval's colour of an object: CLIP ViT-L/14, zero-shot over ten colours, on the object cut out along its mask.

Source: Ghosh et al. (arXiv 2310.11513). Text: for each colour the mean of three normalised template embeddings, normalised again. Image:
what is outside the mask becomes #999999, the box is cropped, the short side goes to 224 pixels (bicubic), and the centre 224 x 224 is
looked at, so the ends of a long object are lost. The class name enters the templates without regard to a / an.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from diffalign.rules import COLORS, Detection

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = (153, 153, 153)
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class ClipColors:
    """Names colours. model: transformers' CLIPModel; tokenizer: its CLIPTokenizer; version: names the weights in results.

    The text side is computed once per class name.
    """

    model: Any
    tokenizer: Any
    version: str
    batch_size: int = 16
    _texts: dict[str, Float[Tensor, "10 d"]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self.size = self.model.config.vision_config.image_size

    @torch.no_grad()
    def __call__(self, image: UInt8[np.ndarray, "h w 3"], name: str, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object of class `name`."""
        colors: list[str] = []
        for start in range(0, len(objects), self.batch_size):
            crops = [to_pixels(cut_out(image, found), self.size) for found in objects[start : start + self.batch_size]]
            pixels = torch.stack(crops).to(self.model.device, self.model.dtype)
            features = normalized(self.model.get_image_features(pixel_values=pixels).pooler_output)
            colors += [COLORS[i] for i in (features @ self.text(name).T).argmax(1).tolist()]
        return colors

    @torch.no_grad()
    def text(self, name: str) -> Float[Tensor, "10 d"]:
        """One unit vector per colour."""
        if name not in self._texts:
            prompts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").to(self.model.device)
            features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            self._texts[name] = normalized(normalized(features).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1))
        return self._texts[name]


def cut_out(image: UInt8[np.ndarray, "h w 3"], found: Detection) -> Image.Image:
    """The object's box, grey outside its mask; without a mask the whole box."""
    if found.mask is not None:
        image = np.where(np.asarray(found.mask)[..., None], image, np.uint8(BACKGROUND))
    return Image.fromarray(image).crop(tuple(round(v) for v in found.box))


def to_pixels(image: Image.Image, size: int) -> Float[Tensor, "3 s s"]:
    """CLIP's transform: short side to `size`, centre crop, normalised. A box without pixels becomes one grey one."""
    if 0 in image.size:
        image = Image.new("RGB", (1, 1), BACKGROUND)
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = torch.from_numpy(np.asarray(image.crop((left, top, left + size, top + size))).copy()).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def normalized(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return features / features.norm(dim=-1, keepdim=True)
