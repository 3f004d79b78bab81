"""MPS, the multi-dimensional preference score, for overall preference. Score = exp(logit scale) x cosine(attended image, prompt).

Paper: Zhang et al., Learning Multi-dimensional Human Preference for Text-to-Image Generation (CVPR 2024). The image tokens of a CLIP
ViT-H/14 attend to those tokens of the prompt that a *condition*, a list of words, has to do with; the class token that comes out is
compared with the prompt.

    T = projected text tokens (all 77, padding too)     C = the same of the condition     I = projected image tokens, before the last norm
    m_i = max_j T_i . C_j       token i is kept where m_i / max_i m_i > threshold
    I <- I + CrossAttention(I, kept T);   I <- I + SelfAttention(I)        four times
    score = exp(s) cos(I_0, T_end)

The released code divides by the greatest m of the *batch*, so that a score depends on its batch mates; here by the prompt's own, which is
what that code does when it is given one prompt. The threshold of its model and of its example is 0.01, the default here; that of
its evaluation scripts, and so of the paper's tables, 0.3: load("mps", options={"threshold": 0.3}).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import CLIPModel

from diffalign.reward_models.base import Images, RewardModel, Scores, cosine
from diffalign.reward_models.checkpoints import load_strict, read_weights, weights_file, without_weights
from diffalign.reward_models.clip_files import POSITION_IDS, TRANSFORMERS_TEXT, clip_config
from diffalign.reward_models.clip_text import transformers_tokens
from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, quantity, "
    "attributes, position, number, location, word, things."
)
LAYERS, HEADS, HEAD_WIDTH, WIDENING = 4, 16, 64, 4
ROTARY_BASE = 10_000


class MPS(RewardModel):
    """The weights are the tensor-only port: "mps.model.*" under transformers' names, "mps.cross_model.*", and no configuration.

    Options: architecture, open_clip's name for the CLIP it holds; threshold in [0, 1), see above. The released original is a pickled
    module, which is not read.
    """

    text_modules = tuple(f"clip.{name}" for name in TRANSFORMERS_TEXT)
    cached_prompts = 1024  # 320 kB each in float32, half of that in half precision

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.threshold = float(spec.options["threshold"])
        if not 0 <= self.threshold < 1:
            raise ValueError(f"reward {self.name!r}: option threshold must be at least 0 and below 1, got {spec.options['threshold']!r}")
        self._condition: Tensor | None = None
        config = clip_config(str(spec.options["architecture"]))
        self.clip = without_weights(lambda: CLIPModel(config))
        self.cross = without_weights(lambda: CrossModel(config.projection_dim))
        path = weights_file(sources["model"], "model.safetensors")
        published = nn.ModuleDict({"mps": nn.ModuleDict({"model": self.clip, "cross_model": self.cross})})
        known = [f"mps.model.{name}" for name in POSITION_IDS]  # these, and the frequencies, follow from the sizes
        known += [f"mps.cross_model.layers.{i}.1.fn.rotary_emb.inv_freq" for i in range(LAYERS)]
        load_strict(published, read_weights(path, None), path, unused=known)
        self.scale = self.clip.logit_scale.float().exp().item()
        self.pixels = Preprocess(config.vision_config.image_size, OPENAI_MEAN, OPENAI_STD)
        self.train(False)

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n 78 k"]:
        """Rows: the end token's embedding, then all 77 tokens; beside the embedding a column that is 1 for tokens that are kept."""
        ids = transformers_tokens(prompts, self.name).to(self.clip.device)
        tokens = self._text(ids)
        if self._condition is None:
            self._condition = self._text(transformers_tokens([OVERALL], self.name).to(self.clip.device))[0]
        kept = related(tokens, self._condition, self.threshold)
        end = tokens[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]  # the end token has the greatest id
        rows = torch.cat([end[:, None], tokens], dim=1)
        return torch.cat([rows, F.pad(kept, (1, 0)).to(rows.dtype)[..., None]], dim=2)

    def _forget(self) -> None:
        super()._forget()
        self._condition = None  # also of another device or dtype

    def _text(self, ids: Tensor) -> Float[Tensor, "n l d"]:
        return self.clip.text_projection(self.clip.text_model(input_ids=ids).last_hidden_state)

    def score(self, images: Images, texts: Float[Tensor, "b rows k"] | None) -> Scores:
        pixels = self.pixels(images).to(self.clip.dtype)
        tokens = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state)
        end, text, kept = texts[:, 0, :-1], texts[:, 1:, :-1], texts[:, 1:, -1] > 0
        return self.scale * cosine(self.cross(tokens, text, kept)[:, 0], end)


def related(tokens: Float[Tensor, "n l d"], condition: Float[Tensor, "m d"], threshold: float) -> Bool[Tensor, "n l"]:
    """Which tokens of each prompt have to do with the condition, measured by the prompt's own greatest similarity."""
    similarity = (tokens.float() @ condition.float().T).amax(dim=2)
    return similarity / similarity.amax(dim=1, keepdim=True) > threshold


class Residual(nn.Module):
    """x + fn(x, ...). A module of its own because the checkpoint's names have its level."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return x + self.fn(x, *rest)


class CrossModel(nn.Module):
    """Four times: attention to the prompt, attention among the image tokens; each beside a SwiGLU network on the same input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Residual(CrossAttention(width)), Residual(SelfAttention(width))]) for _ in range(LAYERS))

    def forward(self, x: Float[Tensor, "b n d"], text: Float[Tensor, "b l d"], kept: Bool[Tensor, "b l"]) -> Float[Tensor, "b n d"]:
        for cross, own in self.layers:
            x = own(cross(x, text, kept))
        return x


class CrossAttention(nn.Module):
    """Many queries from the image, one key and value head from the prompt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)  # its bias is zero in the checkpoint
        self.to_q = nn.Linear(width, HEADS * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * WIDENING * width, bias=False), SwiGLU(), nn.Linear(WIDENING * width, width, bias=False)
        )

    def forward(self, x: Float[Tensor, "b n d"], text: Float[Tensor, "b l d"], kept: Bool[Tensor, "b l"]) -> Float[Tensor, "b n d"]:
        x = self.norm(x)
        key, value = self.to_kv(text).chunk(2, dim=-1)
        return self.to_out(attend(heads_of(self.to_q(x)), key, value, kept[:, None, None])) + self.ff(x)


class SelfAttention(nn.Module):
    """As above among the image tokens, with rotary positions; all projections in one matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.parts = (HEADS * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 2 * WIDENING * width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(WIDENING * width, width, bias=False))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        query, key, value, inner = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        return self.attn_out(attend(rotate(heads_of(query)), rotate(key), value)) + self.ff_out(inner)


class SwiGLU(nn.Module):
    def forward(self, x: Float[Tensor, "*b d2"]) -> Float[Tensor, "*b d"]:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def heads_of(query: Float[Tensor, "b n hd"]) -> Float[Tensor, "b h n k"]:
    return query.unflatten(2, (HEADS, HEAD_WIDTH)).transpose(1, 2)


def attend(
    query: Float[Tensor, "b h n k"], key: Float[Tensor, "b l k"], value: Float[Tensor, "b l k"], kept: Tensor | None = None
) -> Tensor:
    """Attention of all heads to one key and value; "b n h*k"."""
    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=kept).transpose(1, 2).flatten(2)


def rotate(x: Float[Tensor, "*b n k"]) -> Float[Tensor, "*b n k"]:
    """Rotary positions 0, 1, ...: channel c and channel c + k/2 turn by position / 10000^(2c / k)."""
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
