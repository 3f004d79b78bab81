"""Training of the three learnt rewards of the shapes world. In order, since the later two start from the first:

    clip = train_clip(run, build_tokenizer(), weights / "shapes-clip")
    train_preference(run, clip, weights / "shapes-preference")
    train_aesthetic(run, clip, weights / "shapes-aesthetic")

Each resumes from `run`, writes the folder that `reward_models` loads, and a card with its held-out figures beside the weights.
"""

from diffalign.shapes.train.rewards_aesthetic import train_aesthetic
from diffalign.shapes.train.rewards_clip import train_clip
from diffalign.shapes.train.rewards_preference import train_preference

__all__ = ["train_aesthetic", "train_clip", "train_preference"]
