"""What a search changes in a pipeline for its duration, each as a context manager that undoes it, also after an error or Ctrl-C."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def frozen(pipeline: Any) -> Iterator[None]:
    """No parameter requires a gradient, so that a backward pass to the noise neither fills `.grad` nor stores what only weights need."""
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def silent_progress(pipeline: Any) -> Iterator[None]:
    """The stock call draws no bar: fifty inner calls would draw fifty."""
    before = getattr(pipeline, "_progress_bar_config", {})
    try:
        pipeline.set_progress_bar_config(**{**before, "disable": True})
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


@contextmanager
def own_scheduler(pipeline: Any) -> Iterator[None]:
    """A copy of the scheduler. Multi-step schedulers keep model outputs, which here would hold the last graph in memory.

    What it remarks when its timesteps are set (LCM's does so of every list it is given) is said once, not in each of fifty calls.
    """
    before, said = pipeline.scheduler, set()

    def once(record: logging.LogRecord) -> bool:
        new = record.getMessage() not in said
        said.add(record.getMessage())
        return new

    logger = logging.getLogger(type(before).__module__)
    logger.addFilter(once)
    try:
        pipeline.scheduler = copy.copy(before)
        yield
    finally:
        pipeline.scheduler = before
        logger.removeFilter(once)


@contextmanager
def without_stock_truncation_warnings(module: str) -> Iterator[None]:
    """Drops what the stock pipeline (a module's name) and its tokenizer say of long prompts: we say it once, with the text as written."""
    told = ("was truncated because", "Token indices sequence length is longer")

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in told)

    loggers = [logging.getLogger(name) for name in (module, "transformers.tokenization_utils_base")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
