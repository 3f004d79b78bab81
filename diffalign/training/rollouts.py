"""Trajectories to learn from: several images of every prompt, with the states, log-probabilities and scores of the policy that made them.

A denoising run is read as a sequence of decisions: at step i, in state x_i, the policy draws
x_{i+1} ~ N(m_i, std_i^2 I), and only m_i depends on its weights. DDPO, DPOK, Flow-GRPO, D3PO and
Parrot differ in what they do with

    l_i = ln p_now(x_{i+1} | x_i) - ln p_then(x_{i+1} | x_i)      nats, summed over the D entries of a sample
    k_i = |m_now - m_reference|^2 / 2 std_i^2                     nats: the KL divergence of two steps of the same std

and share everything else, which is here. `l_i` is exactly 0 before the first update, on every
machine where a network gives the same output for the same input: images are evaluated in the
batches in which they were made, with guidance inside, by one formula.

- Noise: image k of a prompt depends on the prompt's seed and k alone: not on other prompts, on the
  number of images, on batch_size.
- Stochastic steps: those inside `window` whose std is above 0. Outside it the deterministic DDIM
  step is taken (Euler's, for flows), as MixGRPO does. The step that ends at a clean image is always
  deterministic, also for the flow SDE, whose rule would leave noise in the image.
- Memory: states of stochastic steps alone are kept. In the loss, `trained` bounds the number of
  steps in one graph; `checkpoint` makes the graph that of one evaluation.

What the caller owes: the policy in eval mode (dropout would move l_i), and the same autocast in
`make` and in `step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from diffalign.backbone import Backbone, Conditioning
from diffalign.diffusion import DDIM, FlowSDE, Sampler, Schedule, Step, log_prob
from diffalign.sampling import rollout
from diffalign.training.contract import Denoiser, PromptBatch, ScoreImages

Rewards = ScoreImages | Mapping[str, ScoreImages]
"""One reward, or several by name."""


@dataclass(frozen=True)
class Trajectories:
    """What a policy made of a batch of prompts: n images, those of one prompt side by side."""

    conditioning: Conditioning
    """One row for each image."""
    groups: Int[Tensor, " n"]
    """Which prompt of the batch each image belongs to."""
    schedule: Schedule
    steps: tuple[int, ...]
    """The stochastic steps, ascending: the decisions."""
    states: Mapping[int, Float[Tensor, "n ..."]]
    """x_i and x_{i+1} for every i of `steps`, by the number of the step that starts from them."""
    log_probs: Mapping[int, Float[Tensor, " n"]]
    """Of every decision under the policy that made it, nats, by step."""
    latents: Float[Tensor, "n ..."]
    """Clean latents."""
    evaluations: int
    """Of the network, that all images together cost."""

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def entries(self) -> int:
        """D: numbers in one sample."""
        return self.latents[0].numel()

    def row(self, group: int, image: int) -> int:
        """Where image number `image` of a prompt stands. IndexError where there is none."""
        rows = (self.groups == group).nonzero().flatten().tolist()
        if not 0 <= image < len(rows):
            raise IndexError(f"group {group} holds {len(rows)} images, and there is no number {image}")
        return rows[image]

    def take(self, rows: Sequence[int]) -> Trajectories:
        """The images `rows`, in that order. Their batches differ from those they were made in, so l_i begins near 0, not at it."""
        chosen = torch.as_tensor(list(rows), dtype=torch.long, device=self.latents.device)
        return Trajectories(self.conditioning.rows(rows), self.groups[chosen], self.schedule, self.steps,
                            {i: x[chosen] for i, x in self.states.items()}, {i: each[chosen] for i, each in self.log_probs.items()},
                            self.latents[chosen], self.evaluations * len(rows) // len(self))  # fmt: skip


@dataclass(frozen=True)
class Window(Sampler):
    """`inner` at steps first ... last - 1 that do not end at a clean image; deterministic DDIM elsewhere."""

    inner: Sampler
    first: int
    last: int

    def step(self, schedule: Schedule, i: int, x: Float[Tensor, "b ..."], output: Float[Tensor, "b ..."]) -> Step:
        inside = self.first <= i < self.last and schedule.noise[i + 1] > 0
        return (self.inner if inside else DDIM()).step(schedule, i, x, output)


@dataclass(frozen=True)
class Rollouts:
    """How trajectories are made and evaluated again."""

    images: int = 8
    """Of every prompt, >= 1; objectives that compare need 2, and groups below 16 teach noisily. D3PO: 2 or 7, Flow-GRPO: 24."""
    steps: int | None = None
    """Of the schedule, >= 1; None: the model's own. DDPO, Parrot: 50, D3PO: 20, Flow-GRPO: 10."""
    sampler: Literal["ddim", "flow_sde"] = "ddim"
    """Rule of the stochastic steps; "flow_sde" for flow models alone."""
    eta: float = 1.0
    """How noisy they are, > 0: DDIM's eta, at most 1 (DDPO, D3PO: 1), or the flow SDE's scale (Flow-GRPO: 0.7)."""
    guidance_scale: float = 1.0
    """w in u + w (c - u), in rollouts and in the loss alike; up to 1: none. DDPO, D3PO, Parrot: 5, Flow-GRPO: 4.5."""
    window: tuple[int, int] | None = None
    """Steps first ... last - 1 may be stochastic; None: all. MixGRPO: 4 of 25."""
    trained: int | None = None
    """Stochastic steps that one loss looks at, >= 1, drawn anew each time; None: all."""
    shared_noise: bool = False
    """All images of a prompt begin at the same noise. D3PO, DanceGRPO: yes."""
    batch_size: int | None = None
    """Images in one evaluation of the network, >= 1; None: all. Memory and speed only."""
    checkpoint: bool = False
    """Evaluate the network again in the backward pass instead of storing its activations. Memory for time."""

    def __post_init__(self) -> None:
        for name in ("images", "steps", "trained", "batch_size"):
            value = getattr(self, name)
            if (value is None and name != "images") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                continue
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.sampler not in ("ddim", "flow_sde"):
            raise ValueError(f"sampler must be 'ddim' or 'flow_sde', got {self.sampler!r}")
        if not self.eta > 0 or (self.sampler == "ddim" and self.eta > 1):
            raise ValueError(f"eta must be above 0, and for 'ddim' at most 1, got {self.eta}; without noise there is no decision to learn")
        if self.window is not None and not 0 <= self.window[0] < self.window[1]:
            raise ValueError(f"window must be (first, last) with 0 <= first < last, got {self.window}")

    def rule(self, schedule: Schedule) -> Sampler:
        """The sampler of a run along `schedule`."""
        first, last = self.window or (0, schedule.steps)
        return Window(DDIM(self.eta) if self.sampler == "ddim" else FlowSDE(self.eta), first, last)

    @torch.no_grad()
    def make(self, policy: Denoiser, batch: PromptBatch) -> Trajectories:
        """`images` images of every prompt. ValueError where no step is stochastic."""
        backbone, size = policy.as_backbone(), batch.conditioning.size
        conditioning = batch.conditioning.rows([prompt for prompt in range(len(batch)) for _ in range(self.images)])
        schedule = backbone.schedule(self.steps, size=size)
        who = [(seed, image) for seed in batch.seeds for image in range(1, self.images + 1)]
        made = []
        for part in self._parts(len(who)):
            starts = [_generator(seed, 0 if self.shared_noise else image, 0) for seed, image in who[part]]
            draws = [_generator(seed, image, 1) for seed, image in who[part]]
            made.append(rollout(backbone, backbone.draw_noise(starts, size), _rows(conditioning, part), schedule, self.rule(schedule),
                                guidance_scale=self.guidance_scale, generators=draws, keep=("states", "log_probs")))  # fmt: skip
        steps = tuple(i for i, std in enumerate(made[0].stds) if std > 0)
        if not steps:
            raise ValueError(f"no step within window {self.window} of a schedule of {schedule.steps} is stochastic; the step to a clean "
                             "image never is: take more steps, or another window")  # fmt: skip
        kept = sorted({*steps, *(i + 1 for i in steps)})
        latents = torch.cat([out.latents for out in made])
        return Trajectories(
            conditioning,
            torch.arange(len(batch), device=latents.device).repeat_interleave(self.images),
            schedule,
            steps,
            {i: torch.cat([out.states[i] for out in made]) for i in kept},
            {i: torch.cat([out.log_probs[i] for out in made]) for i in steps},
            latents,
            sum(sum(out.evaluations) for out in made),
        )

    @torch.no_grad()
    def score(self, backbone: Backbone, trajectories: Trajectories, rewards: Rewards) -> Float[Tensor, "n k"]:
        """Every image under every reward, float32 on the latents' device; may hold what is not finite."""
        names, device = as_rewards(rewards), trajectories.latents.device
        table = []
        for part in self._parts(len(trajectories)):
            images = backbone.decode(trajectories.latents[part], trajectories.conditioning.size)
            prompts = list(trajectories.conditioning.prompts[part])
            columns = [torch.as_tensor(score(images, prompts)).to(device, torch.float32) for score in names.values()]
            for name, column in zip(names, columns, strict=True):
                if column.shape != (len(prompts),):
                    raise ValueError(f"{name} gave scores of shape {tuple(column.shape)} for {len(prompts)} images; one for each is needed")
            table.append(torch.stack(columns, dim=1))
        return torch.cat(table)

    def step(self, denoiser: Denoiser, trajectories: Trajectories, i: int) -> Step:
        """Where `denoiser` would go at step i from the states that were visited; differentiable where gradients are enabled."""
        schedule, rule, x = trajectories.schedule, self.rule(trajectories.schedule), trajectories.states[i]
        outputs = []
        for part in self._parts(len(x)):
            arguments = (x[part], schedule.timesteps[i], _rows(trajectories.conditioning, part), self.guidance_scale)
            again = self.checkpoint and torch.is_grad_enabled()
            outputs.append(checkpointed(denoiser, *arguments, use_reentrant=False) if again else denoiser(*arguments))
        return rule.step(schedule, i, x, outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def chosen(self, trajectories: Trajectories, generator: torch.Generator) -> tuple[int, ...]:
        """The steps that one loss looks at: `trained` of the stochastic ones without repetition, ascending."""
        steps = trajectories.steps
        if self.trained is None or self.trained >= len(steps):
            return steps
        drawn = torch.randperm(len(steps), generator=generator, device=generator.device)[: self.trained]
        return tuple(steps[j] for j in sorted(drawn.tolist()))

    def _parts(self, count: int) -> list[slice]:
        size = self.batch_size or max(count, 1)
        return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def log_ratio(step: Step, trajectories: Trajectories, i: int, before: Float[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
    """l_i in nats: of the decision taken at step i under `step`, against `before`, or else against the policy that took it."""
    return log_prob(trajectories.states[i + 1], step.mean, step.std) - (trajectories.log_probs[i] if before is None else before)


def step_kl(step: Step, reference: Step) -> Float[Tensor, " n"]:
    """k_i in nats of each sample: KL(step || reference), which share their std."""
    return (step.mean - reference.mean).square().flatten(1).sum(1) / (2 * step.std**2)


def as_rewards(rewards: Rewards) -> Mapping[str, ScoreImages]:
    """Rewards by name; a single one is called "reward"."""
    named = rewards if isinstance(rewards, Mapping) else {"reward": rewards}
    if not named:
        raise ValueError("rewards is empty; give at least one")
    return named


def finite_rows(scores: Float[Tensor, "n k"]) -> Bool[Tensor, " n"]:
    """Which images have a finite score in every reward: the only ones that may be compared with others."""
    return scores.isfinite().all(1)


def score_figures(scores: Float[Tensor, "n k"], names: Sequence[str]) -> dict[str, float]:
    """To log: the mean of each reward over the images that have one, and the share of those that have none."""
    known = finite_rows(scores)
    means = scores[known].mean(0).tolist() if known.any() else [float("nan")] * len(names)
    return {**{f"score/{name}": mean for name, mean in zip(names, means, strict=True)}, "broken": 1 - float(known.float().mean())}


def _rows(conditioning: Conditioning, part: slice) -> Conditioning:
    whole = part.stop - part.start == len(conditioning)
    return conditioning if whole else conditioning.rows(range(part.start, part.stop))


def _generator(seed: int, *path: int) -> torch.Generator:
    """A stream of its own for every (seed, path), however close the numbers."""
    hashed = int(np.random.SeedSequence(seed % 2**64, spawn_key=path).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(hashed)
