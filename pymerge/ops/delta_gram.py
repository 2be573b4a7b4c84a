"""Inner products of the deltas of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops import _reference as r
from pymerge.ops._foreign import takes_arrays


def delta_gram_reference(base: Tensor | None, tuned: list[Tensor]) -> Tensor:
    d = torch.stack(r.deltas(base, tuned)).double()  # [T, n]
    return d @ d.mT


impl("pymerge::delta_gram", "CompositeExplicitAutograd", delta_gram_reference)


@register_fake("pymerge::delta_gram")
def _(base, tuned):
    return tuned[0].new_empty((len(tuned), len(tuned)), dtype=torch.float64)


@takes_arrays
def delta_gram(base: Tensor | None, tuned: Sequence[Tensor]) -> Tensor:
    """<d_s, d_t> of the flattened d_t = tuned_t - base (base None: of tuned itself).

    Returns  float64 [T, T], symmetric
    Error    d_t is rounded to float32, the rest is float64: the same bits at every CPU level and thread count.
    Cost     one pass, T (T + 1) / 2 multiply-adds an entry.
    Raises   RuntimeError (shapes, dtypes or devices differ)."""
    return torch.ops.pymerge.delta_gram(base, list(tuned))
