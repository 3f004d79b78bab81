"""Captions and paraphrases by a vision-language model of transformers that has a chat template: LLaVA, Qwen-VL, InternVL, SmolVLM ...

    talk = VLM("Qwen/Qwen2.5-VL-3B-Instruct", device="cuda")
    Captioning("hybrid", caption=talk.caption, captioner=talk.name, perturb=talk.perturb("medium"), perturber=f"{talk.name} medium")

Decoding is greedy, so that an image has one caption. One image or text a call: models differ in whether and how they pad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

QUESTION = "Describe this image in one sentence of at most 40 words, as a prompt for an image generator. Answer with the sentence alone."
SAY_AGAIN = "Rewrite this prompt for an image generator{how}. Keep one sentence. Answer with the sentence alone.\n\n{text}"
STRENGTHS = {
    "weak": " with a few other words and the same meaning",
    "medium": " in mostly other words; details may change",
    "strong": " in entirely other words; change some of what it shows",
}


class VLM:
    """A model and its processor."""

    def __init__(self, source: str | Path, *, device: Any = "cpu", dtype: Any = "auto", words: int = 64) -> None:
        """source: a Hub id or a folder. dtype: as transformers takes it. words: new tokens, at most, of an answer.

        Raises ValueError where the model has no chat template, OSError where it cannot be loaded.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.name = str(source)
        self.processor = AutoProcessor.from_pretrained(source)
        self.template = self.processor.chat_template or self.processor.tokenizer.chat_template  # older folders have the latter alone
        if not self.template:
            raise ValueError(f"{source} has no chat template, and questions are asked in chats; choose an instruct model")
        self.model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).to(device).eval()
        self.words = words

    def caption(self, images: Sequence[Path], prompts: Sequence[str]) -> list[str]:
        """What each image shows. The prompts are not shown to the model: it would repeat them."""
        return [self._answer(QUESTION, Image.open(image).convert("RGB")) for image in images]

    def perturb(self, strength: str) -> Callable[[Sequence[str]], list[str]]:
        """A function that says texts otherwise. ValueError for an unknown strength."""
        if strength not in STRENGTHS:
            raise ValueError(f"strength must be one of {', '.join(STRENGTHS)}, got {strength!r}")
        return lambda texts: [self._answer(SAY_AGAIN.format(how=STRENGTHS[strength], text=text), None) for text in texts]

    @torch.no_grad()
    def _answer(self, question: str, image: Image.Image | None) -> str:
        content = [*([] if image is None else [{"type": "image", "image": image}]), {"type": "text", "text": question}]
        chat = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        inputs = self.processor(text=[chat], images=None if image is None else [image], return_tensors="pt").to(self.model.device)
        inputs = inputs.to(self.model.dtype)  # pixel values alone are floats
        made = self.model.generate(**inputs, max_new_tokens=self.words, do_sample=False)
        answer = self.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        return " ".join(answer.split())
