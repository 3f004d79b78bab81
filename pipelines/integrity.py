"""Is a pipeline folder whole? Looked at before and after loading.

The libraries' own messages about damaged weights name neither the file nor the remedy, and some
damage (missing tensors, NaN) is no error to them at all.

Cost: headers before loading; afterwards one pass over the weights in memory, 0.2 s for a thousand
million of them on one CPU core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffalign.files import read_json

NO_WEIGHTS = ("tokenizer", "scheduler")  # components, by the start of their name, that hold none
INDEX = "*.safetensors.index*.json"  # diffusers and transformers put a variant before ".json", others before ".safetensors"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that are not loaded


def read_model_index(folder: Path) -> dict[str, Any]:
    """A folder's model_index.json. FileNotFoundError where there is none, ValueError where it is not one."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a pipeline in diffusers layout: it has no model_index.json")
    index = read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{path} names no pipeline class (_class_name); it was not written by save_pretrained")
    return index


def stock_class(folder: Path) -> str:
    """The diffusers class that a folder was saved from."""
    return read_model_index(folder)["_class_name"]


def check_files(folder: Path) -> dict[str, list[Path]]:
    """The weight files of every component that has weights; each must be there, whole, and safetensors."""
    files: dict[str, list[Path]] = {}
    for name, value in read_model_index(folder).items():
        listed = isinstance(value, list) and len(value) == 2 and value[0] is not None
        if name.startswith("_") or not listed or name in UNUSED:
            continue
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {name}, which its model_index.json lists")
        if name.startswith(NO_WEIGHTS):
            continue
        files[name] = _weight_files(folder / name)
        for file in files[name]:
            try:
                with safe_open(file, framework="pt"):  # reads the header only, and compares it with the file's length
                    pass
            except (SafetensorError, OSError, ValueError) as error:
                with file.open("rb") as stream:
                    pointer = stream.read(24).startswith(b"version https://git-lfs")
                why = "is a git-lfs pointer, not the weights; run `git lfs pull`" if pointer else f"is damaged or cut short ({error})"
                raise ValueError(f"the weight file {file} {why}") from error
    return files


def _weight_files(folder: Path) -> list[Path]:
    """One component's files: of the variants that are whole, the one without a name first. An index says what whole is."""
    sets: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        sets.setdefault(variant(file), []).append(file)
    listed_by: dict[Path, str] = {}
    for index in sorted(folder.glob(INDEX)):
        sets[variant(index)] = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        listed_by |= dict.fromkeys(sets[variant(index)], index.name)
    if not sets:
        other = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".ckpt")]
        also = f"; {other[0]} is not read, because it can run code: convert it to safetensors" if other else ""
        raise FileNotFoundError(f"{folder} holds no weight file (*.safetensors){also}")
    ordered = [sets[name] for name in sorted(sets, key=lambda name: name or "")]
    for files in ordered:
        if all(file.is_file() for file in files):
            return files
    absent = next(file for file in ordered[0] if not file.is_file())
    raise FileNotFoundError(f"the weight file {absent} is missing; {listed_by[absent]} lists it")


def variant(file: Path) -> str | None:
    """ "fp16" of model.fp16.safetensors and of model.safetensors.index.fp16.json; None of model.safetensors."""
    words = [word for word in file.name.split(".")[1:] if word not in ("safetensors", "index", "json")]
    return words[0].split("-")[0] if words else None


def weighted(pipeline: Any) -> dict[str, nn.Module]:
    """The components that have weights, by name."""
    return {name: component for name, component in pipeline.components.items() if isinstance(component, nn.Module)}


def require_complete(component: nn.Module, files: Sequence[Path]) -> None:
    """ValueError naming a tensor that the model needs and the files lack, which loading would fill with random numbers.

    Tensors that a model ties (T5's `encoder.embed_tokens` is its `shared`) are one, and any of their names serves.
    Files may use other names than the model: a prefix more or less, as transformers' base models
    have, or names of an older version of the library. So what is missing by name counts as there
    where the files hold a tensor of its size that the model does not know, below the same module
    or under the same name with another prefix.
    """
    stored: dict[str, int] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if not files:
        return
    tied: dict[object, list[str]] = {}
    needed = component.state_dict(keep_vars=True)
    for name, tensor in needed.items():
        tied.setdefault(_storage(tensor), []).append(name)
    strange = [name for name in stored if name not in needed]
    missing = []
    for names in tied.values():
        if any(name in stored for name in names):
            continue
        size = needed[names[0]].numel()
        twin = next((other for other in strange if stored[other] == size and any(_renamed(name, other) for name in names)), None)
        if twin is None:
            missing.append(names[0])
        else:
            strange.remove(twin)
    if missing:
        others = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        where = files[0] if len(files) == 1 else f"{files[0]} and its {len(files) - 1} other shards"
        raise ValueError(f"the weight file {where} lacks {missing[0]}{others} of {len(tied)}; it is incomplete, get it again")


def _storage(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same numbers in memory. Without memory (meta, empty) each is its own."""
    place = tensor.data_ptr() if tensor.numel() and tensor.device.type != "meta" else 0
    return (place, tuple(tensor.shape), tensor.stride()) if place else id(tensor)


def _renamed(needed: str, stored: str) -> bool:
    """Whether a stored name may be another version's name of the one that is needed."""
    prefixed = needed.endswith(f".{stored}") or stored.endswith(f".{needed}")
    return prefixed or needed.partition(".")[0] == stored.partition(".")[0]


def require_finite(component: nn.Module, where: str, dtype: torch.dtype) -> None:
    """ValueError naming `where` and the first tensor with a NaN or an infinity in it."""
    for name, parameter in component.named_parameters():
        if not parameter.numel():
            continue
        low, high = torch.aminmax(parameter.detach())  # NaN and infinity survive it; one pass and no temporary, unlike isfinite().all()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"the weights in {where} are not finite, first in {name}, read as {str(dtype).removeprefix('torch.')}; get the file again, "
                "or load with dtype='float32' if it was saved in float32"
            )
