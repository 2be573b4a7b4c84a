"""Moments of given rows, as statistics keep them."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.statistics.moments import Accumulator, Moments


def moments_of(x: Tensor, dtype: torch.dtype = torch.float64) -> Moments:
    """Of rows X [N, n]: kept where they are few, else summed."""
    accumulator = Accumulator("x", dtype)
    accumulator.add(x)
    return accumulator.finish()
