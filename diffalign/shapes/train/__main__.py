"""Train what the shapes world ships: `python -m diffalign.shapes.train STAGE`. A stopped stage resumes; a finished one is not repeated."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from diffalign.shapes.train import (
    autoencoder,
    base,
    card,
    evaluate,
    export,
    flow,
    loop,
    rewards,
    rewards_aesthetic,
    rewards_captioner,
    rewards_captioner_tune,
    rewards_clip,
    rewards_judged,
    rewards_preference,
    rewards_watch,
    text,
    turbo,
)

WEIGHTS = Path(__file__).parent.parent / "weights"


def train_autoencoder(args: argparse.Namespace) -> None:
    model = autoencoder.train(args.run, _config(autoencoder.CONFIG, args), device=args.device)
    export.save(model, args.run / "vae")


def train_decoder(args: argparse.Namespace) -> None:
    vae = export.load_autoencoder(args.run)
    model = autoencoder.train_decoder(args.run, vae, _config(autoencoder.DECODER_CONFIG, args), device=args.device)
    export.save(model, args.run / "vae")


def train_text(args: argparse.Namespace) -> None:
    tokenizer = text.build_tokenizer()
    encoder = text.train(args.run, tokenizer, _config(text.CONFIG, args), device=args.device)
    export.save(tokenizer, args.run / "tokenizer")
    export.save(encoder, args.run / "text_encoder")


def train_base(args: argparse.Namespace) -> None:
    vae, tokenizer, encoder = export.load_parts(args.run)
    config = _config(base.CONFIG, args)
    unet = base.train(args.run, vae, tokenizer, encoder, config, device=args.device)
    export.save_pipeline(args.weights / "shapes", vae, tokenizer, encoder, unet, base.build_scheduler())


def train_turbo(args: argparse.Namespace) -> None:
    vae = export.load_autoencoder(args.run)
    teacher = export.load_pipeline(args.weights / "shapes")
    config = _config(turbo.CONFIG, args)
    unet = turbo.train(args.run, teacher.unet, teacher.text_encoder, teacher.tokenizer, config)
    scheduler = base.build_scheduler(prediction_type="sample")
    export.save_pipeline(args.weights / "shapes-turbo", vae, teacher.tokenizer, teacher.text_encoder, unet, scheduler)


def judge_base(args: argparse.Namespace) -> None:
    folder = args.weights / "shapes"
    pipeline = export.load_pipeline(folder)
    guidance, reached = evaluate.best_guidance(pipeline, base.JUDGED_STEPS)
    counts = evaluate.judge_accuracy(pipeline, steps=base.JUDGED_STEPS, guidance=guidance)
    _write_card(
        args,
        folder,
        "base",
        base.CONFIG,
        data={"scenes": base.SCENES, "batch": base.BATCH, "loss": "eps MSE, min-SNR 5, 10 % empty prompts"},
        figures={
            "validation overall by guidance": reached,
            f"test, {base.JUDGED_STEPS} DDIM steps, guidance {guidance}": evaluate.figures(counts),
        },
        notes=["Stable Diffusion's architecture at toy size. Judge accuracy is by GenEval's rules with the exact detector."],
    )


def judge_turbo(args: argparse.Namespace) -> None:
    folder = args.weights / "shapes-turbo"
    counts = evaluate.judge_accuracy(export.load_pipeline(folder), steps=1, guidance=0.0)
    _write_card(
        args,
        folder,
        "turbo",
        turbo.CONFIG,
        data=dataclasses.asdict(turbo.TurboConfig()),
        figures={"test, one step": evaluate.figures(counts)},
        notes=["One step, distilled from `shapes` by distribution matching. Judge accuracy as for `shapes`."],
    )


def train_flow(args: argparse.Namespace) -> None:
    parts = export.load_pipeline(args.weights / "shapes")
    transformer = flow.train(args.run, parts.vae, parts.tokenizer, parts.text_encoder, _config(flow.CONFIG, args), device=args.device)
    flow.save_pipeline(args.weights / "shapes-flow", parts.vae, parts.tokenizer, parts.text_encoder, transformer)


def judge_flow(args: argparse.Namespace) -> None:
    folder = args.weights / "shapes-flow"
    pipeline = flow.load_pipeline(folder)
    guidance, reached = evaluate.best_guidance(pipeline, flow.JUDGED_STEPS, call=flow.FAST)
    counts = evaluate.judge_accuracy(pipeline, steps=flow.JUDGED_STEPS, guidance=guidance, call=flow.FAST)
    _write_card(
        args,
        folder,
        "flow",
        flow.CONFIG,
        data={name: str(value) for name, value in dataclasses.asdict(flow.FlowConfig()).items()},
        figures={
            "validation overall by guidance": reached,
            f"test, {flow.JUDGED_STEPS} Euler steps, guidance {guidance}": evaluate.figures(counts),
        },
        notes=[
            "Stable Diffusion 3's architecture at toy size, two text encoders and no T5. Judge accuracy as for `shapes`, with"
            " max_sequence_length=1: the stock call draws the same at three times the cost."
        ],
    )


def train_clip(args: argparse.Namespace) -> None:
    vae, tokenizer, _ = export.load_parts(args.run)
    config = _config(rewards_clip.CONFIG, args)
    rewards.train_clip(args.run, tokenizer, args.weights / "shapes-clip", config=config, device=args.device, autoencoder=vae)


def train_preference(args: argparse.Namespace) -> None:
    config = _config(rewards_preference.CONFIG, args)
    rewards.train_preference(args.run, args.weights / "shapes-clip", args.weights / "shapes-preference", config=config, device=args.device)


def train_aesthetic(args: argparse.Namespace) -> None:
    config = _config(rewards_aesthetic.CONFIG, args)
    rewards.train_aesthetic(args.run, args.weights / "shapes-clip", args.weights / "shapes-aesthetic", config=config, device=args.device)


def train_captioner(args: argparse.Namespace) -> None:
    vae, tokenizer = export.shipped_parts(args.weights / "shapes")
    rewards_captioner.train_captioner(args.run, tokenizer, vae, _config(rewards_captioner.CONFIG, args), device=args.device)


def train_reward(args: argparse.Namespace) -> None:
    _, tokenizer = export.shipped_parts(args.weights / "shapes")
    model = rewards_captioner.train_captioner(args.run, tokenizer, None, device=args.device, finished=True)
    turbo, base_pipeline = (export.load_pipeline(args.weights / name) for name in ("shapes-turbo", "shapes"))
    config = _config(rewards_captioner_tune.CONFIG, args)
    model, _ = rewards_captioner_tune.train_rounds(args.run, model, tokenizer, turbo, base_pipeline, config, device=args.device)
    rewards_captioner.save_reward(args.weights / "shapes-reward", model, tokenizer)


def judge_reward(args: argparse.Namespace) -> None:
    rewards_judged.write_reward_card(args.run, args.weights, args.device)


def train_watch(args: argparse.Namespace) -> None:
    vae, tokenizer = export.shipped_parts(args.weights / "shapes")
    model = rewards_watch.train_watch(args.run, tokenizer, vae, _config(rewards_watch.CONFIG, args), device=args.device)
    rewards_watch.save_watch(args.weights / "shapes-watch", model, tokenizer)


def judge_watch(args: argparse.Namespace) -> None:
    rewards_judged.write_watch_card(args.run, args.weights, args.device)


def judge_rewards(args: argparse.Namespace) -> None:
    rewards_judged.add_to_towers(args.run, args.weights, args.device)


def print_table(args: argparse.Namespace) -> None:
    print(rewards_judged.auc_table(args.weights))


def _write_card(
    args: argparse.Namespace, folder: Path, stage: str, config: loop.LoopConfig, *, data: dict, figures: dict, notes: list[str]
) -> None:
    _, seconds = loop.progress(args.run / f"{stage}.safetensors")
    card.write_card(
        folder,
        title=folder.name,
        command=f"python -m diffalign.shapes.train {stage} judge-{stage}",
        config=config,
        seconds=seconds,
        figures=figures,
        notes=notes,
        data=data,
        device=args.device,
    )


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "autoencoder": train_autoencoder,
    "decoder": train_decoder,
    "text": train_text,
    "base": train_base,
    "judge-base": judge_base,
    "turbo": train_turbo,
    "judge-turbo": judge_turbo,
    "flow": train_flow,
    "judge-flow": judge_flow,
    "shapes-clip": train_clip,
    "shapes-preference": train_preference,
    "shapes-aesthetic": train_aesthetic,
    "captioner": train_captioner,
    "shapes-reward": train_reward,
    "judge-shapes-reward": judge_reward,
    "shapes-watch": train_watch,
    "judge-shapes-watch": judge_watch,
    "judge-rewards": judge_rewards,
    "table-rewards": print_table,
}


def _config(config: loop.LoopConfig, args: argparse.Namespace) -> loop.LoopConfig:
    return dataclasses.replace(config, steps=args.steps) if args.steps else config


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffalign.shapes.train", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=list(STAGES), metavar="STAGE", help=f"in this order: {', '.join(STAGES)}")
    parser.add_argument("--run", type=Path, default=Path("runs/shapes"), help="where training state is kept (default: %(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where finished models go (default: inside the package)")
    parser.add_argument("--steps", type=int, help="train for this many steps instead of the stage's own number")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_flush_denormal(True)
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
