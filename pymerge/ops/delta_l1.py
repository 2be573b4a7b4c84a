"""L1 norms of deltas, before and after selection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops import _reference as r
from pymerge.ops._arguments import selection_arguments
from pymerge.ops._foreign import takes_arrays
from pymerge.ops.delta_rule import DeltaRule


def delta_l1_reference(
    base: Tensor | None,
    tuned: list[Tensor],
    keep: list[float] | None,
    keys: list[int] | None,
    row_length: int,
    top_theta: Tensor | None,
    top_index: Tensor | None,
    skip_theta: Tensor | None,
    skip_index: Tensor | None,
) -> Tensor:
    top, skip = r.pair(top_theta, top_index), r.pair(skip_theta, skip_index)
    selection = r.Selection(keep=keep, keys=keys, row_length=row_length, top=top, skip=skip)
    d = r.deltas(base, tuned)
    norms = [[one.double().abs().sum() for one in part] for part in (d, r.selected(d, selection))]
    return torch.stack([torch.stack(one) for one in norms], dim=1)  # [T, 2]


impl("pymerge::delta_l1", "CompositeExplicitAutograd", delta_l1_reference)


@register_fake("pymerge::delta_l1")
def _(base, tuned, keep, keys, row_length, top_theta, top_index, skip_theta, skip_index):
    return tuned[0].new_empty((len(tuned), 2), dtype=torch.float64)


@takes_arrays
def delta_l1(rule: DeltaRule, base: Tensor | None, tuned: Sequence[Tensor]) -> Tensor:
    """(||d_t||_1, ||selected d_t||_1) of every task, d_t = tuned_t - base; the rule's cuts and mask select.

    Returns  float64 [T, 2]
    Error    d_t is rounded to float32, sums are float64: the same bits at every CPU level and thread count.
    Cost     one pass a task.
    Raises   RuntimeError (shapes, dtypes or devices differ; the rule does not have T entries)."""
    return torch.ops.pymerge.delta_l1(base, list(tuned), **selection_arguments(rule, tuned[0].device))
