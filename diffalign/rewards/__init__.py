"""Several rewards as one: calibrated, combined by a rule, weighed against others that only watch.

    mix = RewardMix({"a": (model_a, 1.0), "b": (model_b, 1.0)}, watched={"c": model_c}, rule=WorstCase(), calibration=calibration)

`combine` has the rules on scores, `gradients` those on image gradients, `advantages` and `pareto` what training needs of a group of
samples, `panel` the comparison of optimised with watched. Names are imported on first use: the command line knows the rules without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.rewards.calibration import Calibration as Calibration
    from diffalign.rewards.calibration import calibrate as calibrate
    from diffalign.rewards.combine import Constrained as Constrained
    from diffalign.rewards.combine import Geometric as Geometric
    from diffalign.rewards.combine import SoftMin as SoftMin
    from diffalign.rewards.combine import UncertaintyWeighted as UncertaintyWeighted
    from diffalign.rewards.combine import WeightedSum as WeightedSum
    from diffalign.rewards.combine import WorstCase as WorstCase
    from diffalign.rewards.gradients import MGDA as MGDA
    from diffalign.rewards.gradients import EqualRMS as EqualRMS
    from diffalign.rewards.gradients import PCGrad as PCGrad
    from diffalign.rewards.mix import RewardMix as RewardMix

# public name -> the module that defines it
_LAZY = {
    "RewardMix": "mix",
    "Calibration": "calibration",
    "calibrate": "calibration",
    "WeightedSum": "combine",
    "WorstCase": "combine",
    "SoftMin": "combine",
    "UncertaintyWeighted": "combine",
    "Geometric": "combine",
    "Constrained": "combine",
    "EqualRMS": "gradients",
    "PCGrad": "gradients",
    "MGDA": "gradients",
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
