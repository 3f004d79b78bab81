"""`--lora PATH`: tuned weights on top of a pipeline, and how a run remembers which."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any


def load(pipeline: Any, source: Path) -> None:
    """Tuned weights on top of the pipeline's, at their full strength. Raises ValueError where they do not fit."""
    folder, name = (source, None) if source.is_dir() else (source.parent, source.name)
    try:
        pipeline.load_lora_weights(folder, weight_name=name)
    except Exception as error:  # diffusers and peft raise what they like
        raise ValueError(f"--lora {source} does not fit the pipeline ({' '.join(str(error).split())[:200]})") from error


def identity(source: Path) -> str:
    """The name of its file and the hash of its content: the folder it lies in does not matter."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{files[0].name} {digest[:16]}"


def path(text: str) -> Path:
    """A .safetensors file, or a folder with one, as diffusers and `diffalign train` write it."""
    given = Path(text)
    if given.is_dir() and len(list(given.glob("*.safetensors"))) == 1:
        return given
    if given.is_file() and given.suffix == ".safetensors":
        return given
    raise argparse.ArgumentTypeError(f"must be a .safetensors file of LoRA weights, or a folder with one such file; got {text!r}")
