"""The stages of the shapes world's training: each reads what earlier ones left under the job's two folders, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import CLIPTokenizer

from diffalign.reward_models.shapes_captioner import Captioner
from diffalign.shapes import prompts
from diffalign.shapes.train import (
    autoencoder,
    base,
    card,
    data,
    evaluate,
    export,
    flow,
    loop,
    rewards,
    rewards_captioner,
    rewards_captioner_tune,
    rewards_judged,
    rewards_watch,
    text,
    turbo,
)
from diffalign.shapes.train.plan import Plan

COMMAND = "python -m diffalign.shapes.train"


@dataclass(frozen=True)
class Job:
    """What a stage is given."""

    run: Path  # holds training states and unfinished parts
    weights: Path  # holds the finished models
    device: str = "cpu"
    plan: Plan = field(default_factory=Plan)
    flags: str = ""  # what the command line says beside the stages, for the cards


def train_autoencoder(job: Job) -> None:
    model = autoencoder.train(job.run, job.plan.vae, scenes=job.plan.vae_scenes, device=job.device)
    export.save(model, job.run / "vae")


def train_decoder(job: Job) -> None:
    vae = export.load_autoencoder(job.run)
    model = autoencoder.train_decoder(job.run, vae, job.plan.decoder, scenes=job.plan.vae_scenes, device=job.device)
    export.save(model, job.run / "vae")


def train_text(job: Job) -> None:
    tokenizer = text.build_tokenizer()
    encoder = text.train(job.run, tokenizer, job.plan.encoder, captions=job.plan.captions, device=job.device)
    export.save(tokenizer, job.run / "tokenizer")
    export.save(encoder, job.run / "text_encoder")


def train_base(job: Job) -> None:
    vae, tokenizer, encoder = export.load_parts(job.run)
    unet = base.train(job.run, vae, tokenizer, encoder, job.plan.unet, scenes=job.plan.unet_scenes, device=job.device)
    export.save_pipeline(job.weights / "shapes", vae, tokenizer, encoder, unet, base.build_scheduler())


def judge_base(job: Job) -> None:
    folder = job.weights / "shapes"
    pipeline = export.load_pipeline(folder, job.device)
    guidance, reached = evaluate.best_guidance(pipeline, base.JUDGED_STEPS, job.plan.guidance_per_task)
    drawn = _generator_figures(job, pipeline, evaluate.drawer(pipeline, steps=base.JUDGED_STEPS, guidance=guidance))
    spent = {name: _seconds(job, name) for name in ("autoencoder", "decoder", "text")}
    before = {f"minutes of {name}": round(seconds / 60, 1) for name, seconds in spent.items() if seconds}
    _write_card(
        job,
        folder,
        "base",
        job.plan.unet,
        data={"scenes": job.plan.unet_scenes, "batch": base.BATCH, "loss": "eps MSE, min-SNR 5, 10 % empty prompts", **before},
        figures={"validation overall by guidance": reached, f"{base.JUDGED_STEPS} DDIM steps, guidance {guidance}": drawn},
        notes=["Stable Diffusion's architecture at toy size. Judge accuracy is by GenEval's rules with the exact detector."],
    )


def train_turbo(job: Job) -> None:
    vae = export.load_autoencoder(job.run)
    teacher = export.load_pipeline(job.weights / "shapes")
    plan = job.plan
    parts = teacher.unet, teacher.text_encoder, teacher.tokenizer
    unet = turbo.train(job.run, *parts, plan.student, plan.distillation, scenes=plan.student_scenes, device=job.device)
    scheduler = base.build_scheduler(prediction_type="sample")
    export.save_pipeline(job.weights / "shapes-turbo", vae, teacher.tokenizer, teacher.text_encoder, unet, scheduler)


def judge_turbo(job: Job) -> None:
    folder = job.weights / "shapes-turbo"
    pipeline = export.load_pipeline(folder, job.device)
    _write_card(
        job,
        folder,
        "turbo",
        job.plan.student,
        data=dataclasses.asdict(job.plan.distillation),
        figures={"one step": _generator_figures(job, pipeline, evaluate.drawer(pipeline, steps=1, guidance=0.0))},
        notes=["One step, distilled from `shapes` by distribution matching. Judge accuracy as for `shapes`."],
    )


def train_flow(job: Job) -> None:
    parts = export.load_pipeline(job.weights / "shapes")
    three = parts.vae, parts.tokenizer, parts.text_encoder
    transformer = flow.train(job.run, *three, job.plan.transformer, job.plan.flow_matching, device=job.device)
    flow.save_pipeline(job.weights / "shapes-flow", *three, transformer, job.plan.flow_matching.length)


def judge_flow(job: Job) -> None:
    folder = job.weights / "shapes-flow"
    pipeline = flow.load_pipeline(folder).to(job.device)
    guidance, reached = evaluate.best_guidance(pipeline, flow.JUDGED_STEPS, job.plan.guidance_per_task, call=flow.FAST)
    drawn = _generator_figures(job, pipeline, evaluate.drawer(pipeline, steps=flow.JUDGED_STEPS, guidance=guidance, call=flow.FAST))
    _write_card(
        job,
        folder,
        "flow",
        job.plan.transformer,
        data={name: str(value) for name, value in dataclasses.asdict(job.plan.flow_matching).items()},
        figures={"validation overall by guidance": reached, f"{flow.JUDGED_STEPS} Euler steps, guidance {guidance}": drawn},
        notes=[
            "Stable Diffusion 3's architecture at toy size, two text encoders and no T5. Judge accuracy as for `shapes`, with"
            " max_sequence_length=1: the stock call draws the same at three times the cost."
        ],
    )


def train_clip(job: Job) -> None:
    vae, tokenizer, _ = export.load_parts(job.run)
    rewards.train_clip(
        job.run,
        tokenizer,
        job.weights / "shapes-clip",
        config=job.plan.clip,
        scenes=job.plan.clip_scenes,
        autoencoder=vae.to(job.device),
        device=job.device,
        command=f"{COMMAND} shapes-clip{job.flags}",
        per_kind=job.plan.per_kind,
    )


def train_preference(job: Job) -> None:
    rewards.train_preference(
        job.run,
        job.weights / "shapes-clip",
        job.weights / "shapes-preference",
        config=job.plan.preference,
        pairs=job.plan.preference_pairs,
        device=job.device,
        command=f"{COMMAND} shapes-preference{job.flags}",
        per_kind=job.plan.per_kind,
        evaluated_pairs=job.plan.evaluated,
    )


def train_aesthetic(job: Job) -> None:
    rewards.train_aesthetic(
        job.run,
        job.weights / "shapes-clip",
        job.weights / "shapes-aesthetic",
        config=job.plan.aesthetic,
        pictures=job.plan.aesthetic_pictures,
        device=job.device,
        command=f"{COMMAND} shapes-aesthetic{job.flags}",
        evaluated=job.plan.evaluated,
    )


def train_captioner(job: Job) -> None:
    vae, tokenizer = export.shipped_parts(job.weights / "shapes", job.device)
    plan = job.plan
    rewards_captioner.train_captioner(job.run, tokenizer, vae, plan.captioner, plan.captioning, plan.captioner_scenes, job.device)


def train_first_round(job: Job) -> None:
    _tuned_once(job)


def train_reward(job: Job) -> None:
    model, head, tokenizer = _tuned_once(job)
    drawers = (export.load_pipeline(job.weights / name, job.device) for name in ("shapes-turbo", "shapes"))
    plan = job.plan
    model = rewards_captioner_tune.train_rounds(job.run, model, head, tokenizer, *drawers, plan.reward, plan.rounds, device=job.device)
    rewards_captioner.save_reward(job.weights / "shapes-reward", model, tokenizer)


def _tuned_once(job: Job) -> tuple[Captioner, nn.Linear, CLIPTokenizer]:
    """The captioner and its head after the first round, which is trained where it is not yet; and the tokenizer."""
    base = export.load_pipeline(job.weights / "shapes", job.device)
    plan = job.plan
    model = rewards_captioner.train_captioner(job.run, base.tokenizer, None, plan.captioner, device=job.device, finished=True)
    tuned = rewards_captioner_tune.train_first_round(job.run, model, base.tokenizer, base, plan.reward, plan.rounds, device=job.device)
    return *tuned, base.tokenizer


def judge_reward(job: Job) -> None:
    plan = job.plan
    trained = plan.captioner, plan.reward, plan.rounds, plan.captioner_scenes
    rewards_judged.write_reward_card(job.run, job.weights, job.device, *trained, plan.per_task, job.flags)


def train_watch(job: Job) -> None:
    vae, tokenizer = export.shipped_parts(job.weights / "shapes", job.device)
    model = rewards_watch.train_watch(job.run, tokenizer, vae, job.plan.watch, job.plan.watching, device=job.device)
    rewards_watch.save_watch(job.weights / "shapes-watch", model, tokenizer)


def judge_watch(job: Job) -> None:
    plan = job.plan
    rewards_judged.write_watch_card(job.run, job.weights, job.device, plan.watch, plan.watching, plan.per_task, job.flags)


def judge_rewards(job: Job) -> None:
    rewards_judged.add_to_towers(job.run, job.weights, job.device, job.plan.per_task)


# In this order each finds what it needs.
STAGES: dict[str, Callable[[Job], None]] = {
    "autoencoder": train_autoencoder,
    "text": train_text,
    "decoder": train_decoder,
    "shapes-clip": train_clip,
    "base": train_base,
    "judge-base": judge_base,
    "turbo": train_turbo,
    "judge-turbo": judge_turbo,
    "flow": train_flow,
    "judge-flow": judge_flow,
    "shapes-preference": train_preference,
    "shapes-aesthetic": train_aesthetic,
    "captioner": train_captioner,
    "first-round": train_first_round,
    "shapes-reward": train_reward,
    "judge-shapes-reward": judge_reward,
    "shapes-watch": train_watch,
    "judge-shapes-watch": judge_watch,
    "judge-rewards": judge_rewards,
}


def _generator_figures(job: Job, pipeline: evaluate.Pipeline, draw: evaluate.Draw) -> dict[str, object]:
    plan = job.plan
    return evaluate.generator_figures(
        pipeline,
        draw,
        evaluate.clip_features(job.weights / "shapes-clip", job.device),
        prompts.metadata("test", per_task=plan.per_task),
        data.draw(plan.measures.searched, plan.unet.seed),
        plan.measures,
    )


def _seconds(job: Job, state: str) -> float:
    """Training time of a state under the run's folder; 0 where there is none."""
    path = job.run / f"{state}.safetensors"
    return loop.progress(path)[1] if path.is_file() else 0.0


def _write_card(job: Job, folder: Path, stage: str, config: loop.LoopConfig, *, data: dict, figures: dict, notes: list[str]) -> None:
    card.write_card(
        folder,
        title=folder.name,
        command=f"{COMMAND} {stage} judge-{stage}{job.flags}",
        config=config,
        seconds=_seconds(job, stage),
        figures=figures,
        notes=[*notes, evaluate.MEASURES_NOTE],
        data=data,
        device=job.device,
    )
