"""The literal table of how stock pipelines evaluate the two branches of classifier-free guidance, and of those that cannot be served.

A pipeline is found by its class's name or that of a base class, so subclasses and our aligned classes are served like their stock class.
Read off the diffusers 0.42 sources; adding a family is adding a line here and a builder to tests/tiny_families.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """How a stock loop calls its network under guidance."""

    networks: tuple[str, ...] = ("transformer",)
    """The pipeline's components that denoise, where present."""
    two_calls: bool = False
    """The branches are two calls, in the cache contexts "cond" and then "uncond"; otherwise one call on twice the batch."""
    conditional_first: bool = False
    """The order in that batch."""
    scale: str | None = "guidance_scale"
    """The pipeline's attribute that holds the guidance scale during a call; None where it is a local variable of the call."""
    guidance_from_encoder: bool = False
    """Whether guidance is on is known from what `encode_prompt` is told, for want of the usual property."""
    time_factor: float = 1.0
    """The network is given the scheduler's timestep times this."""


UNET = Layout(networks=("unet",))
TRANSFORMER = Layout()
PIXART = Layout(scale=None, guidance_from_encoder=True)
FLUX = Layout(two_calls=True, scale=None, time_factor=1e-3)  # its guidance_scale is an input of the network, another thing
WAN = Layout(networks=("transformer", "transformer_2"), two_calls=True)

LAYOUTS: Mapping[str, Layout] = {
    "StableDiffusionPipeline": UNET,
    "StableDiffusionImg2ImgPipeline": UNET,
    "StableDiffusionInpaintPipeline": UNET,
    "StableDiffusionControlNetPipeline": UNET,
    "StableDiffusionXLPipeline": UNET,
    "StableDiffusionXLImg2ImgPipeline": UNET,
    "StableDiffusionXLInpaintPipeline": UNET,
    "StableDiffusionXLControlNetPipeline": UNET,
    "StableDiffusion3Pipeline": TRANSFORMER,
    "StableDiffusion3Img2ImgPipeline": TRANSFORMER,
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
    "SanaPipeline": TRANSFORMER,
    "FluxPipeline": FLUX,
    "WanPipeline": WAN,
}

_THREE = "evaluates three branches at every step, and this method knows two"
_INPUT = "takes the guidance scale as an input of the network and evaluates one branch, so there is nothing to save"

REFUSED: Mapping[str, str] = {
    "StableDiffusionInstructPix2PixPipeline": _THREE,
    "StableDiffusionXLInstructPix2PixPipeline": _THREE,
    "StableDiffusionPAGPipeline": _THREE,
    "StableDiffusionXLPAGPipeline": _THREE,
    "StableDiffusion3PAGPipeline": _THREE,
    "PixArtSigmaPAGPipeline": _THREE,
    "SanaPAGPipeline": _THREE,
    "LatentConsistencyModelPipeline": _INPUT,
    "SanaSprintPipeline": _INPUT,
    "FluxImg2ImgPipeline": _INPUT,
    "FluxFillPipeline": _INPUT,
}


def layout_of(pipeline: Any) -> Layout:
    """The pipeline's layout. ValueError saying why where it cannot be served, or what is served where it is not known."""
    name = type(pipeline).__name__
    for base in type(pipeline).__mro__:
        if base.__name__ in REFUSED:
            raise ValueError(f"{name} {REFUSED[base.__name__]}")
        if base.__name__ in LAYOUTS:
            return LAYOUTS[base.__name__]
    raise ValueError(f"guidance methods do not know how {name} evaluates its branches; they know {', '.join(LAYOUTS)}; "
                     "pass layout=Layout(...) to guided() if it does as one of these")  # fmt: skip
