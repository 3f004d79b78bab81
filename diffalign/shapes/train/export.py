"""Finished parts on disk: ordinary diffusers and transformers folders, weights in float16 safetensors, replaced whole or not at all."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer


def save(part: object, folder: Path) -> None:
    """`part.save_pretrained` into a new folder that then takes the old one's place. Models are written in their own precision."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    part.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_autoencoder(run: Path) -> AutoencoderKL:
    """The autoencoder that the stages "autoencoder" and "decoder" left in `run`."""
    return AutoencoderKL.from_pretrained(_made_by("autoencoder", run / "vae")).eval()


def load_parts(run: Path) -> tuple[AutoencoderKL, CLIPTokenizer, CLIPTextModel]:
    """The autoencoder, and the tokenizer and pretrained text encoder that the stage "text" left in `run`."""
    return (
        load_autoencoder(run),
        CLIPTokenizer.from_pretrained(_made_by("text", run / "tokenizer")),
        CLIPTextModel.from_pretrained(_made_by("text", run / "text_encoder"), dtype=torch.float32),
    )


def shipped_parts(folder: Path, device: str = "cpu") -> tuple[AutoencoderKL, CLIPTokenizer]:
    """The autoencoder and the tokenizer of a finished pipeline, in float32: for what is trained on its pictures."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished pipeline; run `python -m diffalign.shapes.train base` first")
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    return vae.to(device), CLIPTokenizer.from_pretrained(folder / "tokenizer")


def _made_by(stage: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; run `python -m diffalign.shapes.train {stage} --run {folder.parent}` first")
    return folder


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> None:
    """Write a StableDiffusionPipeline folder in float16. The models given are left as they are."""
    vae, encoder, unet = (copy.deepcopy(m).to("cpu", torch.float16) for m in (vae, encoder, unet))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(pipeline, folder)


def load_pipeline(folder: Path, device: str = "cpu") -> StableDiffusionPipeline:
    """A finished pipeline in float32, on a device."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished pipeline; run `python -m diffalign.shapes.train base` first")
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None).to(device)
