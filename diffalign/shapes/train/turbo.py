"""`shapes-turbo`: one step, distilled from `shapes` by distribution matching (DMD, Yin et al., arXiv 2311.18828).

The student maps noise to a latent in one evaluation at t = 999. Two terms move it:
  regression   ||G(z, c) - x0(z, c)||^2 against the teacher's own DDIM result from the same noise (few pairs, made once);
  matching     the gradient of KL(student || teacher) at a noised student sample, (x0_fake - x0_teacher) / mean|x0_student - x0_teacher|
               (their eq. 7-8 written for x0), the teacher guided, the fake score a copy that learns the student's own samples.
The student predicts the sample itself (prediction_type "sample"): at t = 999 an eps-prediction would be amplified fifteenfold.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from diffalign.diffusion import add_noise, from_x0, to_x0
from diffalign.rules import RELATIONS
from diffalign.shapes.train import base, data, loop

LAST = 999  # the student's only timestep
SCENES = 8_000  # drawn for their captions


@dataclass(frozen=True)
class TurboConfig:
    """guidance: the teacher's. pairs / pair_steps: how many teacher results the regression sees and their DDIM steps.
    warm_steps: updates on the regression alone. batch / pair_batch: fresh noises and teacher pairs in every later update."""

    guidance: float = 4.5
    pairs: int = 2048
    pair_steps: int = 6
    warm_steps: int = 250
    regression_weight: float = 0.25
    fake_lr: float = 4e-4
    batch: int = 24
    pair_batch: int = 8


CONFIG = loop.LoopConfig(steps=2200, lr=3e-4, seed=14, ema_decay=0.99, warmup=50)


@dataclass
class Teacher:
    """The guided multi-step model: predicts x0 and runs DDIM."""

    unet: UNet2DConditionModel
    states: Float[Tensor, "n l d"]
    empty: Float[Tensor, "l d"]
    guidance: float
    scheduler: DDIMScheduler

    @torch.no_grad()
    def x0(self, noisy: Tensor, t: Int[Tensor, " b"], rows: Tensor) -> Tensor:
        states = self.states[rows]
        both = torch.cat([self.empty.expand_as(states), states])
        unconditional, conditional = self.unet(noisy.repeat(2, 1, 1, 1), t.repeat(2), both).sample.chunk(2)
        eps = unconditional + self.guidance * (conditional - unconditional)
        return to_x0(noisy, eps, *levels(self.scheduler, t), "epsilon")

    @torch.no_grad()
    def ddim(self, noise: Tensor, rows: Tensor, steps: int) -> Tensor:
        scheduler = base.build_scheduler()
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            times = t.to(x.device).expand(len(x))
            eps = from_x0(x, self.x0(x, times, rows), *levels(scheduler, times), "epsilon")
            x = scheduler.step(eps, t, x).prev_sample
        return x


def levels(scheduler: DDIMScheduler, t: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
    """Signal and noise of each sample's timestep, on the timesteps' device."""
    alphas = scheduler.alphas_cumprod.to(t.device)[t]
    return alphas.sqrt(), (1 - alphas).sqrt()


def telling(captions: list[str]) -> str:
    """The first short caption of a scene that says where things stand, which is the hardest to learn; the first one where none does."""
    return next((c for c in captions[:-1] if any(r in c for r in RELATIONS)), captions[0])


def teacher_pairs(path: Path, teacher: Teacher, config: TurboConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(noise, x0, caption rows) of the teacher's DDIM results, on the CPU; made batch by batch, kept in one file that resumes."""
    stored = load_file(path) if path.exists() else {}
    results = list(stored["x0"].split(64)) if stored else []
    noises, rows = [], []
    for i in tqdm(range(config.pairs // 64), desc="teacher pairs", mininterval=5):
        generator = torch.Generator().manual_seed(seed * 7919 + i)
        noises.append(torch.randn(64, 8, 8, 8, generator=generator))
        rows.append(torch.randint(len(teacher.states), (64,), generator=generator))
        if i < len(results):
            continue
        results.append(teacher.ddim(noises[i].to(teacher.states.device), rows[i], config.pair_steps).cpu())
        if i % 16 == 15 or i == config.pairs // 64 - 1:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"x0": torch.cat(results)}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
    return torch.cat(noises), torch.cat(results), torch.cat(rows)


def train(
    run: Path,
    unet: UNet2DConditionModel,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    config: loop.LoopConfig = CONFIG,
    turbo: TurboConfig = TurboConfig(),
    scenes: int = SCENES,
    device: str = "cpu",
) -> UNet2DConditionModel:
    """Distil (or resume); returns the averaged one-step U-Net. The text encoder stays the teacher's.

    The networks given are moved to the device. What is random is drawn on the CPU, so that runs repeat anywhere.
    """
    torch.manual_seed(config.seed)
    unet, encoder = unet.to(device), encoder.to(device)
    captions = data.draw(scenes, config.seed).captions
    ids = data.tokenize(tokenizer, [[telling(group)] for group in captions])[:, 0]
    with torch.no_grad():
        states = torch.cat([encoder(part.to(device)).last_hidden_state for part in ids.split(512)])
        empty = encoder(data.tokenize(tokenizer, [[""]])[0].to(device)).last_hidden_state[0]
    scheduler = base.build_scheduler()
    teacher = Teacher(unet.eval().requires_grad_(False), states, empty, turbo.guidance, scheduler)
    noises, targets, pair_rows = teacher_pairs(run / "pairs.safetensors", teacher, turbo, config.seed)

    student = copy.deepcopy(unet).requires_grad_(True)
    nn.init.zeros_(student.conv_out.weight)  # its output changes meaning, from eps to x0
    nn.init.zeros_(student.conv_out.bias)
    fake = copy.deepcopy(unet).requires_grad_(True)
    trainee = loop.Trainee({"student": student}, config, run / "turbo.safetensors")
    critic = loop.Trainee({"fake": fake}, replace(config, lr=turbo.fake_lr), run / "turbo_fake.safetensors")

    def noised(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x0 at a random time each: (noisy, t, the noise)."""
        t = torch.randint(20, 980, (len(x0),), generator=generator).to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        return add_noise(x0, eps, *levels(scheduler, t)), t, eps

    def update_fake(x0: Tensor, rows: Tensor, generator: torch.Generator, step: int) -> None:
        noisy, t, eps = noised(x0, generator)
        error = F.mse_loss(fake(noisy, t, states[rows]).sample, eps, reduction="none").mean(dim=(1, 2, 3))
        loss = (error * base.min_snr_weight(scheduler.alphas_cumprod.to(device)[t])).mean()
        critic.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(fake.parameters(), 1.0)
        critic.optimizer.step()
        critic.step = step + 1

    def loss_of(step: int, generator: torch.Generator):
        warm = step < turbo.warm_steps
        fresh = 0 if warm else turbo.batch
        pick = torch.randint(len(noises), (turbo.batch + turbo.pair_batch - fresh,), generator=generator)
        noise = torch.cat([torch.randn(fresh, *noises.shape[1:], generator=generator), noises[pick]]).to(device)
        rows = torch.cat([torch.randint(len(states), (fresh,), generator=generator), pair_rows[pick]])
        x0 = student(noise, torch.full((len(noise),), LAST, device=device), states[rows]).sample
        regression = F.mse_loss(x0[fresh:], targets[pick].to(device))
        if warm:
            return regression, {"regression": regression.item()}
        x0, rows = x0[:fresh], rows[:fresh]
        update_fake(x0.detach(), rows, generator, step)
        with torch.no_grad():
            noisy, t, _ = noised(x0, generator)
            real = teacher.x0(noisy, t, rows)
            imagined = to_x0(noisy, fake(noisy, t, states[rows]).sample, *levels(scheduler, t), "epsilon")
            direction = (imagined - real) / (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
        matching = 0.5 * F.mse_loss(x0, x0.detach() - direction)
        figures = {"direction": direction.square().mean().item(), "regression": regression.item()}
        return matching + turbo.regression_weight * regression, figures

    loop.train(trainee, loss_of, "shapes-turbo", companions=(critic,))
    trainee.use_average()
    return student.eval()
