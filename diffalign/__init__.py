"""diffalign: align text-to-image diffusion models, at inference and by tuning, and judge every method by the same benchmarks.

    pipe = diffalign.load_pipeline("shapes-turbo")
    reward = diffalign.load_reward({"shapes-clip": 1.0, "shapes-preference": 0.5})
    out = pipe("a red circle left of a blue square", seed=0, plugins=[diffalign.ReNO(reward, budget=50)])

Everything public is imported on first use, so that `import diffalign` costs milliseconds and a command's --help never
waits for torch. The methods' classes are those of diffalign/methods/table.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffalign.methods.table import METHODS

if TYPE_CHECKING:
    from diffalign.amortise import train_noise as train_noise
    from diffalign.hub import guided as guided
    from diffalign.hub import load_pipeline as load_pipeline
    from diffalign.hub import load_reward as load_reward
    from diffalign.rewards import RewardMix as RewardMix
    from diffalign.tuning import train as train

__version__ = "0.1.0"

# public name -> the module that defines it
_LAZY = {
    "load_pipeline": "diffalign.hub",
    "load_reward": "diffalign.hub",
    "guided": "diffalign.hub",
    "RewardMix": "diffalign.rewards",
    "train": "diffalign.tuning",
    "train_noise": "diffalign.amortise",
    **{row.class_name: row.module for row in METHODS},
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
