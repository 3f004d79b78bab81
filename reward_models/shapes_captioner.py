"""The network of `shapes-reward`: a captioner. It reads an image of the shapes world and says how likely each caption is.

    log p(prompt | image) = sum_i log p(token_i | token_<i, image)

As a score of alignment this is the generative form of VQAScore (Lin et al., arXiv 2404.01291) and of captioners as learners
(Tschannen et al., CapPa, arXiv 2306.07915): a model of language conditioned on the picture sees order and binding, which two
towers joined by a cosine do not.

    pixels 64 x 64 --conv--> 8 x 8 cells, with their places --attention--> memory "m 64 d"
    tokens --causal attention, attention to memory--> logits "b l vocabulary"

Places enter twice, as learnt vectors that start as sines and cosines and as a linear map of (x, y): "left of" is a comparison.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

SIZE = 64  # pixels; the side of the images it reads
CELLS = 8  # a side

_TURNED = {"and": "and", "left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_JOINTS = "|".join(_TURNED)
_THING = rf"(an? (?:(?! (?:{_JOINTS}) ).)+)"
_TWO_THINGS = re.compile(rf"((?:an? (?:photo|picture|drawing) of )?){_THING} ({_JOINTS}) {_THING}")


def other_way_round(prompt: str) -> str:
    """A prompt of two things said from the other one: "a ring left of a star" is "a star right of a ring". Any other prompt as it is."""
    match = _TWO_THINGS.fullmatch(prompt)
    if match is None:
        return prompt
    carrier, first, joint, second = match.groups()
    return f"{carrier}{second} {_TURNED[joint]} {first}"


@dataclass(frozen=True)
class CaptionerConfig:
    """The sizes of the network; config.json of a `shapes-reward` folder holds them."""

    vocabulary: int  # tokens
    start: int  # id of the start token
    end: int  # id of the end token, also the padding
    length: int = 32  # longest caption in tokens, start and end included
    width: int = 192  # d
    heads: int = 6  # of every attention
    image_layers: int = 2  # attention layers over the cells
    text_layers: int = 3  # layers of the decoder
    stem: int = 32  # channels after the first convolution; three times as many in the middle
    expansion: int = 2  # hidden width of each feed-forward layer over d


class Attention(nn.Module):
    """Multi-head attention of x to itself or to a memory; `rows` says which memory each x reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b l d"], memory: Float[Tensor, "m t d"], rows: Int[Tensor, " b"] | None = None, causal: bool = False
    ) -> Float[Tensor, "b l d"]:
        q = self._split(self.query(x))
        k, v = (self._split(part) for part in self.key_value(memory).chunk(2, dim=-1))
        if rows is not None:
            k, v = k[rows], v[rows]
        # Written out: for these sizes on a CPU the backward of torch's fused attention takes eight times as long.
        weights = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        if causal:
            later = torch.ones(weights.shape[2:], dtype=torch.bool, device=x.device).triu(1)
            weights = weights.masked_fill(later, -torch.inf)
        return self.out((weights.softmax(dim=3).to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm transformer layer; with `cross` it reads a memory between attention and feed-forward."""

    def __init__(self, config: CaptionerConfig, cross: bool) -> None:
        super().__init__()
        d = config.width
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(3 if cross else 2)])
        self.own = Attention(d, config.heads)
        self.cross = Attention(d, config.heads) if cross else None
        self.feed = nn.Sequential(nn.Linear(d, config.expansion * d), nn.GELU(), nn.Linear(config.expansion * d, d))

    def forward(self, x: Float[Tensor, "b l d"], memory: Tensor | None = None, rows: Tensor | None = None) -> Float[Tensor, "b l d"]:
        y = self.norms[0](x)
        x = x + self.own(y, y, causal=self.cross is not None)
        if self.cross is not None:
            x = x + self.cross(self.norms[1](x), memory, rows)
        return x + self.feed(self.norms[-1](x))


class Captioner(nn.Module):
    """p(caption | image). Images are "m 3 64 64" in [0, 1]; captions are token ids "b l" that begin with the start token."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config
        d, c = config.width, config.stem
        self.stem = nn.Sequential(
            nn.Conv2d(3, c, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(c, 3 * c, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(3 * c, 3 * c, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(3 * c, d, 3, stride=2, padding=1),
        )
        self.places = nn.Parameter(0.2 * _waves(d))
        self.axes = nn.Linear(2, d, bias=False)
        self.image_blocks = nn.ModuleList([Block(config, cross=False) for _ in range(config.image_layers)])
        self.image_norm = nn.LayerNorm(d)
        self.tokens = nn.Embedding(config.vocabulary, d)
        self.positions = nn.Parameter(0.02 * torch.randn(config.length, d))
        self.text_blocks = nn.ModuleList([Block(config, cross=True) for _ in range(config.text_layers)])
        self.text_norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.vocabulary)
        nn.init.normal_(self.tokens.weight, std=0.3)
        axis = (torch.arange(CELLS) - (CELLS - 1) / 2) / (CELLS / 2)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("grid", torch.stack([x.flatten(), y.flatten()], dim=1), persistent=False)

    def encode_image(self, images: Float[Tensor, "m 3 64 64"]) -> Float[Tensor, "m 64 d"]:
        """The memory that captions are read against."""
        x = self.stem(2 * images - 1).flatten(2).transpose(1, 2)
        x = x + self.places + self.axes(self.grid.to(x.dtype))
        for block in self.image_blocks:
            x = block(x)
        return self.image_norm(x)

    def forward(
        self, memory: Float[Tensor, "m 64 d"], ids: Int[Tensor, "b l"], rows: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b l vocabulary"]:
        """Logits of the token that follows each one; rows: which memory each caption is read against (its own without)."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.text_blocks:
            x = block(x, memory, rows)
        return self.head(self.text_norm(x))

    def log_likelihood(
        self, memory: Float[Tensor, "m 64 d"], ids: Int[Tensor, "b l"], rows: Int[Tensor, " b"] | None = None, blocked: Tensor | None = None
    ) -> Float[Tensor, "b k"]:
        """log p of every token after the first, in float32; zero on padding, that is after the first end token.

        blocked "b l-1 vocabulary": continuations left out of the softmax (training alone uses it, see the trainer).
        """
        ids = self.trimmed(ids)
        logits = self(memory, ids[:, :-1], rows).float()
        if blocked is not None:
            logits = logits.masked_fill(blocked[:, : logits.shape[1]], -torch.inf)
        chosen = logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(dim=2)
        return chosen.masked_fill(self.padding(ids), 0.0)

    def proposition(self, memory: Float[Tensor, "m 64 d"], ids: Int[Tensor, "m 2 l"], with_end: bool = False) -> Float[Tensor, " m"]:
        """log of the likelihood that a prompt is said, the one way round or the other, in nats; both are the same where there is one.

        with_end: count the end token too, that is, that no more is said.
        """
        flat = ids.flatten(0, 1)
        nats = self.log_likelihood(memory, flat, torch.arange(len(memory), device=ids.device).repeat_interleave(2))
        if not with_end:
            nats = nats.masked_fill(flat[:, 1 : nats.shape[1] + 1] == self.config.end, 0.0)
        alike = (ids[:, 0] == ids[:, 1]).all(dim=1)
        return nats.sum(dim=1).view(-1, 2).logsumexp(dim=1) - math.log(2) * alike

    def trimmed(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, "b k"]:
        """The ids, cut after the end token of the longest caption. Raises ValueError where a caption is longer than the network reads."""
        lengths = (ids == self.config.end).int().argmax(dim=1) + 1
        longest = int(lengths.max())
        if longest > self.config.length:
            raise ValueError(f"ids have {longest} tokens; the captioner reads at most {self.config.length}")
        return ids[:, :longest]

    def padding(self, ids: Int[Tensor, "b l"]) -> Bool[Tensor, "b l-1"]:
        """Which of the predicted tokens lie after the first end token."""
        ended = (ids == self.config.end).int().cumsum(dim=1)
        return ended[:, :-1] > 0


def _waves(width: int) -> Float[Tensor, "64 width"]:
    """Sines and cosines of row and column of each cell."""
    frequency = torch.logspace(0, math.log10(0.1), width // 4)
    row, column = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (row, column)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
