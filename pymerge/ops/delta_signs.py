"""The majority sign of a whole tensor, which the authors' TIES gives to entries whose own sum is zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops import _reference as r
from pymerge.ops._arguments import selection_arguments, weight_arguments
from pymerge.ops._foreign import takes_arrays
from pymerge.ops.delta_rule import DeltaRule


def delta_signs_reference(
    base: Tensor | None,
    tuned: list[Tensor],
    weights: list[float],
    rescales: list[float] | None,
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
    s = r.total(r.weighted(r.selected(r.deltas(base, tuned), selection), weights, rescales))
    return (s > 0).sum() - (s < 0).sum()


impl("pymerge::delta_signs", "CompositeExplicitAutograd", delta_signs_reference)


@register_fake("pymerge::delta_signs")
def _(base, tuned, weights, rescales, keep, keys, row_length, top_theta, top_index, skip_theta, skip_index):
    return tuned[0].new_empty((), dtype=torch.int64)


@takes_arrays
def delta_signs(rule: DeltaRule, base: Tensor | None, tuned: Sequence[Tensor]) -> Tensor:
    """sum over entries of sign(sum_t x_t), x_t as in `delta_merge`.

    Returns  int64, 0-dimensional
    Error    exact, given the float32 sums of `delta_merge`.
    Cost     one pass.
    Raises   RuntimeError (shapes, dtypes or devices differ; the rule does not have T entries)."""
    return torch.ops.pymerge.delta_signs(
        base, list(tuned), **weight_arguments(rule), **selection_arguments(rule, tuned[0].device)
    )
