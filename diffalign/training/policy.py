"""The policy: the network that learns, by an adapter (LoRA) or by all its weights, and the reference: the network as it was.

The adapter lies on the pipeline's own network and is switched on except inside a call of the reference, so the reference costs no
memory and the backward pass, which may recompute activations, always finds the policy's weights in force. Where all weights are
trained the reference is a frozen copy, exchanged for the network inside its calls.

The network stays in eval mode: dropout would make the policy differ from its reference before anything was learned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.backbone import Backbone, Conditioning, Times
from diffalign.training.contract import Denoiser

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The projections of attention, as diffusers names them; the last four are the text's in SD3 and FLUX."""


@dataclass(frozen=True)
class Adaptation:
    """What of the network learns."""

    rank: int | None = 16
    """Of the adapter's updates B A, >= 1; None trains all weights, with a frozen copy as reference."""
    alpha: float | None = None
    """B A is scaled by alpha / rank, > 0; None: as rank, a scale of 1."""
    targets: tuple[str, ...] = ATTENTION
    """Ends of the names of the layers that get an adapter; those that a network lacks are left out."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradient."""
    seed: int = 0
    """Of A's start; B starts at zero, so the policy starts as the reference."""

    def __post_init__(self) -> None:
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank must be a whole number of at least 1, or None to train all weights; got {self.rank!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be greater than 0, got {self.alpha!r}")
        if not self.targets:
            raise ValueError("targets is empty; name at least one layer, as in targets=('to_q', 'to_v')")


class Policy:
    """A backbone's network, made ready to learn. `policy.denoiser()` and `policy.reference()` are what objectives see."""

    def __init__(self, backbone: Backbone, network: str, adaptation: Adaptation | None = None) -> None:
        """network: the attribute of `backbone` that denoises ("unet", "transformer").

        Raises ValueError where an adapter cannot lie on it: one is loaded already, no layer has a name from `targets`, or the pipeline
        has no way to save one; or where weights in half precision would all be trained.
        """
        self.backbone, self.network_name, self.adaptation = backbone, network, adaptation or Adaptation()
        module = self.network
        for part in vars(backbone).values():  # decoders and text encoders: gradients pass through them, none is kept
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        module.eval()
        self._copy: nn.Module | None = None
        if self.adaptation.rank is None:
            _require_full_precision(module)
            self._copy = copy.deepcopy(module)
            module.requires_grad_(True)
        else:
            self._add_adapter(self.adaptation)
        if self.adaptation.checkpointing:
            module.enable_gradient_checkpointing()
        self.parameters: dict[str, nn.Parameter] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        """What learns, by name."""

    @property
    def network(self) -> nn.Module:
        return getattr(self.backbone, self.network_name)

    def _add_adapter(self, adaptation: Adaptation) -> None:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        module = self.network
        if any(isinstance(part, BaseTunerLayer) for part in module.modules()):
            raise ValueError(f"the {self.network_name} has an adapter already; make it part of the weights first: pipe.fuse_lora(), "
                             "then pipe.unload_lora_weights()")  # fmt: skip
        if not hasattr(self.backbone, "save_lora_weights"):
            raise ValueError(f"diffusers has no LoRA format for {type(self.backbone).__name__}; train all weights with rank=None")
        names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and name.endswith(adaptation.targets)]
        if not names:
            raise ValueError(f"no layer of the {self.network_name} ends in {', '.join(adaptation.targets)}; give targets= that it has")
        config = LoraConfig(
            r=adaptation.rank,
            lora_alpha=adaptation.alpha or adaptation.rank,
            target_modules=list(adaptation.targets),
            init_lora_weights=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(adaptation.seed)
            module.add_adapter(config)
        self._layers = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = parameter.data.float()  # small steps vanish in half precision
        module.eval()

    # ---- what objectives see ----------------------------------------------------------------------------------------------------

    def denoiser(self) -> Denoiser:
        """The network as it learns; calls have a gradient wherever gradients are enabled."""
        return _Denoiser(self.backbone, self.backbone)

    def reference(self) -> Denoiser:
        """The network as it was; calls have no gradient."""
        return _Denoiser(self.backbone, _ReferenceBackbone(self))

    def as_backbone(self) -> Backbone:
        """The backbone with the policy's weights, for rollouts."""
        return self.backbone

    @contextmanager
    def reference_in_force(self) -> Iterator[None]:
        """Inside the block the network is the reference, without gradient."""
        with torch.no_grad():
            if self._copy is not None:
                trained = self.network
                setattr(self.backbone, self.network_name, self._copy)
                try:
                    yield
                finally:
                    setattr(self.backbone, self.network_name, trained)
                return
            try:
                for layer in self._layers:
                    layer.enable_adapters(False)
                yield
            finally:
                for layer in self._layers:
                    layer.enable_adapters(True)

    # ---- weights ----------------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """A copy of what learns."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def weight_distance(self) -> Float[Tensor, ""]:
        """||theta - theta_0||^2, the squared distance of all weights from the reference's, float32 and with gradient; of an adapter the
        size of its updates s B A, which are not formed: ||B A||^2 = sum of (B' B) * (A A').
        """
        if self._copy is not None:
            before = dict(self._copy.named_parameters())
            return torch.stack([(p - before[name]).float().square().sum() for name, p in self.parameters.items()]).sum()
        parts = []
        for layer in self._layers:
            for name, scale in layer.scaling.items():
                if name in layer.lora_A:
                    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                    parts.append(scale**2 * ((b.T @ b) * (a @ a.T)).sum())
        return torch.stack(parts).sum()

    @torch.no_grad()
    def draw_back(self, budget: float) -> float:
        """Scales the change of all weights so that its L2 norm is at most `budget`; returns the norm as it was."""
        distance = float(self.weight_distance().clamp_min(0).sqrt())
        if distance <= budget:
            return distance
        before = {} if self._copy is None else dict(self._copy.named_parameters())
        for name, parameter in self.parameters.items():
            if before:
                parameter.copy_(before[name] + (parameter - before[name]) * (budget / distance))
            elif "lora_B" in name:  # an adapter's change is B A, so one of the two is scaled
                parameter.mul_(budget / distance)
        return distance

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raises ValueError where names or shapes are not those of `weights()`."""
        fits = weights.keys() == self.parameters.keys() and all(weights[n].shape == p.shape for n, p in self.parameters.items())
        if not fits:
            raise ValueError(f"the weights do not fit: {len(weights)} tensors for {len(self.parameters)}, or other names and shapes; were "
                             "they made with the same pipeline, rank and targets?")  # fmt: skip
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """An ordinary LoRA, for `pipe.load_lora_weights(folder)` of the stock pipeline; the whole pipeline where all weights learned."""
        if self.adaptation.rank is None:
            self.backbone.save_pretrained(folder)
            return
        from peft import get_peft_model_state_dict

        layers = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(self.network).items()}
        (config,) = self.network.peft_config.values()  # alpha, which the tensors do not tell
        given = {"lora_layers": layers, "lora_adapter_metadata": config.to_dict()}
        self.backbone.save_lora_weights(folder, **{f"{self.network_name}_{name}": value for name, value in given.items()})


@dataclass(frozen=True)
class _Denoiser:
    """`inner` is the backbone with the weights in force; `backbone` the bare one."""

    backbone: Backbone
    inner: Any

    def __call__(
        self, x: Float[Tensor, "b ..."], timestep: Times, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Float[Tensor, "b ..."]:
        return self.inner.denoise(x, timestep, conditioning, guidance_scale)

    def as_backbone(self) -> Backbone:
        return self.inner


class _ReferenceBackbone:
    """A backbone whose network is the reference inside every call of `predict` and `denoise`."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy.backbone, name)

    def predict(
        self, x: Float[Tensor, "b ..."], timestep: Times, texts: Mapping[str, Tensor], conditioning: Conditioning
    ) -> Float[Tensor, "b ..."]:
        with self._policy.reference_in_force():
            return self._policy.backbone.predict(x, timestep, texts, conditioning)

    def denoise(
        self, x: Float[Tensor, "b ..."], timestep: Times, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Float[Tensor, "b ..."]:
        with self._policy.reference_in_force():
            return self._policy.backbone.denoise(x, timestep, conditioning, guidance_scale)


def _require_full_precision(module: nn.Module) -> None:
    half = sorted({str(p.dtype) for p in module.parameters() if p.dtype != torch.float32})
    if half:
        raise ValueError(f"all weights can be trained in float32 alone, and they are {', '.join(half)}; load the pipeline with "
                         "dtype='float32' (precision='bf16' still computes in half) or train an adapter")  # fmt: skip
