"""What a call is given, checked and made plain: stock arguments, prompts, seeds, generators and plugins."""

from __future__ import annotations

import difflib
import inspect
import logging
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from diffalign.types import NoiseMethod, StepMethod

logger = logging.getLogger(__name__)

MAX_SEED = 2**63 - 1  # what torch.Generator takes without wrapping around
SCHEDULE = ("num_inference_steps", "timesteps", "sigmas")  # a caller who gives one of these gets no default for the others
LEGACY = ("callback", "callback_steps")  # stock arguments that live in **kwargs only


def bind_stock(
    call: Callable[..., Any], class_name: str, prompt: Any, positional: tuple[Any, ...], stock: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of the stock call by name. Unlike the stock call, a misspelt one is an error: TypeError with a suggestion."""
    signature = inspect.signature(call)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    for name in stock:
        if name not in names and name not in LEGACY:
            close = difflib.get_close_matches(name, [*names, "plugins", "seed", "progress"], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{class_name} takes no argument {name!r}{hint}")
    arguments = dict(signature.bind_partial(prompt, *positional, **stock).arguments)
    return {**arguments, **arguments.pop("kwargs", {})}


def fill_defaults(arguments: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments`, changed in place: what the caller left out or gave as None is taken from `defaults`."""
    scheduled = any(arguments.get(name) is not None for name in SCHEDULE)
    for name, value in defaults.items():
        if arguments.get(name) is None and not (scheduled and name in SCHEDULE):
            arguments[name] = value
    return arguments


def refuse(arguments: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    """ValueError where an argument cannot have an effect in `where`."""
    for name in arguments:
        if name not in allowed:
            raise ValueError(f"{name} cannot be used with {where}; allowed are {', '.join(sorted(allowed))}")


def check_prompts(prompt: Any, name: str = "prompt") -> list[str]:
    """The prompts as a list. TypeError for what is not text, ValueError for an empty list; an empty string is a prompt like any other."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, (list, tuple)):
        raise TypeError(f"{name} must be a string or a list of strings, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError(f"{name} is an empty list; give at least one (an empty string is allowed)")
    for i, text in enumerate(prompt):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] must be a string, got {type(text).__name__}: {text!r}")
    return list(prompt)


def resolve_seeds(seed: Any, count: int) -> list[int]:
    """One seed for each sample: an integer s gives s, s+1, ...; a list is taken as it is; None draws fresh ones.

    Fresh seeds come from torch's global generator, so `torch.manual_seed` makes them repeatable.
    """
    if seed is None:
        return torch.randint(0, 2**31, (count,)).tolist()
    if isinstance(seed, (list, tuple)):
        seeds = [_seed(value, f"seed[{i}]") for i, value in enumerate(seed)]
        if len(seeds) != count:
            raise ValueError(f"seed has {len(seeds)} entries for {count} images; give one seed for each image, or one integer")
        return seeds
    first = _seed(seed, "seed")
    return [_seed(first + i, "seed") for i in range(count)]


def _seed(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        seed = operator.index(value)  # numpy's integers too
    except TypeError:
        raise TypeError(f"{name} must be an integer, a list of integers or None, got {type(value).__name__}: {value!r}") from None
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{name} must lie in 0..2**63 - 1, got {seed}")
    return seed


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each sample, so that an image depends on neither its batch mates nor the device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def continue_generator(state: torch.Tensor) -> torch.Generator:
    """A fresh generator that goes on from a saved state."""
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def sort_plugins(plugins: Any) -> tuple[NoiseMethod | None, list[StepMethod]]:
    """The one search over noise, if any, and the step methods in the order given."""
    if not isinstance(plugins, (list, tuple)):
        raise TypeError(f"plugins must be a list of methods, got {type(plugins).__name__}; write plugins=[method]")
    searches: list[NoiseMethod] = []
    steps: list[StepMethod] = []
    for plugin in plugins:
        if isinstance(plugin, type):
            raise TypeError(f"plugins holds the class {plugin.__name__}; make an instance of it first, as in {plugin.__name__}(...)")
        if callable(getattr(plugin, "search", None)):
            searches.append(plugin)
        elif callable(getattr(plugin, "attach", None)):
            steps.append(plugin)
        else:
            raise TypeError(f"plugins holds {plugin!r}, which has neither search(problem) nor attach(pipeline)")
    if len(searches) > 1:
        names = ", ".join(method.name for method in searches)
        raise ValueError(f"plugins holds {len(searches)} methods that search over noise ({names}); one call takes at most one")
    return (searches[0] if searches else None), steps


def text_cut_off(tokenizer: Any, prompts: Sequence[str], limit: int | None = None) -> list[str | None]:
    """For each prompt the end that a limit of so many tokens (the tokenizer's own) cuts off, as written; None where everything fits."""
    limit = limit or tokenizer.model_max_length
    cut: list[str | None] = []
    for prompt in prompts:
        offsets = tokenizer.is_fast
        # verbose=False: the tokenizer's own remark about long sequences says less than ours
        tokens = tokenizer(prompt, truncation=False, padding=False, return_offsets_mapping=offsets, verbose=False)
        ids = tokens["input_ids"]
        ended = bool(ids) and ids[-1] == tokenizer.eos_token_id  # the end token, where there is one, takes the last place
        first = limit - ended
        if len(ids) <= limit:
            cut.append(None)
        elif offsets:
            cut.append(prompt[tokens["offset_mapping"][first][0] :])
        else:
            cut.append(tokenizer.decode(ids[first : len(ids) - ended]))
    return cut


def warn_of_cut_text(prompts: Sequence[str], cut: Sequence[str | None], limit: int, name: str = "prompt") -> None:
    """One warning for the call, naming what the model will not see."""
    lost = [(prompt, text) for prompt, text in zip(prompts, cut, strict=True) if text is not None]
    if lost:
        parts = "; ".join(f"{_short(prompt, 40)!r} loses {len(text)} characters: {_short(text, 200)!r}" for prompt, text in lost[:5])
        more = f"; and {len(lost) - 5} more" if len(lost) > 5 else ""
        logger.warning("%d of %d %ss are longer than the model's %d tokens: %s%s", len(lost), len(prompts), name, limit, parts, more)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
