"""The interval of a share, for reports and for the cards of the shapes world's models."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054
"""How many standard deviations hold 95 % of a normal distribution, both sides taken."""


def wilson(mean: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval for a proportion seen in `n` independent trials; `n` need not be whole. Never leaves [0, 1]."""
    if not 0 <= mean <= 1 or not n > 0:
        raise ValueError(f"wilson needs a proportion in [0, 1] and n > 0; got mean {mean} and n {n}")
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    # The bounds at 0 and 1 are exact; the formula misses them by rounding.
    return (0.0 if mean == 0 else max(centre - half, 0.0)), (1.0 if mean == 1 else min(centre + half, 1.0))
