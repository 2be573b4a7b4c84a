"""Histograms of the magnitudes of deltas, from which exact ranks are found for tensors that do not fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops import _reference as r
from pymerge.ops._arguments import mask_arguments
from pymerge.ops._foreign import takes_arrays
from pymerge.ops.delta_rule import DeltaRule

COARSE_BINS, FINE_BINS, FINE_BITS = 1 << 16, 1 << 15, 15


def delta_histogram_reference(
    base: Tensor | None, tuned: list[Tensor], keep: list[float] | None, keys: list[int] | None, prefix: list[int] | None
) -> Tensor:
    counts = []
    for task, d in enumerate(r.masked(r.deltas(base, tuned), keep, keys)):
        bits = d.abs().view(torch.int32)
        if prefix is None:
            counts.append(torch.bincount(bits >> FINE_BITS, minlength=COARSE_BINS))
        else:
            fine = bits[bits >> FINE_BITS == prefix[task]] & (FINE_BINS - 1)
            counts.append(torch.bincount(fine, minlength=FINE_BINS))
    return torch.stack(counts)


impl("pymerge::delta_histogram", "CompositeExplicitAutograd", delta_histogram_reference)


@register_fake("pymerge::delta_histogram")
def _(base, tuned, keep, keys, prefix):
    return tuned[0].new_empty((len(tuned), COARSE_BINS if prefix is None else FINE_BINS), dtype=torch.int64)


@takes_arrays
def delta_histogram(
    base: Tensor | None, tuned: Sequence[Tensor], *, prefix: Sequence[int] | None = None, mask: DeltaRule | None = None
) -> Tensor:
    """How often each leading part of the bits of |tuned_t - base| (float32) occurs.

    prefix   None: bins are bits >> 15. One a task: only entries with bits >> 15 == prefix[t], bins are bits & 0x7fff
    mask     rule whose random mask (keep, keys) is applied first; None: no mask
    Returns  int64 [T, 65536], or [T, 32768] with prefix. Histograms of the parts of a tensor add up to the tensor's.
    Cost     one pass.
    Raises   RuntimeError (shapes, dtypes or devices differ; not one prefix a task)."""
    arguments = {"keep": None, "keys": None} if mask is None else mask_arguments(mask)
    chosen = None if prefix is None else list(prefix)
    return torch.ops.pymerge.delta_histogram(base, list(tuned), prefix=chosen, **arguments)
