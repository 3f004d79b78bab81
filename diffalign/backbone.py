"""What a model family offers to everything that works inside the denoising loop: training, steering, searches over trajectories.

A Backbone turns prompts into conditioning, images into latents and back, and evaluates its network at any level of noise. It knows
nothing of methods; they know nothing of U-Nets, transformers, packing or autoencoders. pipelines/backbone.py implements it for diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import Schedule

NEGATIVE = "negative_"
Times = int | float | Float[Tensor, " b"]
"""What the network is told of the time: one number for all samples, or one for each."""


@dataclass(frozen=True)
class Size:
    """Of what is made, in pixels and frames; an image has one frame."""

    height: int
    width: int
    frames: int = 1

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class Conditioning:
    """All that the network is told beside its input and the time: prompts, encoded once, and the size."""

    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Argument of the stock call -> its tensor, samples first; those of the unconditional branch begin with "negative_"."""
    size: Size | None = None
    """None where the family reads it off the latents."""
    embedded_scale: float | None = None
    """The guidance scale that distilled models take as an input (FLUX.1-dev, SANA-Sprint); None for all others."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def has_unconditional(self) -> bool:
        """Whether the unconditional branch was encoded too."""
        return any(name.startswith(NEGATIVE) for name in self.tensors)

    def rows(self, rows: Sequence[int]) -> Conditioning:
        """The conditioning of the samples `rows`, in that order; a sample may occur more than once."""
        if any(not 0 <= row < len(self) for row in rows):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}, got {list(rows)}")
        tensors = {
            name: tensor[torch.as_tensor(list(rows), dtype=torch.long, device=tensor.device)] for name, tensor in self.tensors.items()
        }
        return Conditioning(tuple(self.prompts[row] for row in rows), tensors, self.size, self.embedded_scale)

    def conditional(self) -> dict[str, Tensor]:
        """The tensors of the branch with the prompt."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(NEGATIVE)}

    def unconditional(self) -> dict[str, Tensor]:
        """The tensors of the other branch, under the names of `conditional`. ValueError where it was not encoded."""
        if not self.has_unconditional:
            raise ValueError("the unconditional branch was not encoded; call encode(prompts, unconditional=True)")
        return {name.removeprefix(NEGATIVE): tensor for name, tensor in self.tensors.items() if name.startswith(NEGATIVE)}


class Backbone(Protocol):
    """A text-to-image or text-to-video model, as methods inside the loop see it. Shapes of latents are the family's own.

    Gradients reach the latents always, and the weights where they require them; no method here decides about no_grad.
    """

    two_calls: bool
    """Whether the two branches of guidance are two calls of the network rather than one on twice the batch."""
    prediction: str
    """What the network predicts, one of diffusion.PREDICTIONS."""

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        unconditional: bool = True,
        size: Size | None = None,
        embedded_scale: float | None = None,
    ) -> Conditioning:
        """Encode prompts once, without gradient. negative_prompt: one for all or one each; empty where None."""
        ...

    def encode_images(self, images: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Images in [0, 1] ("b 3 h w"; video "b f 3 h w") to clean latents as the network knows them: the mean, not a draw."""
        ...

    def noise_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """Shape of one sample's noise, in the form that the stock call takes as `latents`; the model's own size where not given."""
        ...

    def draw_noise(self, generators: Sequence[torch.Generator], size: Size | None = None) -> Float[Tensor, "b ..."]:
        """Unit-variance float32 noise, sample i from generators[i], equal to what the stock call draws from such a list."""
        ...

    def schedule(self, steps: int | None = None, *, size: Size | None = None) -> Schedule:
        """The levels that the stock call would visit."""
        ...

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
        """Training timesteps as the model was trained on, uniformly: whole numbers for VP models, fractions of the flow's 1000."""
        ...

    def levels(self, timesteps: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """(signal, noise) of the network's input at training timesteps."""
        ...

    def predict(
        self, x: Float[Tensor, "b ..."], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b ..."]:
        """One evaluation of the network on one branch (or several, stacked), as it is. x is a x0 + s eps."""
        ...

    def denoise(
        self, x: Float[Tensor, "b ..."], timestep: Times, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Float[Tensor, "b ..."]:
        """The network's output under classifier-free guidance, u + w (c - u); one evaluation where w <= 1."""
        ...

    def decode(self, latents: Float[Tensor, "b ..."], size: Size | None = None) -> Float[Tensor, "b ..."]:
        """Clean latents to float32 images in [0, 1] ("b 3 h w"; video "b f 3 h w"); differentiable, the clamp included."""
        ...
