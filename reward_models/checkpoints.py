"""Reading checkpoints: safetensors alone, every tensor accounted for, and errors that name the file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)


def existing(path: Path, reward: str) -> Path:
    """The path, or FileNotFoundError saying what to do."""
    if not path.exists():
        raise FileNotFoundError(f"reward {reward!r}: {path} is missing; train it with `python -m diffalign.shapes.train`, or pass folder=")
    return path


def read_weights(path: Path, reward: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in float32. Raises FileNotFoundError; ValueError for a damaged file or values not finite."""
    try:
        tensors = load_file(existing(path, reward))
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); make or copy it again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {name!r} has values that are not finite; the checkpoint is unusable")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load with full accounting. Raises ValueError naming the tensors that are missing, unexpected or of another shape."""
    expected = module.state_dict()
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [n for n, t in expected.items() if n in tensors and t.shape != tensors[n].shape],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{path} does not fit the model its configuration describes; {'; '.join(found)}")
    module.load_state_dict(dict(tensors))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path, reward: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError; ValueError where it is no JSON object or lacks one of `keys`."""
    try:
        content = json.loads(existing(path, reward).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise ValueError(f"{path} must be a JSON object with the keys {', '.join(keys)}")
    return content


def read_tokenizer(folder: Path, reward: str) -> CLIPTokenizer:
    """The folder's CLIPTokenizer. Raises FileNotFoundError, or ValueError where its files cannot be read."""
    from transformers import CLIPTokenizer

    for file in ("tokenizer.json", "tokenizer_config.json"):
        existing(folder / file, reward)
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error})") from error


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str], reward: str) -> Tensor:
    """Token ids "n l", padded to the tokenizer's length; what does not fit is named in a warning.

    Special tokens written out in a prompt are read as ordinary text, so no prompt can end itself early.
    """
    length = tokenizer.model_max_length
    batch = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=length,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    for prompt, offsets in zip(prompts, batch["offset_mapping"].tolist(), strict=True):
        read = max(end for _, end in offsets)
        rest = prompt[read:].strip()
        if rest:
            shown = rest if len(rest) <= 80 else rest[:77] + "..."
            logger.warning("reward %r reads %d tokens; it ignores the last %d characters: %r", reward, length, len(rest), shown)
    return batch["input_ids"]
