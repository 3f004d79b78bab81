"""A small network that turns a prompt's noise into noise that suits the prompt: what amortised noise search learns.

Two forms:

    distribution   reads the prompt:              eps' = mu(p) + exp(s(p)) eps       FIND's policy (2407.19453), shared by all prompts
    residual       reads the prompt and the noise: eps' = eps + f(eps, p)            noise hypernetworks (2508.09968)

and in both eps' is scaled to the norm of eps, so that it stays on the shell where the model knows noise. The last layer starts at zero:
an untrained policy changes nothing. Both papers' networks are the generator itself or large; this one is a transformer on patches of the
noise that reads the text embeddings, a fifth of the generator's work at the very most, because its pass is paid for every image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from diffalign.files import read_json, whole_file, write_json
from diffalign.noise import NoiseDistribution, sample_norm, with_norm

WEIGHTS, CONFIG = "noise_policy.safetensors", "noise_policy.json"
FORMS = ("residual", "distribution")
LEAST_LOG_STD, GREATEST_LOG_STD = -3.0, 1.0


@dataclass(frozen=True)
class PolicyShape:
    """What the network is built from, and the only models that it fits."""

    noise: tuple[int, ...]
    """Shape of one sample's noise: (c, h, w), (c, f, h, w) or, packed, (tokens, c)."""
    text_width: int
    """Entries of one token's embedding, as the model is given it."""
    form: str = "residual"
    """One of FORMS."""
    patch: int = 2
    """Side of a patch of the noise, a divisor of h and w; packed noise has patches already."""
    width: int = 256
    """Entries of a token inside the network, a multiple of `heads`."""
    blocks: int = 2
    """Transformer blocks, >= 1."""
    heads: int = 4
    """Attention heads, >= 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", tuple(self.noise))
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        for name in ("text_width", "patch", "width", "blocks", "heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, {self.heads}, got {self.width}")
        if len(self.noise) not in (2, 3, 4):
            raise ValueError(f"noise must have 2, 3 or 4 axes, got the shape {self.noise}")
        if len(self.noise) > 2 and (self.noise[-1] % self.patch or self.noise[-2] % self.patch):
            raise ValueError(f"patch must divide the height and width of the noise, {self.noise[-2]} x {self.noise[-1]}; got {self.patch}")

    @property
    def tokens(self) -> tuple[int, int]:
        """(how many, entries of each)."""
        if len(self.noise) == 2:
            return self.noise[0], self.noise[1]
        frames = self.noise[1] if len(self.noise) == 4 else 1
        return frames * self.noise[-2] * self.noise[-1] // self.patch**2, self.noise[0] * self.patch**2


@dataclass(frozen=True)
class Moved:
    """What a policy makes of a batch of noise."""

    noise: Float[Tensor, "b ..."]
    """eps', of the norm of eps."""
    kl: Float[Tensor, " b"]
    """How far from N(0, I), in nats an entry. Of a residual mean(f^2) / 2, which is the KL to first order where f's derivative is small."""


class NoisePolicy(nn.Module):
    """policy(noise, text) -> Moved; every sample is treated alone."""

    def __init__(self, shape: PolicyShape) -> None:
        super().__init__()
        self.shape = shape
        count, entries = shape.tokens
        self.place = nn.Parameter(0.02 * torch.randn(count, shape.width))
        self.read = nn.Linear(entries, shape.width) if shape.form == "residual" else None
        self.text = nn.Sequential(nn.Linear(shape.text_width, shape.width), nn.LayerNorm(shape.width))
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.blocks))
        self.norm = nn.LayerNorm(shape.width)
        self.write = nn.Linear(shape.width, entries if shape.form == "residual" else 2 * entries)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, noise: Float[Tensor, "b ..."], text: Float[Tensor, "b n d"]) -> Moved:
        """text: the embeddings that the model is given. Raises ValueError for noise or text of another shape than it was built for."""
        if tuple(noise.shape[1:]) != self.shape.noise or text.shape[-1] != self.shape.text_width:
            raise ValueError(
                f"this noise policy is for noise of shape {self.shape.noise} and text embeddings of {self.shape.text_width} entries; got "
                f"{tuple(noise.shape[1:])} and {text.shape[-1]}; it serves the model and the size that it was trained for"
            )
        x = self.place.expand(len(noise), -1, -1)
        if self.read is not None:
            x = x + self.read(self.patches(noise))
        told = self.text(text.to(x.dtype))
        for block in self.blocks:
            x = block(x, told)
        out = self.write(self.norm(x))
        if self.shape.form == "residual":
            step = self.whole(out)
            return Moved(with_norm(noise + step, sample_norm(noise)), 0.5 * step.square().flatten(1).mean(1))
        mean, log_std = (self.whole(part) for part in out.chunk(2, -1))
        learned = NoiseDistribution(mean, log_std.clamp(LEAST_LOG_STD, GREATEST_LOG_STD).exp())
        return Moved(with_norm(learned.mean + learned.std * noise, sample_norm(noise)), learned.kl_per_entry())

    def patches(self, noise: Float[Tensor, "b ..."]) -> Float[Tensor, "b n k"]:
        """Noise as tokens."""
        if noise.dim() == 3:
            return noise
        p, (h, w) = self.shape.patch, noise.shape[-2:]
        grid = noise.reshape(len(noise), noise.shape[1], -1, h // p, p, w // p, p)  # b c f y p x q
        return grid.permute(0, 2, 3, 5, 1, 4, 6).reshape(len(noise), *self.shape.tokens)

    def whole(self, tokens: Float[Tensor, "b n k"]) -> Float[Tensor, "b ..."]:
        """The way back."""
        if len(self.shape.noise) == 2:
            return tokens
        p, c, (h, w) = self.shape.patch, self.shape.noise[0], self.shape.noise[-2:]
        grid = tokens.reshape(len(tokens), -1, h // p, w // p, c, p, p)  # b f y x c p q
        return grid.permute(0, 4, 1, 2, 5, 3, 6).reshape(len(tokens), *self.shape.noise)

    def save(self, folder: Path) -> None:
        """Weights and shape, each file whole or as it was."""
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / WEIGHTS) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, temporary)
        write_json(folder / CONFIG, asdict(self.shape))

    @classmethod
    def load(cls, folder: Path) -> NoisePolicy:
        """What `save` wrote, ready to be used. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no noise policy: {name} is missing; train one with diffalign.train_noise")
        given: dict[str, Any] = read_json(folder / CONFIG, keys=("noise", "text_width"))
        try:
            policy = cls(PolicyShape(**given))
            policy.load_state_dict(load_file(folder / WEIGHTS))
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{folder} holds a noise policy of another version or a damaged one ({error}); train it anew") from error
        return policy.eval().requires_grad_(False)


class Block(nn.Module):
    """Self-attention among patches, attention to the text, and a feed-forward part; each adds to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own = nn.Linear(width, 3 * width)
        self.own_out = nn.Linear(width, width)
        self.query, self.text = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.text_out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "b n w"], text: Float[Tensor, "b t w"]) -> Float[Tensor, "b n w"]:
        x = x + self.own_out(self.attend(*self.own(self.norms[0](x)).chunk(3, -1)))
        x = x + self.text_out(self.attend(self.query(self.norms[1](x)), *self.text(text).chunk(2, -1)))
        return x + self.feed(self.norms[2](x))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "b n w"]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
