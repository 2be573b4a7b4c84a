"""Q^T (W_t - W_0) of all tasks of one matrix, without the deltas in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops._foreign import takes_arrays

Precision = Literal["fp32", "bf16x3"]


def project_delta_reference(basis: Tensor, base: Tensor | None, tuned: list[Tensor], precision: str) -> Tensor:
    rows = []
    for task, changed in enumerate(tuned):
        d = changed.float() if base is None else changed.float() - base.float()  # [m, n]
        q = basis[task] if basis.dim() == 3 else basis  # [m, r]
        rows.append(q.float().mT @ d)
    return torch.stack(rows)


impl("pymerge::project_delta", "CompositeExplicitAutograd", project_delta_reference)


@register_fake("pymerge::project_delta")
def _(basis, base, tuned, precision):
    return basis.new_empty((len(tuned), basis.shape[-1], tuned[0].shape[1]), dtype=torch.float32)


@takes_arrays
def project_delta(
    basis: Tensor, base: Tensor | None, tuned: Sequence[Tensor], *, precision: Precision = "fp32"
) -> Tensor:
    """Y_t = Q_t^T (tuned_t - base), the deltas made tile by tile inside the product.

    basis      Q, [m, r] for all tasks or [T, m, r], one each
    base       [m, n], subtracted from every tuned matrix; None: nothing is
    tuned      T matrices [m, n]. All: bfloat16, float16, float32 or float64, in any mixture; the CPU reads transposed
               views in place
    precision  what CUDA may do: "fp32" multiplies in float32; "bf16x3" on tensor cores, both factors as two bfloat16
               terms, three products of four. The CPU multiplies in float32 either way.
    Returns    float32 [T, r, n]
    Error      ||Y_t - exact|| / ||exact||, for the float32 values of the inputs (float64 ones are rounded first), at
               m = 4096: 3e-7 on the CPU, at most 5e-6 on CUDA. CPU: the same bits for every tiling and thread count,
               and for every CPU level that has fused multiply-add.
    Cost       2 T m n r flops; each tuned matrix is read once, base once a task. Memory beside the output (CPU): 1.6 MB
               a thread.
    Raises     RuntimeError (shapes, dtypes or devices do not fit; unknown precision)."""
    return torch.ops.pymerge.project_delta(basis, base, list(tuned), precision)
