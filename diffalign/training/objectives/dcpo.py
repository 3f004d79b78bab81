"""DCPO: each image of a preference pair is explained by a caption of its own.

Paper: Saeidi et al., "Dual Caption Preference Optimization for Diffusion Models", TMLR 2025
(2502.06023).

The two images of a pair often fit their one prompt about equally well, and it describes neither; the
error that is to rise on the loser then rises for the text that the winner has too. So the winner is
denoised under z_w and the loser under z_l, by both networks:

    logit = -(beta / 2) [ (e_w(policy; z_w) - e_w(reference; z_w)) - (e_l(policy; z_l) - e_l(reference; z_l)) ]

Nothing else changes: with z_w = z_l it is the objective that it stands on, to the bit. That is DPO
in the paper; any that compares pairs will do, InPO too, which then inverts each image along its own
caption (not published).

z_w -> `PairBatch.conditioning`, z_l -> `PairBatch.losers_conditioning`. Where captions come from is
not the loss's matter. The paper's are a vision-language model's of each image (c), the prompt and a
paraphrase of it (p), or the model's caption and a paraphrase of one (h, best).

The public code has eps as the target of networks that predict v, and uses one caption for SDXL; here
every prediction and every family is served. By the paper's own control, better captions alone, z_w
for both images, give about half of its gain on GenEval; compare with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.training.contract import Denoiser, PairBatch
from diffalign.training.objectives.inpo import InPO
from diffalign.training.objectives.preference import DPO


@dataclass(frozen=True)
class DCPO:
    """DCPO(DPO(beta=2000)) or DCPO(InPO(...))."""

    name: ClassVar[str] = "dcpo"

    objective: DPO | InPO = field(default_factory=DPO)
    """What compares the pairs. Paper: DPO."""

    @classmethod
    def paper(cls) -> DCPO:
        """beta of the paper's tables; its script has 500, which its sweep finds better on HPSv2.1 and GenEval."""
        return cls(DPO(beta=5000.0, space="epsilon"))

    @classmethod
    def of_inpo(cls) -> DCPO:
        """InPO's latents, each image's along its own caption. Not published."""
        return cls(InPO())

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "objective": self.objective.settings()}

    def collect(self, policy: Denoiser, batch: PairBatch, generator: torch.Generator) -> PairBatch:
        return batch

    def loss(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        """Raises ValueError for pairs whose losers have no captions. `same_captions`: the share of pairs that only have one text."""
        if batch.losers_conditioning is None:
            raise ValueError("losers_conditioning is None, and DCPO needs a caption for each image; give the losers theirs, or use DPO")
        loss, figures = self.objective.loss(policy, reference, batch, generator)
        same = [w == z for w, z in zip(batch.conditioning.prompts, batch.losers_conditioning.prompts, strict=True)]
        return loss, {**figures, "same_captions": sum(same) / len(same)}
