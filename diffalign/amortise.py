"""diffalign.train_noise: names become objects, prompts become a noise policy in a folder, with its card.

diffalign.train_noise(prompts, {"shapes-reward": 1.0}, pipeline="shapes-turbo", out="outputs/noise")
pipe(prompt, plugins=[diffalign.AmortisedNoise("outputs/noise")])
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.files import require_writable

if TYPE_CHECKING:
    from diffalign.training.loop import LoopSettings, Trained

STEPS, LR, BATCH_SIZE = 600, 1e-3, 32
"""About a quarter of an hour on one core, for the embedded model."""


def train_noise(
    prompts: Sequence[str],
    reward: Any,
    *,
    out: str | Path,
    pipeline: Any = "shapes-turbo",
    form: str = "residual",
    width: int = 192,
    blocks: int = 2,
    patch: int = 2,
    steps: int = STEPS,
    lr: float = LR,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    clip: float = 1.0,
    pull: float = 0.5,
    settings: LoopSettings | None = None,
    resume: bool = False,
    track: bool = False,
    device: Any = None,
    command: str | None = None,
) -> Trained:
    """Trains a policy of the initial noise over `prompts` and leaves it in `out`, with card.json and README.md, for `AmortisedNoise(out)`.

    reward: what load_reward takes, or a reward; it must have a gradient. pipeline: a name for load_pipeline, or a pipeline; it is frozen.
    form, width, blocks, patch: of the network (noise_policy.PolicyShape). clip, pull: of the objective (AmortiseNoise).
    steps, lr, batch_size, seed: of the loop; the learning rate falls to zero as a cosine. settings: replaces those four. resume: go on
    from `out`'s checkpoint; the result is that of a run that was never stopped. track: TensorBoard too.

    Raises ValueError for bad settings and for models without prompt_embeds, TypeError for a reward without gradient, and what
    load_pipeline, load_reward and the loop raise; each names the argument.
    """
    import torch

    from diffalign.hub import load_reward
    from diffalign.loading import load_pipeline
    from diffalign.methods.checks import no_gradient
    from diffalign.noise_policy import NoisePolicy, PolicyShape
    from diffalign.training import card, loop
    from diffalign.training.data import PromptData
    from diffalign.training.loop import LoopSettings
    from diffalign.training.objectives.noise import AmortiseNoise, NoiseLearner

    out = Path(out)
    require_writable(out)
    chosen = settings or LoopSettings(steps=steps, lr=lr, batch_size=batch_size, seed=seed, warmup=20, schedule="cosine")
    named = isinstance(pipeline, (str, Path))
    pipe = load_pipeline(pipeline, device=device) if named else pipeline
    pipe.set_progress_bar_config(disable=True)
    rewards = load_reward(reward, device=pipe.device) if isinstance(reward, (str, Mapping)) else reward
    if not rewards.differentiable:
        raise TypeError(f"{no_gradient(rewards)}, which amortised noise learns from")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    size = pipe.default_size()
    data = PromptData(prompts, pipe, device=pipe.device, seed=chosen.seed, size=size)
    rewards.prepare(list(dict.fromkeys(prompts)))
    text = data.take([0]).conditioning.conditional().get("prompt_embeds")
    if text is None:
        raise ValueError(f"pipeline: {type(pipe).__name__} gives its network no prompt_embeds, which a noise policy reads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        policy = NoisePolicy(PolicyShape(tuple(pipe.noise_shape(size)), text.shape[-1], form, patch, width, blocks)).to(pipe.device)
    learner = NoiseLearner(policy, pipe.noise_to_images)
    objective = AmortiseNoise(lambda images, texts: rewards(images, texts).total, clip=clip, pull=pull)
    source = str(pipeline) if named else str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    facts = {"prompts": len(prompts), "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]}
    weights = dict(reward) if isinstance(reward, Mapping) else str(getattr(reward, "name", reward))
    trained = loop.train(
        learner, objective, data, chosen, out, resume=resume, track=track,
        facts={"pipeline": source, "reward": weights, "policy": asdict(policy.shape), "data": facts},
    )  # fmt: skip
    policy.save(out)
    card.write(out, card.describe(
        trained, title=f"noise policy for {source}", base=source, device=pipe.device, data={**facts, "reward": weights},
        command=command or f"diffalign.train_noise(prompts, {weights!r}, pipeline={source!r}, out={str(out)!r})",
        usage=f'import diffalign\n\npipe = diffalign.load_pipeline("{source}")\n'
              f'image = pipe("...", plugins=[diffalign.AmortisedNoise("{out}")]).images[0]',
        settings={**asdict(chosen), "objective": {"name": objective.name, **objective.settings()}, "policy": asdict(policy.shape)},
    ))  # fmt: skip
    return trained
