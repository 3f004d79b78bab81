"""Reading checkpoints: every tensor accounted for, and errors that name the file."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.files import read_json
from diffalign.reward_models.sources import Source

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)


def weights_file(source: Source, *names: str) -> Path:
    """The first of these files that is there, and where it is an index of several, all that it lists."""
    path = source.file(*names)
    if path.suffix == ".json":
        for shard in sorted(set(read_json(path, ("weight_map",))["weight_map"].values())):
            source.file(str(shard))
    return path


def without_weights(build: Callable[[], Module]) -> Module:
    """A module as `build` makes it, its parameters without memory until weights are loaded; buffers are real.

    Drawing billions of random numbers takes minutes, and holding them beside the weights twice the memory.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        return build()


def read_weights(path: Path, dtype: torch.dtype | None = torch.float32, skip: Sequence[str] = ()) -> dict[str, Tensor]:
    """All tensors of a checkpoint, its floats in `dtype` (None: as stored): .safetensors, a .json index of several, or torch's own.

    skip: prefixes of tensors that are left on the disk.
    torch's own (.pt, .pth, .bin) may hold a state dict or {"state_dict": ...}; it is read with weights_only=True.
    Raises ValueError for a damaged file, for anything but tensors and for values that are not finite.
    """
    if path.suffix == ".json":
        tensors = _read_shards(path, dtype, skip)
    else:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(skip))}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {name!r} has values that are not finite; the checkpoint is unusable")
    if dtype is None:
        return tensors
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); make or copy it again") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)  # torch's older format cannot be read page by page
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a zip, pickle, end-of-file or runtime error, depending on where it is cut
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is truncated or no checkpoint of tensors alone ({reason}); make or copy it again") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not content or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path} holds no state dict: a mapping from names to tensors is needed")
    return dict(content)


def _read_shards(path: Path, dtype: torch.dtype | None, skip: Sequence[str]) -> dict[str, Tensor]:
    index = read_json(path, ("weight_map",))["weight_map"]
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(index.values())):
        shard = path.parent / str(name)
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}, which {path.name} lists, is missing; copy the whole folder")
        tensors |= read_weights(shard, dtype, skip)
    return tensors


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, unused: Sequence[str] = ()) -> None:
    """Load with full accounting; the module takes the tensors over, in their dtype.

    unused: prefixes of tensors that the published file has and the model does not need. Raises ValueError naming the tensors that are
    missing, unexpected or of another shape.
    """
    expected = module.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if name in expected or not name.startswith(tuple(unused))}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [n for n, t in expected.items() if n in tensors and t.shape != tensors[n].shape],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{path} does not fit the model its configuration describes; {'; '.join(found)}")
    module.load_state_dict(tensors, assign=True)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def collapse(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer equal to several without activations between them, multiplied out in float64."""
    weight, bias = layers[0].weight.double(), layers[0].bias.double()
    for layer in layers[1:]:
        weight, bias = layer.weight.double() @ weight, layer.weight.double() @ bias + layer.bias.double()
    one = nn.Linear(weight.shape[1], weight.shape[0])
    one.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return one


def read_tokenizer(source: Source) -> CLIPTokenizer:
    """The source's CLIPTokenizer. Raises FileNotFoundError, or ValueError where its files cannot be read."""
    from transformers import CLIPTokenizer

    folder = source.folder("tokenizer.json", "tokenizer_config.json")
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
        report_cut(reward, length, prompt[max(end for _, end in offsets) :])
    return batch["input_ids"]


def report_cut(reward: str, length: int, rest: str) -> None:
    """Warn of the end of a prompt that a reward does not read, if there is one."""
    rest = rest.strip()
    if rest:
        shown = rest if len(rest) <= 80 else rest[:77] + "..."
        logger.warning("reward %r reads %d tokens; it ignores the last %d characters: %r", reward, length, len(rest), shown)


def read_plain_tokenizer(source: Source) -> Tokenizer:
    """The source's tokenizer.json as it is. Special tokens written out in a text are read as ordinary text.

    Raises FileNotFoundError, or ValueError where it cannot be read.
    """
    from tokenizers import Tokenizer

    path = source.file("tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"the tokenizer in {path} cannot be read ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer
