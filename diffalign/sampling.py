"""rollout(): the denoising loop that we own, for everything that must stand inside it.

The stock pipelines' loops serve searches over the initial noise and guidance (pipelines/aligned.py). Training, steering by particles,
plug-in guidance and truncated back-propagation need more: the mean and the spread of every step, its log-probability, the prediction of
the clean image on the way, and leave to change what goes on. That is `on_step`:

    state = rollout(backbone, noise, conditioning, schedule, DDIM(eta=1), on_step=lambda s: s.take(resample(s.x0)))

The loop is differentiable in the noise and the weights wherever gradients are enabled, and equals the stock one on every family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from diffalign.backbone import Backbone, Conditioning
from diffalign.diffusion import DDIM, Sampler, Schedule, log_prob
from diffalign.guidance import GuidancePolicy
from diffalign.loop import LoopState, OnStep, Rollout

KEEP = ("states", "means", "x0", "log_probs")


def rollout(
    backbone: Backbone,
    noise: Float[Tensor, "b ..."],
    conditioning: Conditioning,
    schedule: Schedule,
    sampler: Sampler | None = None,
    *,
    guidance_scale: float = 1.0,
    policy: GuidancePolicy | None = None,
    on_step: OnStep | None = None,
    generators: Sequence[torch.Generator] | None = None,
    keep: Collection[str] = (),
    checkpoint: bool = False,
    first: int = 0,
    last: int | None = None,
) -> Rollout:
    """Denoise `noise` (unit variance, "b ...") along `schedule`; DDIM(eta=0) without a sampler.

    guidance_scale: w in u + w (c - u); up to 1 the unconditional branch is not evaluated. policy: decides that step by step instead
    (diffalign/guidance.py), one decision a sample. generators: one for each sample, for the noise of stochastic steps; a row that
    `on_step` repeats goes on with the generator of a row that was dropped, so copies part ways. keep: which of KEEP to return, with their
    graphs where gradients are enabled. checkpoint: recompute the network in the backward pass instead of storing its activations.
    first, last: only the steps first ... last - 1; with first > 0, `noise` is the state before that step, as in `states`.

    Raises ValueError: stochastic steps without generators; more rows after `on_step` than generators; rows changed under a policy; names
    that `keep` does not know.
    """
    unknown = sorted(set(keep) - set(KEEP))
    if unknown:
        raise ValueError(f"keep may name {', '.join(KEEP)}; got {', '.join(unknown)}")
    if len(noise) != len(conditioning):
        raise ValueError(f"noise holds {len(noise)} samples and conditioning {len(conditioning)}; give one for each")
    if generators is not None and len(generators) != len(noise):
        raise ValueError(f"generators holds {len(generators)} entries for {len(noise)} samples; give one for each")
    last = schedule.steps if last is None else last
    if not 0 <= first < last <= schedule.steps:
        raise ValueError(f"first and last must mark steps within 0..{schedule.steps}, got {first} and {last}")
    sampler = sampler or DDIM()
    rows, streams = tuple(range(len(noise))), list(range(len(noise)))
    evaluations = [0] * len(noise)
    x = sampler.begin(schedule, noise) if first == 0 else noise.float()
    out = Rollout(x, rows, evaluations, states=[x] if "states" in keep else [])
    given = conditioning

    for i in range(first, last):
        seen = sampler.model_input(schedule, i, x)
        output, cost = _evaluate(backbone, seen, schedule.timesteps[i], conditioning, guidance_scale, policy, i, checkpoint)
        for row, count in zip(rows, cost, strict=True):
            evaluations[row] += count
        step = sampler.step(schedule, i, x, output)
        after = step.mean
        if step.std > 0:
            after = after + step.std * _draw(after, generators, streams)
        state = LoopState(i, after, x, step.mean, step.std, step.x0, rows)
        changed = on_step(state) if on_step is not None else None
        if changed is not None:
            if len(changed.x) != len(changed.rows):
                raise ValueError(f"on_step returned {len(changed.x)} states for {len(changed.rows)} rows; re-index with state.take(...)")
            if changed.rows != rows:
                if policy is not None:
                    raise ValueError("on_step changed the rows, and a guidance policy decides for samples; use one or the other")
                streams = _reassigned(rows, changed.rows, streams, len(noise))
                conditioning = given.rows(changed.rows)
            state, rows = changed, changed.rows
        x = state.x
        _keep(out, keep, state)
    out.latents, out.rows = x, rows
    return out


def _evaluate(
    backbone: Backbone,
    x: Tensor,
    timestep: float,
    conditioning: Conditioning,
    guidance_scale: float,
    policy: GuidancePolicy | None,
    step: int,
    checkpoint: bool,
) -> tuple[Tensor, list[int]]:
    """The guided output, and how many evaluations each row cost."""

    def run(call: Callable[..., Tensor], *args: object) -> Tensor:
        return checkpointed(call, *args, use_reentrant=False) if checkpoint and torch.is_grad_enabled() else call(*args)

    if policy is None:
        cost = 2 if guidance_scale > 1 else 1
        return run(backbone.denoise, x, timestep, conditioning, guidance_scale), [cost] * len(x)
    plan = list(policy.plan(step))
    if len(plan) != len(x):
        raise ValueError(f"the policy planned {len(plan)} samples, and {len(x)} are being made")

    def branch(wanted: str) -> Tensor:
        chosen = [j for j, branches in enumerate(plan) if branches in ("both", wanted)]
        part = conditioning.rows(chosen)
        texts = part.conditional() if wanted == "conditional" else part.unconditional()
        at = x[torch.as_tensor(chosen, device=x.device, dtype=torch.long)]
        return run(backbone.predict, at, timestep, texts, part) if chosen else at

    c, u = policy.complete(step, x, branch("conditional"), branch("unconditional"))
    return u + guidance_scale * (c - u), [2 if branches == "both" else 1 for branches in plan]


def _draw(like: Tensor, generators: Sequence[torch.Generator] | None, streams: Sequence[int]) -> Tensor:
    """Unit noise for every row, from its own generator, on the generator's device as diffusers draws it."""
    if generators is None:
        raise ValueError("this sampler draws noise at every step; pass generators, one for each sample")
    noise = [torch.randn(like[0].shape, generator=generators[j], device=generators[j].device) for j in streams]
    return torch.stack(noise).to(like.device)


def _reassigned(rows: Sequence[int], kept: Sequence[int], streams: Sequence[int], count: int) -> list[int]:
    """The generator of every row that goes on: its first copy keeps its own, further copies take those that became free."""
    if len(kept) > count:
        raise ValueError(f"on_step returned {len(kept)} rows for {count} samples; start with as many samples as there will be rows")
    owners: dict[int, list[int]] = {}
    for row, stream in zip(rows, streams, strict=True):
        owners.setdefault(row, []).append(stream)
    assigned = [owners[row].pop(0) if owners.get(row) else None for row in kept]
    free = [stream for stream in range(count) if stream not in assigned]
    return [free.pop(0) if stream is None else stream for stream in assigned]


def _keep(out: Rollout, keep: Collection[str], state: LoopState) -> None:
    out.stds.append(state.std)
    if "states" in keep:
        out.states.append(state.x)
    if "means" in keep:
        out.means.append(state.mean)
    if "x0" in keep:
        out.x0.append(state.x0)
    if "log_probs" in keep:
        out.log_probs.append(log_prob(state.x, state.mean, state.std) if state.std > 0 else None)
