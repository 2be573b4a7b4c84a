"""Per task and direction, how a projected delta lies along given rows: two sums instead of the product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops._foreign import takes_arrays
from pymerge.ops.project_delta import Precision, project_delta_reference


def projection_stats_reference(
    basis: Tensor, reference: Tensor, base: Tensor | None, tuned: list[Tensor], precision: str
) -> tuple[Tensor, Tensor]:
    a = project_delta_reference(basis, base, tuned, precision).double()  # [T, r, n]
    return (a * reference.float().double()).sum(2), a.square().sum(2)


impl("pymerge::projection_stats", "CompositeExplicitAutograd", projection_stats_reference)


@register_fake("pymerge::projection_stats")
def _(basis, reference, base, tuned, precision):
    shape = (len(tuned), basis.shape[-1])
    return basis.new_empty(shape, dtype=torch.float64), basis.new_empty(shape, dtype=torch.float64)


@takes_arrays
def projection_stats(
    basis: Tensor,
    reference: Tensor,
    base: Tensor | None,
    tuned: Sequence[Tensor],
    *,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """<p_i, a_ti> and ||a_ti||^2 of the rows a_ti of A_t = Q_t^T (tuned_t - base), which is never stored.

    Singular value calibration divides the first by the second (arXiv 2602.05536), with U for Q and U^T D for p.
    basis, base, tuned, precision   as `project_delta`
    reference  p, [r, n] for all tasks or [T, r, n]
    Returns    two float64 [T, r]: inner products, squared norms
    Error      that of the rows of `project_delta`, at most 2 e ||p_i|| ||a_ti|| and 2 e ||a_ti||^2 for rows right to e;
               the sums are float64, in an order that does not depend on threads.
    Cost       2 T m n r flops; memory 1.6 MB a thread and at most 256 T r bytes (CPU), T r n / 8 bytes (CUDA).
    Raises     RuntimeError (shapes, dtypes or devices do not fit; unknown precision)."""
    return torch.ops.pymerge.projection_stats(basis, reference, base, list(tuned), precision)
