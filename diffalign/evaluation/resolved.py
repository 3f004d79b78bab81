"""What a run is made with once everything is decided: by the options, by the preset, or by the pipeline itself.

`before_loading` is what can be known without a model. It is compared whenever a run is opened, also where
nothing is left to make. `after_loading` holds the values themselves and is compared before the first image.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import try_to_load_from_cache

from diffalign.benchmarks.base import Record
from diffalign.evaluation import machine
from diffalign.files import HUB_ID, packaged_path
from diffalign.pipelines import presets

if TYPE_CHECKING:
    from diffalign.pipelines.aligned import AlignedPipeline

NOT_OF_THE_IMAGES = ("name", "licence", "notes", "batch_size", "cosine_threshold")
"""A preset's entries that no image depends on. The last is Adaptive Guidance's, which its own settings hold."""
READ_WHOLE = 64 * 2**20
"""Bytes: of larger files their size and `SAMPLES` blocks stand for the content."""
SAMPLES, BLOCK = 16, 2**16


def before_loading(pipeline: str, replaced: Mapping[str, object]) -> Record:
    """What the pipeline's name means today: the preset without what options replace, the identity of the weights, versions.

    replaced: "steps", "guidance_scale", "dtype" -> what was given, None where nothing was.
    """
    preset = presets.PRESETS.get(pipeline)
    source = preset.source if preset else pipeline
    return {
        "preset": _facts(asdict(preset), replaced) if preset else None,
        "weights": identity(source),
        "versions": {name: version for name, version in machine.versions().items() if name != "python"},
    }


def _facts(preset: Record, replaced: Mapping[str, object]) -> Record:
    given = {name for name, value in replaced.items() if value is not None}
    by_preset = {"steps": "steps", "timesteps": "steps", "guidance_scale": "guidance_scale", "half": "dtype"}
    return {name: value for name, value in preset.items() if name not in NOT_OF_THE_IMAGES and by_preset.get(name) not in given}


def after_loading(pipeline: AlignedPipeline, arguments: Mapping[str, int | float]) -> Record:
    """Steps, guidance scale, size, dtype, scheduler and weights as the images are made with. arguments: those given to the call."""
    given = pipeline.with_defaults(dict(arguments))
    stock = inspect.signature(pipeline.stock_class.__call__).parameters

    def value(name: str) -> object:
        return given.get(name, stock[name].default if name in stock else None)

    timesteps, size = given.get("timesteps"), pipeline.size_of(given)
    return {
        "class": pipeline.stock_class.__name__,
        "steps": len(timesteps) if timesteps else value("num_inference_steps"),
        **({"timesteps": list(timesteps)} if timesteps else {}),
        "guidance_scale": value("guidance_scale"),
        "height": size.height,
        "width": size.width,
        "dtype": str(getattr(pipeline, pipeline.denoiser).dtype).removeprefix("torch."),
        "scheduler": type(pipeline.scheduler).__name__,
    }


def session(device: str | torch.device) -> dict[str, str]:
    """Where and when images were made; a run may have several of these."""
    return {"device": machine.device_name(device), "date": machine.now()}


def in_words(made: Record) -> str:
    """ "50 steps, guidance 7.5, 512 x 512, float16, PNDMScheduler"."""
    parts = [f"{made['steps']} steps", f"guidance {made['guidance_scale']}", f"{made['width']} x {made['height']}"]
    return ", ".join([*parts, made["dtype"], made["scheduler"]])


def identity(source: str) -> str | None:
    """The digest of a folder, "folder 0123456789abcdef", or the commit of a Hub repository; None where that has not been downloaded."""
    folder = packaged_path(source) or Path(source).expanduser()
    if folder.is_dir():
        return f"folder {_digest(folder)}"
    if not HUB_ID.fullmatch(source):
        return None
    found = try_to_load_from_cache(source, "model_index.json")
    return f"commit {Path(found).parent.name}" if isinstance(found, str) else None


def _digest(folder: Path) -> str:
    """Of names and contents of all files, but for what people write beside them; the folder's own place does not matter."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in Path(name).parts) or path.suffix == ".md":
            continue
        size = path.stat().st_size
        total.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= READ_WHOLE:
                total.update(file.read())
                continue
            for place in range(SAMPLES):
                file.seek(place * (size - BLOCK) // (SAMPLES - 1))
                total.update(file.read(BLOCK))
    return total.hexdigest()[:16]
