"""What a run is made with once everything is decided: by the options, by the preset, or by the pipeline itself.

`before_loading` is what can be known without a model. It is compared whenever a run is opened, also where
nothing is left to make. `after_loading` holds the values themselves and is compared before the first image.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffalign.commands import evaluation, options
from diffalign.files import HUB_ID, packaged_path

NOT_OF_THE_IMAGES = ("name", "licence", "notes", "batch_size", "cosine_threshold")
"""A preset's entries that no image depends on. The last is Adaptive Guidance's, which its own settings hold."""
READ_WHOLE = 64 * 2**20
"""Bytes: of larger files their size and `SAMPLES` blocks stand for the content."""
SAMPLES, BLOCK = 16, 2**16


def before_loading(args: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline's name means today: the preset without what options replace, the identity of the weights, versions."""
    from diffalign.pipelines.presets import PRESETS

    preset = PRESETS.get(args.pipeline)
    source = preset.source if preset else args.pipeline
    return {
        "preset": _facts(asdict(preset), args) if preset else None,
        "weights": identity(source),
        "versions": {name: version for name, version in evaluation.versions().items() if name != "python"},
    }


def _facts(preset: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    replaced = {
        "steps": args.steps is not None,
        "timesteps": args.steps is not None,
        "guidance_scale": args.guidance_scale is not None,
        "half": args.dtype is not None,
    }
    return {name: value for name, value in preset.items() if name not in NOT_OF_THE_IMAGES and not replaced.get(name)}


def after_loading(pipeline: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Steps, guidance scale, size, dtype, scheduler and weights as the images are made with."""
    import inspect

    given = pipeline.with_defaults(options.stock_arguments(args))
    stock = inspect.signature(pipeline.stock_class.__call__).parameters

    def value(name: str) -> Any:
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


def session(device: Any) -> dict[str, Any]:
    """Where and when images were made; a run may have several of these."""
    return {"device": evaluation.device_name(device), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}


def in_words(made: Mapping[str, Any]) -> str:
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
    from huggingface_hub import try_to_load_from_cache

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
