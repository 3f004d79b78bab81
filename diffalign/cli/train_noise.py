"""`diffalign train find`: a policy of the initial noise, learned over many prompts, for `--method amortised --policy DIR`."""

from __future__ import annotations

from dataclasses import asdict

from diffalign.amortise import train_noise
from diffalign.cli.prompts import read as read_prompts
from diffalign.cli.train_commands import TrainNoise, chosen_reward
from diffalign.files import require_writable
from diffalign.shapes import prompts as shapes_world
from diffalign.training.loop import LoopSettings


def run(options: TrainNoise, command: str) -> int:
    """Trains, and prints what was measured. Raises ValueError, TypeError's sentence included, or OSError with the sentence to show."""
    require_writable(options.out)
    texts = read_prompts(options.prompts_file) if options.prompts_file else shapes_world.prompts("train")
    try:
        trained = train_noise(
            texts,
            chosen_reward(options.reward, options.pipeline),
            out=options.out,
            pipeline=options.pipeline,
            form=options.form,
            width=options.width,
            blocks=options.blocks,
            patch=options.patch,
            clip=options.clip,
            pull=options.pull,
            settings=LoopSettings(**asdict(options.loop)),
            resume=options.resume,
            track=options.track,
            device=options.device,
            command=command,
        )
    except FloatingPointError as error:  # a run that diverged is no bug to show a traceback of
        raise ValueError(str(error)) from error
    print(f"{trained.step} steps in {trained.seconds:.0f} s")
    print("  " + "  ".join(f"{name} {value:.4g}" for name, value in trained.figures.items()))
    use = f"diffalign generate --pipeline {options.pipeline} --method amortised --policy {options.out} --budget 1"
    print(f"saved in {options.out}; use it with `{use}`")
    return 0
