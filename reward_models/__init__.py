"""Reward models: scores of images against prompts, higher is better. A literal table of names, and `load`.

    reward = reward_models.load("shapes-clip")
    scores = reward(images, prompts)            # images "b 3 h w" in [0, 1], b prompts -> float32 "b"

Nothing heavy is imported until `load` is called. How to add one: a file with a subclass of `base.RewardModel`, and a row in SPECS.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING

from reward_models.spec import Spec

if TYPE_CHECKING:
    from reward_models.base import RewardModel

__all__ = ["NAMES", "SPECS", "Spec", "load", "spec_of"]

_DDPO = "Black et al., Training Diffusion Models with Reinforcement Learning (arXiv 2305.13301), section 5"

SPECS: dict[str, Spec] = {
    "shapes-clip": Spec(
        name="shapes-clip",
        target="reward_models.shapes_clip:ShapesCLIP",
        paper="Hessel et al., CLIPScore (arXiv 2104.08718); Radford et al., CLIP (arXiv 2103.00020)",
        licence="Apache-2.0",
        range=(0.0, 60.0),
        unit="100 x cosine",
        weights="shapes/weights/shapes-clip",
    ),
    "shapes-preference": Spec(
        name="shapes-preference",
        target="reward_models.shapes_preference:ShapesPreference",
        paper="Kirstain et al., Pick-a-Pic and PickScore (arXiv 2305.01569)",
        licence="Apache-2.0",
        range=(-5.0, 15.0),
        unit="exp(logit scale) x cosine: nats of log-odds between two images of one prompt",
        weights="shapes/weights/shapes-preference",
    ),
    "shapes-aesthetic": Spec(
        name="shapes-aesthetic",
        target="reward_models.shapes_aesthetic:ShapesAesthetic",
        paper="Schuhmann et al., LAION-5B (arXiv 2210.08402): a head on CLIP features; here on composition, see the weights' card",
        licence="Apache-2.0",
        range=(0.0, 10.0),
        unit="composition from 0 to 10",
        needs_prompt=False,
        weights="shapes/weights/shapes-aesthetic",
    ),
    "jpeg-compressibility": Spec(
        name="jpeg-compressibility",
        target="reward_models.cheap:JPEGSize",
        paper=_DDPO,
        licence="Apache-2.0",
        range=(-200.0, 0.0),
        unit="minus kilobytes as JPEG of quality 95",
        differentiable=False,
        needs_prompt=False,
        options=(("sign", -1), ("quality", 95)),
    ),
    "jpeg-incompressibility": Spec(
        name="jpeg-incompressibility",
        target="reward_models.cheap:JPEGSize",
        paper=_DDPO,
        licence="Apache-2.0",
        range=(0.0, 200.0),
        unit="kilobytes as JPEG of quality 95",
        differentiable=False,
        needs_prompt=False,
        options=(("sign", 1), ("quality", 95)),
    ),
    "brightness": Spec(
        name="brightness",
        target="reward_models.cheap:Brightness",
        paper="none: mean luminance (ITU-R BT.709), for first steps and tests",
        licence="Apache-2.0",
        range=(0.0, 1.0),
        unit="mean luminance",
        needs_prompt=False,
    ),
}
NAMES: tuple[str, ...] = tuple(SPECS)


def spec_of(name: str) -> Spec:
    """The table's row. Raises ValueError for an unknown name, with the nearest known one."""
    if name not in SPECS:
        close = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.5)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown reward {name!r};{hint} rewards are {', '.join(NAMES)}")
    return SPECS[name]


def load(name: str, *, folder: str | Path | None = None, device: str = "cpu") -> RewardModel:
    """A reward ready to call: frozen, in evaluation mode, on `device`.

    folder: where its weights lie, instead of the folder inside the package.
    Raises ValueError (unknown name; a folder for a reward without weights; a damaged file, which is named) and FileNotFoundError (weights
    missing).
    """
    spec = spec_of(name)
    if spec.weights is None and folder is not None:
        raise ValueError(f"reward {name!r} has no weights to load; leave folder away, got {str(folder)!r}")
    if folder is None and spec.weights is not None:
        folder = Path(str(importlib.resources.files("diffalign").joinpath(*spec.weights.split("/"))))
    module, _, attribute = spec.target.partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    model = cls(spec) if folder is None else cls(spec, Path(folder).expanduser())
    return model.to(device)
