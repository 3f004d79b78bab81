"""ImageReward's network once more in plain torch, under the published checkpoint's names: the other side of its parity test.

Written from the papers (BLIP, arXiv 2201.12086; BERT; ViT) and the checkpoint's key list. Post-norm text layers that attend to themselves
in both directions, then to the image; a pre-norm vision transformer with one fused projection for queries, keys and values.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

HEAD_WIDTH = 64


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in heads of 64 over "b l d"; mask "b l" of keys that count."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2)

    scores = heads(q) @ heads(k).transpose(2, 3) / math.sqrt(HEAD_WIDTH)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :].bool(), -torch.inf)
    return (scores.softmax(dim=-1) @ heads(v)).transpose(1, 2).flatten(2)


class Attn(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=2)))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attn(width), Mlp(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)


class Vision(nn.Module):
    def __init__(self, width: int, inner: int, depth: int, size: int, patch: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, width))
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Projection(nn.Module):
    """query, key and value; keys and values of the image where `context` is its width."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)


class Output(nn.Module):
    """A linear layer, added to what came before it, then normalised."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)


class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.self, self.output = Projection(width, context), Output(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        mixed = attend(self.self.query(x), self.self.key(context), self.self.value(context), mask)
        return self.output(mixed, x)


class Dense(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, vision: int) -> None:
        super().__init__()
        self.attention, self.crossattention = Attention(width, width), Attention(width, vision)
        self.intermediate, self.output = Dense(width, inner), Output(inner, width)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image, None)
        return self.output(nn.functional.gelu(self.intermediate.dense(x)), x)


class Embeddings(nn.Module):
    def __init__(self, words: int, width: int, positions: int) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(positions).unsqueeze(0))


class Encoder(nn.Module):
    def __init__(self, width: int, inner: int, depth: int, vision: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(width, inner, vision) for _ in range(depth))


class Text(nn.Module):
    def __init__(self, words: int, width: int, inner: int, depth: int, vision: int, positions: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embeddings(words, width, positions), Encoder(width, inner, depth, vision)

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        embeddings = self.embeddings
        x = embeddings.word_embeddings(ids) + embeddings.position_embeddings(embeddings.position_ids[0, : ids.shape[1]])
        x = embeddings.LayerNorm(x)
        for layer in self.encoder.layer:
            x = layer(x, mask, image)
        return x


class Blip(nn.Module):
    def __init__(self, vision: Vision, text: Text, width: int, words_width: int) -> None:
        super().__init__()
        self.visual_encoder, self.text_encoder = vision, text
        self.vision_proj, self.text_proj = nn.Linear(width, 256), nn.Linear(words_width, 256)  # of pre-training, unused


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        first, second, third, fourth, fifth = (nn.Linear(a, b) for a, b in pairwise(sizes))
        self.layers = nn.Sequential(first, nn.Dropout(0.2), second, nn.Dropout(0.2), third, nn.Dropout(0.1), fourth, fifth)


class PlainImageReward(nn.Module):
    """Its state dict is ImageReward.pt. Call with normalised pixels, ids and mask; returns the standardised score."""

    def __init__(
        self, width: int, inner: int, depth: int, size: int, patch: int, words: int, text_width: int, text_inner: int, text_depth: int
    ) -> None:
        super().__init__()
        vision = Vision(width, inner, depth, size, patch)
        text = Text(words, text_width, text_inner, text_depth, width, 512)
        self.blip, self.mlp = Blip(vision, text, width, text_width), Head(text_width)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        image = self.blip.visual_encoder(pixels)
        cls = self.blip.text_encoder(ids, mask, image)[:, 0]
        return (self.mlp.layers(cls)[:, 0] - 0.16717362830052426) / 1.0333394966054072
