"""Judges' models from transformers' hub or from a folder: whole, quietly, and with one sentence where they cannot be had."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def load_model(kind: Any, source: str, device: str = "cpu", unused: Callable[[str], bool] = lambda key: "position_ids" in key) -> Any:
    """A transformers model in float32, as the benchmarks' own judges run: at half precision scores move across thresholds.

    unused: keys that the judge can do without. Raises ValueError where other tensors are missing, which transformers would fill at random;
    OSError where the model cannot be had.
    """
    with _told(source):
        model, info = kind.from_pretrained(source, output_loading_info=True)
    missing = sorted(key for key in info["missing_keys"] if not unused(key))
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}")
    return model.to(device, torch.float32)


def load_part(kind: Any, source: str) -> Any:
    """A tokenizer, processor or configuration. Raises OSError where it cannot be had."""
    with _told(source):
        return kind.from_pretrained(source)


@contextmanager
def _told(source: str) -> Iterator[None]:
    """Without bars and retries on the screen; what goes wrong is said once."""
    from transformers.utils import logging as transformers_logging

    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1 or os.sep not in source):
        raise FileNotFoundError(f"there is no folder {source}; give a folder of a transformers model or a hub id, owner/name")
    # The hub reports each retry, transformers each tensor that does not match; of both the caller says what matters.
    loud = [logging.getLogger("huggingface_hub.utils._http"), logging.getLogger("transformers.modeling_utils")]
    bars = transformers_logging.is_progress_bar_enabled()
    for each in loud:
        each.addFilter(_errors_alone)  # a level would make transformers report more: it asks for the level before some checks
    transformers_logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        what = "its folder is not complete" if Path(source).is_dir() else "check the name and the connection, or give a folder"
        raise OSError(f"could not load {source!r} ({reason}); {what}") from error
    finally:
        for each in loud:
            each.removeFilter(_errors_alone)
        if bars:
            transformers_logging.enable_progress_bar()


def _errors_alone(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
