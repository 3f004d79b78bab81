"""FrameReward: an image reward over video, by scoring its frames and taking their mean.

Videos are "b f 3 h w" floats in [0, 1], f frames of b videos; every frame is scored against the
video's own prompt.

    score_i = 1 / n sum over j of r(x_i[t_j], p_i),    t_j = floor((2 j + 1) f / (2 n)),  j = 0 .. n - 1

t_j are the middles of n equal parts, so n frames stand for the whole video, one frame is the middle
one, and n = f takes them all. An image reward knows nothing of motion: a video that stands still may
score best, which a reward that is watched should look for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.types import RewardModel, Scores

Videos = Float[Tensor, "b f 3 h w"]


class FrameReward:
    """A reward model on videos, so a member of a `RewardMix` like any other; differentiable where `reward` is.

    reward: the image reward; "b 3 h w" and b prompts to "b".
    frames: how many evenly spaced frames are scored, >= 1; None takes all. Where a video has fewer,
        all of them are scored.
    batch_size: frames scored at once, >= 1; None takes all. Memory and speed only.
    """

    def __init__(self, reward: RewardModel, frames: int | None = None, *, batch_size: int | None = None) -> None:
        if not isinstance(reward, RewardModel):
            raise TypeError(f"reward must be a reward model (name, differentiable, prepare, call), got {type(reward).__name__}")
        for name, value in (("frames", frames), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, or None for all, got {value!r}")
        self.reward, self.frames, self.batch_size = reward, frames, batch_size

    @property
    def name(self) -> str:
        """The reward's own, with the number of frames: a calibration of images is another one than of videos."""
        return f"{self.reward.name} over {'all' if self.frames is None else self.frames} frames"

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def prepare(self, prompts: Sequence[str]) -> None:
        """Let the reward encode the prompts, each once however many frames it is scored with."""
        self.reward.prepare(prompts)

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> Scores:
        """Scores of videos against b prompts. Raises ValueError for what has not that shape, or not one prompt each."""
        if videos.ndim != 5 or videos.shape[2] != 3 or not videos.shape[1]:
            raise ValueError(
                f"videos must be 'b f 3 h w' with at least one frame, got shape {tuple(videos.shape)}; a batch of images has f = 1"
            )
        if len(prompts) != len(videos):
            raise ValueError(f"prompts must be one for each of {len(videos)} videos, got {len(prompts)}")
        kept = frame_indices(videos.shape[1], self.frames)
        count = len(kept)
        chosen = videos if count == videos.shape[1] else videos[:, kept]
        images = chosen.flatten(0, 1)
        repeated = [prompt for prompt in prompts for _ in range(count)]
        size = self.batch_size or max(len(images), 1)
        parts = [self.reward(images[at : at + size], repeated[at : at + size]) for at in range(0, len(images), size)]
        scores = torch.cat(parts) if parts else images.new_zeros(0, dtype=torch.float32)
        return scores.float().view(len(videos), count).mean(1)


def frame_indices(length: int, count: int | None) -> list[int]:
    """t_j: `count` evenly spaced frames of `length`, in order; all of them for None or where there are no more."""
    if count is None or count >= length:
        return list(range(length))
    return [(2 * j + 1) * length // (2 * count) for j in range(count)]
