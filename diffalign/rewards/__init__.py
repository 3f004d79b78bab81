"""Several rewards as one: calibrated, combined by a rule, weighed against others that only watch.

    mix = RewardMix({"a": (model_a, 1.0), "b": (model_b, 1.0)}, watched={"c": model_c},
                    rule=WorstCase(), calibration=calibration)

`combine` has the rules on scores, `gradients` those on image gradients, `names` the table of both;
`advantages` and `pareto` what training needs of a group of samples; `frames` takes image rewards to
video; `panel` compares optimised with watched. Names are imported on first use: the command line
knows the rules without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffalign.rewards.names import GRADIENT_RULES, RULES

if TYPE_CHECKING:
    from diffalign.rewards.calibration import Calibration as Calibration
    from diffalign.rewards.calibration import calibrate as calibrate
    from diffalign.rewards.combine import *  # noqa: F403  the rules are those of names.py
    from diffalign.rewards.frames import FrameReward as FrameReward
    from diffalign.rewards.gradients import *  # noqa: F403
    from diffalign.rewards.mix import RewardMix as RewardMix

# public name -> the module that defines it
_LAZY = {
    "RewardMix": "mix",
    "FrameReward": "frames",
    "Calibration": "calibration",
    "calibrate": "calibration",
    **{cls: module for row in (*RULES.values(), *GRADIENT_RULES.values()) for module, cls in [row.target.split(":")]},
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'diffalign.rewards' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"diffalign.rewards.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
