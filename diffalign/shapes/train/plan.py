"""How much every stage does: one table for the shipped weights, and one for a rehearsal of about a minute a stage (`--quick`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from diffalign.shapes import prompts
from diffalign.shapes.train import (
    autoencoder,
    base,
    flow,
    rewards_aesthetic,
    rewards_captioner,
    rewards_captioner_tune,
    rewards_clip,
    rewards_preference,
    rewards_watch,
    text,
    turbo,
)
from diffalign.shapes.train.evaluate import MeasureConfig
from diffalign.shapes.train.loop import LoopConfig


@dataclass(frozen=True)
class Plan:
    """What the stages are given; the defaults make the shipped weights."""

    vae: LoopConfig = autoencoder.CONFIG
    decoder: LoopConfig = autoencoder.DECODER_CONFIG
    vae_scenes: int = autoencoder.SCENES  # drawn for each of the two
    encoder: LoopConfig = text.CONFIG
    captions: int = text.CAPTIONS  # drawn for the text encoder
    unet: LoopConfig = base.CONFIG
    unet_scenes: int = base.SCENES
    student: LoopConfig = turbo.CONFIG
    distillation: turbo.TurboConfig = field(default_factory=turbo.TurboConfig)
    student_scenes: int = turbo.SCENES  # whose captions the student sees
    transformer: LoopConfig = flow.CONFIG
    flow_matching: flow.FlowConfig = field(default_factory=flow.FlowConfig)
    clip: LoopConfig = rewards_clip.CONFIG
    clip_scenes: int = rewards_clip.SCENES
    preference: LoopConfig = rewards_preference.CONFIG
    preference_pairs: int = rewards_preference.PAIRS
    aesthetic: LoopConfig = rewards_aesthetic.CONFIG
    aesthetic_pictures: int = rewards_aesthetic.PICTURES
    captioner: LoopConfig = rewards_captioner.CONFIG
    captioning: rewards_captioner.CaptioningConfig = field(default_factory=rewards_captioner.CaptioningConfig)
    captioner_scenes: int = rewards_captioner.SCENES
    reward: LoopConfig = rewards_captioner_tune.CONFIG
    rounds: rewards_captioner_tune.TuneConfig = field(default_factory=rewards_captioner_tune.TuneConfig)
    watch: LoopConfig = rewards_watch.CONFIG
    watching: rewards_watch.WatchConfig = field(default_factory=rewards_watch.WatchConfig)
    measures: MeasureConfig = field(default_factory=MeasureConfig)
    per_task: int = prompts.PROMPTS_PER_TASK  # prompts that are judged, of each task
    guidance_per_task: int = 24  # validation prompts of each task, for each guidance scale
    per_kind: int = 200  # cases of each kind of wrong caption, for the two-tower rewards
    evaluated: int = 1000  # held-out pairs and pictures, for the preference and the aesthetic reward

    def with_steps(self, steps: int) -> Plan:
        """The same, every training of so many steps."""
        loops = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if isinstance(getattr(self, f.name), LoopConfig)}
        return dataclasses.replace(self, **{name: shortened(config, steps) for name, config in loops.items()})


def shortened(config: LoopConfig, steps: int) -> LoopConfig:
    """The same schedule over so many steps; it warms up for a fifth of them at most."""
    return dataclasses.replace(config, steps=steps, warmup=min(config.warmup, steps // 5))


QUICK = Plan(
    vae=shortened(autoencoder.CONFIG, 200),
    decoder=shortened(autoencoder.DECODER_CONFIG, 100),
    vae_scenes=500,
    encoder=shortened(text.CONFIG, 150),
    captions=3000,
    unet=shortened(base.CONFIG, 120),
    unet_scenes=1500,
    student=shortened(turbo.CONFIG, 40),
    distillation=turbo.TurboConfig(pairs=128, pair_steps=4, warm_steps=20),
    student_scenes=500,
    transformer=shortened(flow.CONFIG, 80),
    flow_matching=flow.FlowConfig(scenes=1500),
    clip=shortened(rewards_clip.CONFIG, 80),
    clip_scenes=400,
    preference=shortened(rewards_preference.CONFIG, 60),
    preference_pairs=300,
    aesthetic=shortened(rewards_aesthetic.CONFIG, 300),
    aesthetic_pictures=600,
    captioner=shortened(rewards_captioner.CONFIG, 120),
    captioning=rewards_captioner.CaptioningConfig(until=80),
    captioner_scenes=400,
    reward=shortened(rewards_captioner_tune.CONFIG, 20),
    rounds=rewards_captioner_tune.TuneConfig(
        base_prompts=16, first_steps=20, rounds=2, fresh_prompts=(32,), climbed_prompts=8, scenes=200, mixed=False
    ),
    watch=shortened(rewards_watch.CONFIG, 120),
    watching=rewards_watch.WatchConfig(scenes=400),
    measures=MeasureConfig(scenes=150, searched=1500, prompts=4, group=4),
    per_task=2,
    guidance_per_task=1,
    per_kind=10,
    evaluated=50,
)
