"""The training of experts (experts.py): the model's own samples are drawn, and each range learns on its predictions what became of them.

    train_experts(pipeline, reward, prompts, "runs/experts", steps=20, guidance_scale=3.0)

    x_T ... x_0 from DDIM(eta);  teacher  y = r(decode(x_0), p);  pupil  r_n(decode(x0 predicted at one step of range n), p)
    loss = Huber((r_n - y) / spread of y within prompts)

No data, no labels (Go et al. 2023, 2212.05973). What is reported is, on prompts that were held out, how well a score of the prediction
tells which noise of a prompt will end well: the correlation with the final score within prompts, of the plain reward and of the expert.

A run goes on where it was stopped: samples lie in files of one batch each, and a range that is done is not done again. All that is random
comes from (seed, batch) and (seed, range, step), so a run that was stopped ends with what one that was not ends with, to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.backbone import Backbone
from diffalign.diffusion import DDIM, Schedule
from diffalign.files import differing_settings, read_json, require_writable, whole_file, write_json
from diffalign.methods.checks import check_integer, check_number
from diffalign.methods.experts import Experts, check_bounds
from diffalign.methods.particles import noise_share
from diffalign.noise import seeded_noise
from diffalign.sampling import rollout
from diffalign.types import Reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertSettings:
    """How experts are trained."""

    bounds: tuple[float, ...] = (0.5, 0.85, 0.97)
    """Shares of noise between ranges; these quarter Stable Diffusion's timesteps. Paper: five equal ranges of timesteps."""
    rank: int = 8
    """Of the adapters, >= 1. Paper: 16."""
    scale: float = 1.0
    """Of their updates, > 0. Paper: 0.5."""
    samples: int = 4
    """Images of each prompt, >= 2: what is learned are the differences between them."""
    held_out: int = 5
    """Every so many-th prompt is held out for the figures, >= 2."""
    eta: float = 0.0
    """Of DDIM, in [0, 1]: above 0 the teacher's score is noisy, and its mean is what is learned: what FK steering wants to know."""
    steps: int = 200
    """Updates of each range, >= 1. Paper: 60,000."""
    batch_size: int = 16
    """Images of an update, and of a batch of samples, >= 1. Paper: 256."""
    lr: float = 1e-3
    """Of AdamW, > 0, linearly to 0. Paper: 1e-4."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        for name, least in (("rank", 1), ("samples", 2), ("held_out", 2), ("steps", 1), ("batch_size", 1)):
            check_integer(name, getattr(self, name), least)
        check_number("eta", self.eta, 0.0, 1.0)
        for name in ("scale", "lr"):
            check_number(name, getattr(self, name), 0.0, above=True)


@dataclass(frozen=True)
class Samples:
    """Finished samples and, for each range of noise, one prediction on the way."""

    predicted: UInt8[Tensor, "n r 3 h w"]
    """The clean image as predicted at one step of each range."""
    scores: Float[Tensor, " n"]
    """What the reward says of the finished image."""
    prompts: Int[Tensor, " n"]
    """The number of each sample's prompt."""


def train_experts(
    backbone: Backbone,
    reward: Reward,
    prompts: Sequence[str],
    out: str | Path,
    settings: ExpertSettings | None = None,
    *,
    steps: int,
    guidance_scale: float = 1.0,
) -> Experts:
    """Experts of `reward` for what `backbone` predicts of `prompts`, saved in `out` with report.json.

    steps, guidance_scale: the sampling that they are for. Raises ValueError for a range that no step falls into, a reward that has no
    gradient, fewer prompts than `held_out`, and an `out` that was begun with other settings.
    """
    settings, out = settings or ExpertSettings(), Path(out)
    if not reward.differentiable:
        raise ValueError("experts learn through the reward's gradient, and this reward has none")
    if len(prompts) < settings.held_out:
        raise ValueError(f"prompts must be at least held_out = {settings.held_out}, got {len(prompts)}")
    require_writable(out)
    facts = {**asdict(settings), "sampling_steps": steps, "guidance_scale": guidance_scale, "prompts": list(prompts)}
    begun = out / "settings.json"
    if begun.exists() and (changed := differing_settings(read_json(begun), facts)):
        raise ValueError(f"{out} was begun with other settings ({'; '.join(changed)[:200]}); choose another folder")
    write_json(begun, facts)
    experts = Experts(reward, settings.bounds, settings.rank, settings.scale, settings.seed)
    data = _collect(backbone, experts, prompts, out / "samples", settings, steps, guidance_scale)
    report = []
    for n in range(len(experts.weights)):
        path = out / f"range-{n}.safetensors"
        if path.exists():
            experts.weights[n] = {name: tensor.to(experts.weights[n][name].device) for name, tensor in load_file(path).items()}
        else:
            _fit(experts, n, data, prompts, settings)
            with whole_file(path) as temporary:
                save_file({name: tensor.contiguous().cpu() for name, tensor in experts.weights[n].items()}, temporary)
        report.append(_figures(experts, n, data, prompts, settings))
        logger.info(
            "range %d: correlation with the final score %.3f, of the plain reward %.3f", n, report[-1]["expert"], report[-1]["plain"]
        )
    experts.save(out)
    write_json(out / "report.json", {"ranges": report})
    return experts


# ---- samples -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _collect(
    backbone: Backbone, experts: Experts, prompts: Sequence[str], folder: Path, settings: ExpertSettings, steps: int, guidance_scale: float
) -> Samples:
    """`samples` of every prompt; those that `folder` has are not made again."""
    schedule = backbone.schedule(steps)
    by_range = steps_of_ranges(experts, schedule)
    pairs = [(p, k) for p in range(len(prompts)) for k in range(settings.samples)]
    parts = []
    for number, at in enumerate(range(0, len(pairs), settings.batch_size)):
        path = folder / f"{number:05d}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            chunk = pairs[at : at + settings.batch_size]
            part = _draw(backbone, experts.reward, prompts, chunk, schedule, by_range, settings, guidance_scale)
            with whole_file(path) as temporary:
                save_file({name: getattr(part, name).cpu().contiguous() for name in Samples.__dataclass_fields__}, temporary)
        parts.append(Samples(**load_file(path)))
    return Samples(*(torch.cat([getattr(part, name) for part in parts]) for name in Samples.__dataclass_fields__))


def _draw(
    backbone: Backbone,
    reward: Reward,
    prompts: Sequence[str],
    chunk: Sequence[tuple[int, int]],
    schedule: Schedule,
    by_range: Sequence[Sequence[int]],
    settings: ExpertSettings,
    guidance_scale: float,
) -> Samples:
    """One batch: sample k of prompt p begins at the noise that (seed + p, k) draws."""
    texts = [prompts[p] for p, _ in chunk]
    conditioning = backbone.encode(texts, unconditional=guidance_scale > 1)
    shape = backbone.noise_shape()
    noise = torch.cat([seeded_noise(shape, [settings.seed + p], k) for p, k in chunk])
    generators = [torch.Generator().manual_seed(1_000_003 * (settings.seed + p) + k) for p, k in chunk]
    noise = noise.to(next(iter(conditioning.tensors.values())).device)
    run = rollout(
        backbone, noise, conditioning, schedule, DDIM(settings.eta), guidance_scale=guidance_scale, generators=generators, keep=("x0",)
    )
    picks = torch.Generator().manual_seed(settings.seed + 7919 * (chunk[0][0] + 1))
    predicted = []
    for steps in by_range:
        chosen = torch.tensor(steps)[torch.randint(len(steps), (len(chunk),), generator=picks)]
        predicted.append(backbone.decode(torch.stack([run.x0[int(step)][j] for j, step in enumerate(chosen)])))
    reward.prepare(texts)
    scores = reward(backbone.decode(run.latents), texts).total.float()
    levels = (torch.stack(predicted, dim=1) * 255).round().to(torch.uint8)
    return Samples(levels, scores, torch.tensor([p for p, _ in chunk]))


def steps_of_ranges(experts: Experts, schedule: Schedule) -> list[list[int]]:
    """Which steps fall into each range. ValueError for a range without one."""
    found: list[list[int]] = [[] for _ in experts.weights]
    for step in range(schedule.steps):
        found[experts.range_of(noise_share(schedule, step))].append(step)
    empty = [n for n, steps in enumerate(found) if not steps]
    if empty:
        shares = ", ".join(f"{noise_share(schedule, step):.3f}" for step in range(schedule.steps))
        raise ValueError(f"no step falls into range {empty[0]} of bounds {experts.bounds}; the steps' shares of noise are {shares}")
    return found


# ---- learning ----------------------------------------------------------------------------------------------------------------


def _fit(experts: Experts, n: int, data: Samples, prompts: Sequence[str], settings: ExpertSettings) -> None:
    """Teaches expert n in place."""
    rows = ((data.prompts % settings.held_out != 0) & data.scores.isfinite()).nonzero().flatten()
    unit = within_prompts(data.scores[rows], data.prompts[rows]).std().clamp_min(1e-6)
    weights = experts.weights[n] = {name: tensor.detach().requires_grad_() for name, tensor in experts.weights[n].items()}
    device = next(iter(weights.values())).device
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=settings.steps)
    for step in range(settings.steps):
        draws = torch.Generator().manual_seed((settings.seed * 1009 + n) * 1_000_003 + step)
        batch = rows[torch.randint(len(rows), (settings.batch_size,), generator=draws)]
        with torch.enable_grad():
            told = _scored(experts, n, data, batch, prompts, device)
            loss = F.smooth_l1_loss(told / unit, data.scores[batch].to(device) / unit)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    experts.weights[n] = {name: tensor.detach() for name, tensor in weights.items()}


def _scored(experts: Experts, n: int, data: Samples, rows: Tensor, prompts: Sequence[str], device: torch.device) -> Float[Tensor, " k"]:
    images = data.predicted[rows, n].to(device).float() / 255
    with experts.in_force(n):
        return experts.reward(images, [prompts[int(data.prompts[row])] for row in rows]).total.float()


@torch.no_grad()
def _figures(experts: Experts, n: int, data: Samples, prompts: Sequence[str], settings: ExpertSettings) -> dict[str, Any]:
    """Of held-out prompts: how the prediction's score and the final one go together within prompts, plain and by the expert."""
    rows = ((data.prompts % settings.held_out == 0) & data.scores.isfinite()).nonzero().flatten()
    device = next(iter(experts.weights[n].values())).device
    plain, expert = [], []
    for part in rows.split(settings.batch_size):
        texts = [prompts[int(data.prompts[row])] for row in part]
        plain.append(experts.reward(data.predicted[part, n].to(device).float() / 255, texts).total.float().cpu())
        expert.append(_scored(experts, n, data, part, prompts, device).cpu())
    final = within_prompts(data.scores[rows], data.prompts[rows])
    told = {name: within_prompts(torch.cat(scores), data.prompts[rows]) for name, scores in (("plain", plain), ("expert", expert))}
    figures = {name: round(float(F.cosine_similarity(values, final, dim=0)), 4) for name, values in told.items()}
    return {"range": n, "bounds": [[0.0, *experts.bounds, 1.0][n + i] for i in (0, 1)], **figures, "samples": len(rows)}


def within_prompts(scores: Float[Tensor, " n"], prompts: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Each score less the mean of its prompt's."""
    _, number = prompts.unique(return_inverse=True)
    count = torch.zeros(int(number.max()) + 1).index_add_(0, number, torch.ones_like(scores))
    return scores - (torch.zeros_like(count).index_add_(0, number, scores) / count)[number]
