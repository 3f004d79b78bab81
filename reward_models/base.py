"""The contract of every reward: images "b 3 h w" in [0, 1] and b prompts in, float32 scores "b" out, each sample on its own.

A subclass gives `score`, and `encode_text` where the prompt matters; checks, caching and freezing are here.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.reward_models.spec import Spec
from diffalign.types import Images, Scores

logger = logging.getLogger(__name__)

TEXT_CHUNK = 256  # prompts encoded at once
RANGE_SLACK = 0.05  # how far outside [0, 1] values may lie before a warning


__all__ = ["Images", "RewardModel", "Scores", "cosine"]


class RewardModel(nn.Module):
    """A frozen reward. Gradients reach the images, never the parameters; the caller decides about no_grad.

    Facts of its `spec` are attributes: name, paper, licence, range, differentiable. A subclass says which of its submodules serve prompts
    alone (`text_modules`, dotted names) and which stay float32 whatever `cast` is told (`full_precision`, names of children).
    """

    text_modules: tuple[str, ...] = ()
    full_precision: tuple[str, ...] = ("head",)
    cached_prompts = 4096

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.name, self.paper, self.licence = spec, spec.name, spec.paper, spec.licence
        self.range, self.differentiable = spec.range, spec.differentiable
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._warned = self._text_dropped = False

    def encode_text(self, prompts: list[str]) -> Sequence[Tensor]:
        """What is kept of each prompt, one tensor each: an embedding, or token ids. Not called where the spec says needs_prompt=False."""
        raise NotImplementedError

    def collate(self, texts: list[Tensor]) -> Tensor:
        """What `score` is given, from what `encode_text` kept of each prompt; padding belongs here."""
        return torch.stack(texts)

    def score(self, images: Images, texts: Tensor | None) -> Scores:
        """Scores of checked images; `texts` as `collate` makes them, on the device of the images."""
        raise NotImplementedError

    def cast(self, dtype: torch.dtype) -> RewardModel:
        """Put the backbone into a dtype and the children named in `full_precision` into float32, whatever their files hold."""
        for name, child in self.named_children():
            with _constants_kept(child):
                child.to(torch.float32 if name in self.full_precision else dtype)
        self._forget()
        return self

    def drop_text_encoder(self) -> None:
        """Free what serves prompts alone; those prepared so far still score, another one raises ValueError.

        Raises ValueError where there is nothing to drop: no prompt, or prompt and image run through the same layers.
        """
        if not self.text_modules:
            raise ValueError(f"reward {self.name!r} has no text encoder that could be dropped")
        for path in self.text_modules:
            parent, _, leaf = path.rpartition(".")
            setattr(self.get_submodule(parent), leaf, None)
        self._text_dropped = True

    def train(self, mode: bool = True) -> RewardModel:
        """A reward stays in evaluation mode, and its parameters frozen, whatever it is part of."""
        self.requires_grad_(False)
        return super().train(False)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts and keep them, so that scoring runs on the images alone."""
        check_prompts(self.name, prompts)
        self._embed(prompts)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Scores of images "b 3 h w", float32. Raises TypeError and ValueError, naming the argument and, for a bad image, its index."""
        check_call(self, images, prompts)
        texts = self._embed(prompts)
        return self.score(images, None if texts is None else texts.to(images.device)).float()

    def _embed(self, prompts: Sequence[str]) -> Tensor | None:
        if not self.spec.needs_prompt:
            return None
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing and self._text_dropped:
            raise ValueError(f"reward {self.name!r}: its text encoder was dropped before the prompt {missing[0][:60]!r} was prepared")
        found = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
        for start in range(0, len(missing), TEXT_CHUNK):
            chunk = missing[start : start + TEXT_CHUNK]
            with torch.inference_mode(False), torch.no_grad():  # autograd later refuses tensors made in inference mode
                found |= zip(chunk, self.encode_text(chunk), strict=True)
        for prompt, text in found.items():  # all of this call are now the most recently used
            self._texts[prompt] = text
            self._texts.move_to_end(prompt)
        while len(self._texts) > self.cached_prompts:
            self._texts.popitem(last=False)
        return self.collate([found[prompt] for prompt in prompts])

    def _forget(self) -> None:
        if not self._text_dropped:  # what cannot be made again stays as it is
            self._texts.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> RewardModel:
        self._forget()  # texts encoded on another device or in another dtype
        with _constants_kept(self):
            return super()._apply(*args, **kwargs)


@contextmanager
def _constants_kept(module: nn.Module) -> Iterator[None]:
    """Buffers that no checkpoint holds keep their dtype: rotary frequencies in bfloat16 would misplace every token after the first few."""
    before = [(part, name, part._buffers[name]) for part in module.modules() for name in part._non_persistent_buffers_set]
    yield
    for part, name, constant in before:
        if constant is not None and part._buffers[name].dtype != constant.dtype:
            part._buffers[name] = constant.to(part._buffers[name].device)


def check_prompts(name: str, prompts: Sequence[str]) -> None:
    """Raises TypeError unless prompts is a sequence of strings, ValueError where it is empty."""
    if isinstance(prompts, str):
        raise TypeError(f"reward {name!r}: prompts must be a list of strings, got the string {prompts[:60]!r}; write [prompt]")
    if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"reward {name!r}: prompts must be a list of strings, got {type(prompts).__name__}: {str(prompts)[:60]}")
    if not prompts:
        raise ValueError(f"reward {name!r}: prompts is empty; give one prompt for each image")


def check_call(model: RewardModel, images: Tensor, prompts: Sequence[str]) -> None:
    """Raises TypeError or ValueError for anything but b finite float images "b 3 h w" with b prompts; warns once of values off [0, 1]."""
    name = model.name
    if isinstance(prompts, Tensor):
        raise TypeError(f"reward {name!r}: the arguments are in the wrong order; call reward(images, prompts)")
    if not isinstance(images, Tensor):
        raise TypeError(f"reward {name!r}: images must be a tensor 'b 3 h w' in [0, 1], got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"reward {name!r}: images must be floats in [0, 1], got {images.dtype}; divide 8-bit values by 255")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"reward {name!r}: images must have shape (b, 3, h, w), got {tuple(images.shape)}")
    check_prompts(name, prompts)
    if len(prompts) != len(images):
        raise ValueError(f"reward {name!r}: got {len(images)} images and {len(prompts)} prompts; give one prompt for each image")
    if not model.differentiable and images.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"reward {name!r} has no gradient; score detached images, or use a method that needs none (best-of-n)")
    values = images.detach().float().flatten(1)
    low, high = values.amin(dim=1), values.amax(dim=1)  # a NaN comes through both
    if not torch.isfinite(low + high).all():
        index = int((~torch.isfinite(low + high)).nonzero()[0])
        raise ValueError(f"reward {name!r}: images[{index}] has values that are not finite")
    if not model._warned and (low.min() < -RANGE_SLACK or high.max() > 1 + RANGE_SLACK):
        model._warned = True
        logger.warning("reward %r: images range from %.2f to %.2f; they should lie in [0, 1]", name, low.min().item(), high.max().item())


def cosine(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"]) -> Scores:
    """Cosine of matching rows, in float32 whatever came in: half precision would round scores to steps larger than their differences."""
    return nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)
