"""Inner products of the columns of stored matrices, in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops._foreign import takes_arrays


def gram64_reference(x: Tensor) -> Tensor:
    wide = x.double()  # [..., m, n]
    return wide.mT @ wide


impl("pymerge::gram64", "CompositeExplicitAutograd", gram64_reference)


@register_fake("pymerge::gram64")
def _(x):
    return x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-1]), dtype=torch.float64)


@takes_arrays
def gram64(x: Tensor) -> Tensor:
    """x^T x of each matrix of a batch, without a float64 copy of x; x x^T is gram64(x.mT), which copies nothing either.

    x        [..., m, n], bfloat16, float16, float32 or float64, any strides
    Returns  float64 [..., n, n], exactly symmetric
    Error    |error| <= m 2^-53 (|x|^T |x|), entry by entry; on the CPU the same bits at every thread count, batch size
             and (inputs up to float32) CPU level.
    Cost     m n (n + 1) / 2 multiply-adds.
    Raises   RuntimeError (fewer than two dimensions; another dtype)."""
    return torch.ops.pymerge.gram64(x)
