"""The rewards that `load` knows, by name: a literal table. One row is one published checkpoint, or one rule."""

from __future__ import annotations

from reward_models.spec import Spec

_DDPO = "Black et al., Training Diffusion Models with Reinforcement Learning (arXiv 2305.13301), section 5"

SPECS: dict[str, Spec] = {
    "shapes-clip": Spec(
        name="shapes-clip",
        target="reward_models.shapes_clip:ShapesCLIP",
        paper="Hessel et al., CLIPScore (arXiv 2104.08718); Radford et al., CLIP (arXiv 2103.00020)",
        licence="Apache-2.0",
        range=(0.0, 60.0),
        unit="100 x cosine",
        checkpoint={"model": "package:shapes/weights/shapes-clip"},
        memory=0.004,
    ),
    "shapes-preference": Spec(
        name="shapes-preference",
        target="reward_models.shapes_preference:ShapesPreference",
        paper="Kirstain et al., Pick-a-Pic and PickScore (arXiv 2305.01569)",
        licence="Apache-2.0",
        range=(-5.0, 15.0),
        unit="exp(logit scale) x cosine: nats of log-odds between two images of one prompt",
        checkpoint={"model": "package:shapes/weights/shapes-preference"},
        memory=0.004,
    ),
    "shapes-aesthetic": Spec(
        name="shapes-aesthetic",
        target="reward_models.shapes_aesthetic:ShapesAesthetic",
        paper="Schuhmann et al., LAION-5B (arXiv 2210.08402): a head on CLIP features; here on composition, see the weights' card",
        licence="Apache-2.0",
        range=(0.0, 10.0),
        unit="composition from 0 to 10",
        needs_prompt=False,
        checkpoint={"model": "package:shapes/weights/shapes-aesthetic"},
        memory=0.003,
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
