"""Experts: rewards for predicted images, one for each range of noise, as small adapters on a reward that knows finished images alone.

Paper: Go et al., "Towards Practical Plug-and-Play Diffusion Models", CVPR 2023 (2212.05973).

A reward judges the blur that a model predicts from mostly noise as if it were a finished picture. An expert is the same reward with
low-rank updates of its layers, taught on the model's own samples (methods/experts_fit.py), without data, to say of a prediction what the
reward will say of the image that it becomes:

    r_n(decode(x0 predicted from x_t), p)  ~  r(decode(x0), p),    t in range n;      W_n = W + scale B_n A_n

n -> the range of `bounds` that the share of noise falls into;  A, B -> `weights[n]["LAYER.down"]`, `["LAYER.up"]`;  rank -> `rank`.

Where we differ: the paper's experts read noised images x_t, ours the predictions, which every method here has anyway; and each begins as
the reward itself, where the public code begins each as the one before. Updates are added by hooks that live as long as one call: the
reward's own weights, layers and names are never touched, and outside a call of an expert it is what it was, to the bit.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.files import whole_file
from diffalign.methods.checks import check_integer, check_number
from diffalign.types import Reward, RewardScores

FILE = "experts.safetensors"
Weights = dict[str, Tensor]
"""Of one expert: LAYER.down "r in ..." and LAYER.up "out r" of every layer, float32."""


class Experts:
    """One adapter of `reward` for each of len(bounds) + 1 ranges of noise; `Guide(reward, ranges=experts)` and the particles use them.

    bounds: shares of noise s / sqrt(a^2 + s^2), ascending in (0, 1); a share equal to a bound belongs to the range below it.
    rank: of the updates, >= 1 (paper: 16). scale: of B A (paper: 0.5). seed: of A's start; B starts at zero, so each expert starts as
    the reward. Raises ValueError for bad bounds, and for a reward without a linear or convolutional layer that could be adapted.
    """

    name = "experts"

    def __init__(self, reward: Reward, bounds: Sequence[float], rank: int = 8, scale: float = 1.0, seed: int = 0) -> None:
        check_integer("rank", rank, 1)
        check_number("scale", scale, 0.0, above=True)
        self.reward, self.bounds, self.rank, self.scale = reward, check_bounds(bounds), rank, scale
        self.layers = adaptable_layers(reward)
        if not self.layers:
            raise ValueError("reward has no linear or convolutional layer that an expert could adapt; a function cannot have experts")
        self.weights: list[Weights] = [self._start(seed, n) for n in range(len(self.bounds) + 1)]

    def _start(self, seed: int, n: int) -> Weights:
        generator = torch.Generator().manual_seed(1_000_003 * seed + n)
        weights = {}
        for name, layer in self.layers.items():
            shape = layer.weight.shape
            down = torch.randn(self.rank, *shape[1:], generator=generator) / math.sqrt(layer.weight[0].numel())
            weights[f"{name}.down"] = down.to(layer.weight.device)
            weights[f"{name}.up"] = torch.zeros(shape[0], self.rank, device=layer.weight.device)
        return weights

    def range_of(self, share: float) -> int:
        """Which range a share of noise lies in, 0 nearest to the clean image."""
        return bisect_left(self.bounds, share)

    def at(self, share: float) -> Expert:
        """The reward for predictions made at this share of noise."""
        return Expert(self, self.range_of(share))

    @contextmanager
    def in_force(self, n: int) -> Iterator[None]:
        """Inside the block the reward is expert n. A backward pass through what was computed may come later."""
        weights = self.weights[n]
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                hook = _update(weights[f"{name}.down"], weights[f"{name}.up"], self.scale)
                stack.callback(layer.register_forward_hook(hook).remove)
            yield

    def save(self, folder: str | Path) -> None:
        """FILE in `folder`: the weights, and in its header bounds, rank and scale. Replaced whole or not at all."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{n}/{name}": tensor.detach().cpu().contiguous() for n, part in enumerate(self.weights) for name, tensor in part.items()
        }
        facts = {"bounds": list(self.bounds), "rank": self.rank, "scale": self.scale}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, {"experts": json.dumps(facts)})

    @classmethod
    def load(cls, folder: str | Path, reward: Reward) -> Experts:
        """What `save` wrote, on the reward that it was made for. ValueError where the layers are others."""
        path = Path(folder) / FILE
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("experts", "{}"))
            if set(facts) != {"bounds", "rank", "scale"}:
                raise ValueError(f"{path} does not hold experts as Experts.save writes them")
            experts = cls(reward, facts["bounds"], facts["rank"], facts["scale"])
            expected = {f"{n}/{name}": tensor for n, part in enumerate(experts.weights) for name, tensor in part.items()}
            names = set(file.keys())
            strange = sorted(names ^ set(expected)) or sorted(n for n in names if tuple(file.get_slice(n).get_shape()) != expected[n].shape)
            if strange:
                raise ValueError(f"{path} was made for another reward: {strange[0]!r} does not fit; load the one that it was trained on")
            for key, tensor in expected.items():
                tensor.copy_(file.get_tensor(key))
        return experts


class Expert:
    """One of them, as a Reward."""

    def __init__(self, experts: Experts, n: int) -> None:
        self.experts, self.n = experts, n

    @property
    def differentiable(self) -> bool:
        return self.experts.reward.differentiable

    def prepare(self, prompts: Sequence[str]) -> None:
        """The text side is the reward's own."""
        self.experts.reward.prepare(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardScores:
        with self.experts.in_force(self.n):
            return self.experts.reward(images, prompts)


def check_bounds(bounds: Sequence[float]) -> tuple[float, ...]:
    """The bounds as floats. ValueError unless they are ascending shares in (0, 1)."""
    for bound in bounds:
        check_number("bounds", bound, 0.0, math.nextafter(1.0, 0.0), above=True)
    if list(bounds) != sorted(set(bounds)):
        raise ValueError(f"bounds must be ascending shares of noise, got {tuple(bounds)!r}")
    return tuple(float(bound) for bound in bounds)


def adaptable_layers(reward: Reward) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear and convolutional layers of a reward, or of a mix's members, by name: those that see the image.

    Left out are the modules that encode prompts alone, whose results are kept, and what attention of torch calls by its weights.
    """
    members = getattr(reward, "members", None)
    models = {name: entry[0] for name, entry in members.items()} if isinstance(members, Mapping) else {"reward": reward}
    found = {}
    for member, model in models.items():
        if not isinstance(model, nn.Module):
            continue
        texts = tuple(f"{path}." for path in getattr(model, "text_modules", ()))
        fused = tuple(f"{path}." for path, part in model.named_modules() if isinstance(part, nn.MultiheadAttention))
        for path, layer in model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and not f"{path}.".startswith(texts + fused) and getattr(layer, "groups", 1) == 1:
                found[f"{member}.{path}"] = layer
    return found


def _update(down: Tensor, up: Tensor, scale: float):
    """A forward hook that adds scale B A x to what a layer makes of x, computed in float32."""

    def add(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = arguments[0].to(down.dtype)
        if isinstance(layer, nn.Linear):
            change = F.linear(F.linear(x, down), up)
        else:
            change = F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up[:, :, None, None])
        return output + (scale * change).to(output.dtype)

    return add
