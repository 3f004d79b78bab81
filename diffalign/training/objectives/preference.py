"""Preference pairs: one kernel, and Diffusion-DPO, which is the kernel on noised images.

Paper: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", CVPR 2024
(2311.12908).

The policy is to explain the better image of a pair better than the reference does, by more than it
does for the worse one:

    x = a x0 + s eps                         one t and one eps for both images of a pair
    e(net) = mean (net(x, t, c) - target)^2  over a sample's entries; target: what a network of its
                                             kind is trained to predict for (x0, eps)
    logit = -(beta / 2) [ (e_w(policy) - e_w(reference)) - (e_l(policy) - e_l(reference)) ]
    loss  = -ln sigmoid(logit)

The paper writes -beta T omega(lambda_t) [...] on sums of squares. As in its code, T and omega are in
beta here, and errors are means: for d entries beta stands for 2 d T omega times the beta of that
formula, and means the same at every size.

What varies from paper to paper stands outside the kernel. Where x and eps come from is a
`StateProvider`: here noise, in inpo.py the model's own inversion. What each image is described by is
the batch's, `losers_conditioning`; see dcpo.py. The two do not know each other.

How much each t counts: the paper weighs errors in eps alike. We weigh those of what the network
predicts alike, which is the same for eps networks; `space` has the paper's for v and flow ones. What
the two make of low and high noise is said in diffalign/training/denoising.py.

Labels are the pairs' own, from people mostly. SmPO's soft ones (Lu et al., ICML 2025, 2506.02698)
are weights of the logit; see `score_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.training.contract import Denoiser, PairBatch
from diffalign.training.denoising import SPACES, StateProvider, errors, forward_noise, in_one_batch

FORMS = ("sigmoid", "ipo", "hinge")


@dataclass(frozen=True)
class DPO:
    """DPO(beta=2000)."""

    name: ClassVar[str] = "dpo"

    beta: float = 2000.0
    """beta > 0: how little the policy may leave the reference. Paper's code: 5000; flow models, whose errors are larger: 100 to 2000."""
    form: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """-ln sigmoid(logit), (logit - 1/2)^2 or max(0, 1 - logit). Paper: sigmoid. ipo is IPO's loss times beta^2, which keeps its scale."""
    label_smoothing: float = 0.0
    """In [0, 0.5): the share of labels that are taken to be wrong. Paper: 0."""
    anchor: float = 0.0
    """>= 0: adds this times the policy's error on the winner, which keeps that from growing. Paper: 0."""
    space: Literal["network", "epsilon", "x0"] = "network"
    """What the errors are of: the network's own output, eps, or x0 (not for eps networks without a last signal). Paper: epsilon."""
    weights_on: Literal["loss", "logit"] = "loss"
    """What a pair's weight multiplies; the logit for `score_weights`."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta!r}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing!r}")
        if not self.anchor >= 0:
            raise ValueError(f"anchor must be at least 0, got {self.anchor!r}")
        for name, known in (("form", FORMS), ("space", SPACES), ("weights_on", ("loss", "logit"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def paper(cls) -> DPO:
        """As the released launchers set it, for SD 1.5 and SDXL; they also drop every fifth prompt (`PairData`, drop_prompts)."""
        return cls(beta=5000.0, space="epsilon")

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def collect(self, policy: Denoiser, batch: PairBatch, generator: torch.Generator) -> PairBatch:
        return batch

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        return self.compare(policy, reference, batch, generator, forward_noise)

    def compare(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, generator: torch.Generator, states: StateProvider
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        """The kernel. One call of the policy and one of the reference, on both images of every pair at once."""
        samples = in_one_batch(batch, policy.backbone, generator)
        with torch.no_grad():
            x, eps = states(policy, reference, samples, generator)
            known = errors(reference, samples, x, eps, self.space)
        learned = errors(policy, samples, x, eps, self.space)
        winner, loser = (learned - known).chunk(2)
        logits = -self.beta / 2 * (winner - loser)
        weights = None if batch.weights is None else batch.weights.to(logits)
        if weights is not None and self.weights_on == "logit":
            logits = logits * weights
        losses = preference_loss(logits, self.form, self.label_smoothing) + self.anchor * learned.chunk(2)[0]
        if weights is not None and self.weights_on == "loss":
            losses = losses * weights
        figures = {
            "implicit_accuracy": accuracy(logits),
            "margin": logits.mean().item(),
            "winner_drift": winner.mean().item(),
            "loser_drift": loser.mean().item(),
            "winner_error": learned.chunk(2)[0].mean().item(),
        }
        return losses.mean(), figures


# ---- mathematics -------------------------------------------------------------------------------------------------------------


def preference_loss(logits: Float[Tensor, " b"], form: str = "sigmoid", label_smoothing: float = 0.0) -> Float[Tensor, " b"]:
    """Of each pair. Smoothed, it is the expectation over labels that are wrong with that probability."""

    def of(z: Tensor) -> Tensor:
        if form == "sigmoid":
            return -logsigmoid(z)
        return (z - 0.5).square() if form == "ipo" else (1 - z).clamp_min(0)

    return (1 - label_smoothing) * of(logits) + label_smoothing * of(-logits) if label_smoothing else of(logits)


def accuracy(logits: Float[Tensor, " b"]) -> float:
    """The share of pairs that are ordered as labelled; an undecided one counts half."""
    return (0.5 * (logits.detach().sign() + 1)).mean().item()


def score_weights(
    winner_scores: Float[Tensor, " b"], loser_scores: Float[Tensor, " b"], scale: float = 0.1666, gamma: float = 10.0
) -> Float[Tensor, " b"]:
    """SmPO's weights gamma (2 p - 1), p = sigmoid(difference / scale), for `weights_on="logit"`; 0 where a judge sees no difference.

    Where the judge prefers the loser, the weight is negative, which is the same as swapping the two. `scale` is the reward's range over
    the data; the default is PickScore's as the paper's code divides it.
    """
    return gamma * torch.tanh((winner_scores - loser_scores) / scale / 2)
