"""The models that T2I-CompBench asks, on transformers alone: BLIP-VQA, CLIP ViT-B/32 and DPT-hybrid.

BLIP-VQA: P(yes) / (P(yes) + P(no)) at the first position of the answer. Where transformers differs from the original and we follow the
original: images are 480 x 480 squashed (the hub's processor takes 384), and the question's first token is [ENC]. The hub's weights keep
positions for 384, so those are interpolated; the scorer's version says so. Questions are batched by length, so that there is no padding:
transformers 5.23 does not hide a question's padding from the answer, which changes P(yes) by about a hundredth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from diffalign.benchmarks.base import Pixels
from diffalign.benchmarks.geneval.colors import MEAN, STD, normalized
from diffalign.benchmarks.geneval.colors import to_pixels as clip_pixels
from diffalign.benchmarks.models.pretrained import load_model, load_part
from diffalign.benchmarks.t2i_compbench.detections import FRAME

BLIP_SIZE = 480
MOST_QUESTION_TOKENS = 35
DEPTH_SIZE = 480
HUB_BLIP = "Salesforce/blip-vqa-capfilt-large"
HUB_CLIP = "openai/clip-vit-base-patch32"
HUB_DEPTH = "Intel/dpt-hybrid-midas"


@dataclass
class BlipVqa:
    """Answers questions about images. model: BlipForQuestionAnswering; tokenizer: its BertTokenizer; size: pixels of the squashed image."""

    model: Any
    tokenizer: Any
    version: str
    size: int = BLIP_SIZE
    batch_size: int = 32

    def __post_init__(self) -> None:
        self.model.eval()
        text = self.model.config.text_config
        # [DEC] begins the answer and [ENC] the question; both lie behind BERT's own vocabulary.
        self.start_id, self.encode_id = text.bos_token_id, text.vocab_size - 1
        self.answer_ids = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        if self.tokenizer.unk_token_id in self.answer_ids:
            raise ValueError(f"the tokenizer of {self.version} does not know the words yes and no; is it BLIP's?")
        if self.model.config.vision_config.image_size != self.size:
            self.version += f", positions interpolated to {self.size} pixels"

    @torch.no_grad()
    def __call__(self, images: Sequence[Pixels], questions: Sequence[Sequence[str]]) -> list[list[float]]:
        """P(yes) of each question about each image. Each image is encoded once, however many questions there are."""
        device, dtype = self.model.device, self.model.dtype
        pixels = torch.stack([squashed(image, self.size) for image in images]).to(device, dtype)
        seen = self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        answers: list[list[float]] = [[0.0] * len(asked) for asked in questions]
        lengths: dict[int, list[tuple[int, int, list[int]]]] = {}
        for i, asked in enumerate(questions):
            for k, question in enumerate(asked):
                ids = self.tokenizer(question, truncation=True, max_length=MOST_QUESTION_TOKENS).input_ids
                lengths.setdefault(len(ids), []).append((i, k, [self.encode_id, *ids[1:]]))
        for pairs in lengths.values():
            for start in range(0, len(pairs), self.batch_size):
                batch = pairs[start : start + self.batch_size]
                ids = torch.tensor([ids for _, _, ids in batch], device=device)
                for (i, k, _), answer in zip(batch, self.p_yes(seen[[i for i, _, _ in batch]], ids).tolist(), strict=True):
                    answers[i][k] = answer
        return answers

    def p_yes(self, seen: Float[Tensor, "n p d"], ids: Int[Tensor, "n t"]) -> Float[Tensor, " n"]:
        """`seen`: the encoded image of each question, `ids`: its tokens, [ENC] first, all questions of one length."""
        understood = self.model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        start = torch.full((len(ids), 1), self.start_id, device=seen.device)
        logits = self.model.text_decoder(input_ids=start, encoder_hidden_states=understood).logits[:, 0]
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"the logits of {self.version} are not finite in {seen.dtype}; run it in float32")
        return logits.float()[:, self.answer_ids].softmax(1)[:, 0]  # the rest of the vocabulary cancels


def squashed(image: Pixels, size: int) -> Float[Tensor, "3 s s"]:
    """Both sides to `size`, bicubic, whatever the proportions; CLIP's normalisation."""
    pixels = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@dataclass
class ClipScore:
    """The cosine of an image and a text, plain: about 0.31 for a good match. model: CLIPModel; tokenizer: its CLIPTokenizer."""

    model: Any
    tokenizer: Any
    version: str
    _texts: dict[str, Float[Tensor, " d"]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.model.eval()

    @torch.no_grad()
    def __call__(self, images: Sequence[Pixels], texts: Sequence[str]) -> list[float]:
        size = self.model.config.vision_config.image_size
        pixels = torch.stack([clip_pixels(Image.fromarray(image), size) for image in images]).to(self.model.device, self.model.dtype)
        features = normalized(self.model.get_image_features(pixel_values=pixels).pooler_output)
        return (features * torch.stack([self.text(text) for text in texts])).sum(1).tolist()

    def text(self, text: str) -> Float[Tensor, " d"]:
        if text not in self._texts:
            tokens = self.tokenizer([text], truncation=True, return_tensors="pt").to(self.model.device)
            features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            self._texts[text] = normalized(features)[0]
        return self._texts[text]


@dataclass
class Depth:
    """How near each pixel is, in steps of 1/255 from 0 to 1 (nearest), in the frame of the rules. model: DPTForDepthEstimation."""

    model: Any
    version: str
    size: int = DEPTH_SIZE

    def __post_init__(self) -> None:
        self.model.eval()

    @torch.no_grad()
    def __call__(self, images: Sequence[Pixels]) -> list[Float[np.ndarray, "h w"]]:
        pixels = []
        for image in images:
            array = np.array(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC))
            pixels.append(torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1)
        predicted = self.model(pixel_values=torch.stack(pixels).to(self.model.device, self.model.dtype)).predicted_depth.float()
        return [to_frame_depth(each, image.shape[:2]) for each, image in zip(predicted, images, strict=True)]


def to_frame_depth(predicted: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "hf wf"]:
    """Stretched to [0, 1] within the image, enlarged to the frame of an image of `size` (height, width), and cut to 8 bits as published."""
    spread = predicted.max() - predicted.min()
    depth = (predicted - predicted.min()) / spread if spread > 0 else torch.zeros_like(predicted)
    scale = FRAME / min(size)
    frame = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
    depth = F.interpolate(depth[None, None], frame, mode="bilinear", align_corners=True)[0, 0]
    return ((depth * 255).floor() / 255).cpu().numpy()


def load_blip(source: str = HUB_BLIP, device: str = "cpu") -> BlipVqa:
    """From the hub or a folder. Raises ValueError where tensors are missing, OSError where the model cannot be had."""
    from transformers import AutoTokenizer, BlipForQuestionAnswering

    return BlipVqa(load_model(BlipForQuestionAnswering, source, device), load_part(AutoTokenizer, source), f"BLIP-VQA {source}")


def load_clip_score(source: str = HUB_CLIP, device: str = "cpu") -> ClipScore:
    """Raises as `load_blip` does."""
    from transformers import CLIPModel, CLIPTokenizer

    return ClipScore(load_model(CLIPModel, source, device), load_part(CLIPTokenizer, source), f"CLIPScore {source}")


def load_depth(source: str = HUB_DEPTH, device: str = "cpu") -> Depth:
    """Raises as `load_blip` does."""
    from transformers import DPTForDepthEstimation

    return Depth(load_model(DPTForDepthEstimation, source, device), f"depth by {source}")
