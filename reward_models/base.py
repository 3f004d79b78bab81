"""The contract of every reward: images "b 3 h w" in [0, 1] and b prompts in, float32 scores "b" out, each sample on its own.

A subclass gives `score`, and `encode_text` where the prompt matters; checks, caching and freezing are here. Pictures of Pillow
and images of several sizes may be given too, as a list.

A search calls a reward with the same prompts in every step, and a graphics card must not wait for the processor there. So what
is copied to it, the prompts' texts, is kept for the last lists of prompts, and what has to be read from it, whether images are
finite, is read in the first call with a list of prompts alone (`check_call`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffalign.reward_models.pictures import Pictures, by_size, check_pictures
from diffalign.reward_models.spec import Spec
from diffalign.types import Images, Scores

logger = logging.getLogger(__name__)

TEXT_CHUNK = 256  # prompts encoded at once
RANGE_SLACK = 0.05  # how far outside [0, 1] values may lie before a warning
KEPT_BATCHES = 8  # lists of prompts whose texts stay on the device as `score` is given them
KEPT_CHECKS = 256  # lists of prompts whose first images have been looked at


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
        self._batches: OrderedDict[tuple[torch.device, tuple[str, ...]], Tensor] = OrderedDict()
        self._checked: OrderedDict[tuple[str, ...], None] = OrderedDict()
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
        if self.spec.needs_prompt:
            self._encoded(prompts)

    def forward(self, images: Tensor | Pictures, prompts: Sequence[str]) -> Scores:
        """Scores of images "b 3 h w", float32; or of a list of b pictures of any sizes, as `pictures.by_size` reads them.

        A list is scored in one batch for each size, on the reward's device, and the scores come in the order of the list.
        Raises TypeError and ValueError, naming the argument and, for a bad image, its index. The values of images are looked at in
        the first call with a list of prompts (`check_call`); images that are not finite have scores that are not finite later.
        """
        if not isinstance(images, (list, tuple)):
            check_call(self, images, prompts)
            return self._scores(images, prompts)
        _check_order(self.name, prompts)
        check_pictures(self.name, images)
        check_prompts(self.name, prompts)
        check_length(self.name, images, prompts)
        scores: list[Tensor] = [torch.empty(0)] * len(images)
        for places, batch in by_size(self.name, images, self._device()):
            own = [prompts[place] for place in places]
            check_call(self, batch, own, places)
            for place, score in zip(places, self._scores(batch, own), strict=True):
                scores[place] = score
        return torch.stack(scores)

    def _scores(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Scores of a batch that was checked."""
        return self.score(images, self._embed(prompts, images.device)).float()

    def _device(self) -> torch.device:
        """Where the weights are; the processor for a reward without."""
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def _embed(self, prompts: Sequence[str], device: torch.device) -> Tensor | None:
        """What `score` is given of these prompts; kept for the last lists of prompts."""
        if not self.spec.needs_prompt:
            return None
        key = (device, tuple(prompts))
        texts = self._encoded(prompts)  # encodes nothing twice, and notes that they were used
        if key not in self._batches:
            with torch.inference_mode(False), torch.no_grad():  # autograd later refuses tensors made in inference mode
                self._batches[key] = self.collate(texts).to(device)
        _use(self._batches, key, KEPT_BATCHES)
        return self._batches[key]

    def _encoded(self, prompts: Sequence[str]) -> list[Tensor]:
        """What is kept of each prompt, encoded now where it is new."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing and self._text_dropped:
            raise ValueError(f"reward {self.name!r}: its text encoder was dropped before the prompt {missing[0][:60]!r} was prepared")
        found = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
        for start in range(0, len(missing), TEXT_CHUNK):
            chunk = missing[start : start + TEXT_CHUNK]
            with torch.inference_mode(False), torch.no_grad():  # as above
                found |= zip(chunk, self.encode_text(chunk), strict=True)
        for prompt, text in found.items():  # all of this call are now the most recently used
            self._texts[prompt] = text
            self._texts.move_to_end(prompt)
        while len(self._texts) > self.cached_prompts:
            self._texts.popitem(last=False)
        return [found[prompt] for prompt in prompts]

    def _forget(self) -> None:
        self._batches.clear()
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


def check_length(name: str, images: Sequence[object] | Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError unless there is one prompt for each image."""
    if len(prompts) != len(images):
        raise ValueError(f"reward {name!r}: got {len(images)} images and {len(prompts)} prompts; give one prompt for each image")


def check_call(model: RewardModel, images: Tensor, prompts: Sequence[str], places: Sequence[int] | None = None) -> None:
    """Raises TypeError or ValueError for anything but b finite float images "b 3 h w" with b prompts; warns once of values off [0, 1].

    Values are looked at in the first call with a list of prompts: reading them makes a graphics card wait, and a search, which
    repeats its prompts, would wait in every step. Rewards without a gradient read every image on the processor, and are checked always.
    places: what to call the images in an error, where they are some of a longer list, which no search gives and is always checked.
    """
    name = model.name
    _check_order(name, prompts)
    if not isinstance(images, Tensor):
        raise TypeError(f"reward {name!r}: images must be a tensor 'b 3 h w' in [0, 1], got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"reward {name!r}: images must be floats in [0, 1], got {images.dtype}; divide 8-bit values by 255")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"reward {name!r}: images must have shape (b, 3, h, w), got {tuple(images.shape)}")
    check_prompts(name, prompts)
    check_length(name, images, prompts)
    if not model.differentiable and images.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"reward {name!r} has no gradient; score detached images, or use a method that needs none (best-of-n)")
    key = tuple(prompts)
    if places is not None or not model.differentiable or key not in model._checked:
        _check_values(model, images, range(len(images)) if places is None else places)
    if places is None:
        model._checked[key] = None
        _use(model._checked, key, KEPT_CHECKS)


def _check_order(name: str, prompts: object) -> None:
    if isinstance(prompts, Tensor):
        raise TypeError(f"reward {name!r}: the arguments are in the wrong order; call reward(images, prompts)")


def _check_values(model: RewardModel, images: Images, places: Sequence[int]) -> None:
    name = model.name
    values = images.detach().float().flatten(1)
    low, high = values.amin(dim=1), values.amax(dim=1)  # a NaN comes through both
    if not torch.isfinite(low + high).all():
        index = int((~torch.isfinite(low + high)).nonzero()[0])
        raise ValueError(f"reward {name!r}: images[{places[index]}] has values that are not finite")
    if not model._warned and (low.min() < -RANGE_SLACK or high.max() > 1 + RANGE_SLACK):
        model._warned = True
        logger.warning("reward %r: images range from %.2f to %.2f; they should lie in [0, 1]", name, low.min().item(), high.max().item())


def _use(kept: OrderedDict, key: object, most: int) -> None:
    """Note that an entry was used now, and drop those unused for longest beyond `most`."""
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


def attention_mask(seen: Bool[Tensor, "b l"], dtype: torch.dtype) -> Float[Tensor, "b 1 1 l"]:
    """What transformers adds to the logits of attention so that only these tokens are seen.

    It makes the same of a mask of zeros and ones, but looks first whether there is anything to hide, for which a graphics card waits.
    """
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None, None]


def cosine(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"]) -> Scores:
    """Cosine of matching rows, in float32 whatever came in: half precision would round scores to steps larger than their differences."""
    return nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)
