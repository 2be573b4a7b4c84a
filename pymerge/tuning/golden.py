"""Golden-section search."""

from __future__ import annotations

import math
from collections.abc import Callable

SHARE = (math.sqrt(5) - 1) / 2  # of the bracket that each step keeps


def golden_section(score: Callable[[float], float], low: float, high: float, tolerance: float) -> tuple[float, float]:
    """Narrows low .. high down to `tolerance` around a maximum of `score`; returns the last bracket.

    The maximum is the only one where `score` has one; otherwise it is one of several, and a value tried on the way may
    be better: keep all scores. The ends themselves are never tried. Of equal scores the smaller value is followed.
    Cost     `tries(low, high, tolerance)` calls: 14 from [0, 2] to 0.01."""
    left, right = high - SHARE * (high - low), low + SHARE * (high - low)
    at_left, at_right = score(left), score(right)
    while high - low > tolerance:
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - SHARE * (high - low)
            at_left = score(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + SHARE * (high - low)
            at_right = score(right)
    return low, high


def tries(low: float, high: float, tolerance: float) -> int:
    """How often golden_section calls `score`."""
    return 2 + max(0, math.ceil(math.log(tolerance / (high - low)) / math.log(SHARE)))
