"""Cast and count what overflowed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops._foreign import takes_arrays


def finite_cast_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y = x.to(dtype, copy=True, memory_format=torch.contiguous_format)  # an operator never returns its input
    return y, (~torch.isfinite(y)).sum()


impl("pymerge::finite_cast", "CompositeExplicitAutograd", finite_cast_reference)


@register_fake("pymerge::finite_cast")
def _(x, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.int64)


@takes_arrays
def finite_cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as `dtype`, rounded to nearest even, and how many of the results are NaN or infinite.

    x        float32, any shape
    dtype    bfloat16, float16, float32 or float64
    Returns  y (contiguous, x's shape) and bad, int64, 0-dimensional, on x's device (reading it waits for the device).
    Cost     one pass.
    Raises   RuntimeError (x is not float32; dtype is none of the four)."""
    return torch.ops.pymerge.finite_cast(x, dtype)
