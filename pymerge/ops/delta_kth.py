"""The k-th largest magnitude of a delta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops import _reference as r
from pymerge.ops._arguments import mask_arguments
from pymerge.ops._foreign import takes_arrays
from pymerge.ops.delta_rule import KEEP_ALL_TIES, DeltaRule


def delta_kth_reference(
    base: Tensor | None,
    tuned: list[Tensor],
    ranks: list[int],
    row_length: int,
    keep: list[float] | None,
    keys: list[int] | None,
) -> tuple[Tensor, Tensor]:
    device, length = tuned[0].device, row_length or tuned[0].numel()
    rows = tuned[0].numel() // row_length if row_length > 0 else 1
    theta = torch.empty(len(tuned), rows, device=device)
    index = torch.empty(len(tuned), rows, dtype=torch.int64, device=device)
    for task, (d, rank) in enumerate(zip(r.masked(r.deltas(base, tuned), keep, keys), ranks, strict=True)):
        if rank <= 0 or rank >= length:
            theta[task] = torch.inf if rank <= 0 else 0.0
            index[task] = 0 if rank <= 0 else KEEP_ALL_TIES
            continue
        bits = d.abs().view(torch.int32).reshape(rows, length)  # NaN is larger than all numbers, and sorts so
        place = torch.sort(bits, dim=1, descending=True, stable=True).indices[:, rank - 1]
        theta[task] = d.abs().reshape(rows, length).gather(1, place[:, None])[:, 0]
        index[task] = place + 1 + length * torch.arange(rows, device=device)
    return theta, index


impl("pymerge::delta_kth", "CompositeExplicitAutograd", delta_kth_reference)


@register_fake("pymerge::delta_kth")
def _(base, tuned, ranks, row_length, keep, keys):
    shape = (len(tuned), tuned[0].numel() // row_length if row_length > 0 else 1)
    return tuned[0].new_empty(shape, dtype=torch.float32), tuned[0].new_empty(shape, dtype=torch.int64)


@takes_arrays
def delta_kth(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    ranks: Sequence[int],
    *,
    row_length: int | None = None,
    mask: DeltaRule | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the first ranks[t] entries of |tuned_t - base| end, by magnitude (descending), then index (ascending).

    base        subtracted; None: magnitudes of tuned itself
    ranks       one a task; <= 0: nothing is among the first, >= row length: everything is
    row_length  rank within rows of this many entries (None: the whole tensor is one row)
    mask        rule whose random mask (keep, keys) is applied before ranking; None: no mask
    Returns     theta float32 [T, R], the magnitude of the last of them (inf for nothing, 0 for everything), and index
                int64 [T, R], the index within the tensor just behind it (0 for nothing, 2^63 - 1 for everything).
    Error       exact.
    Cost        one pass a task and a selection among a few per cent of the entries.
    Raises      RuntimeError (shapes, dtypes or devices differ; row_length does not divide the number of entries)."""
    arguments = {"keep": None, "keys": None} if mask is None else mask_arguments(mask)
    return torch.ops.pymerge.delta_kth(base, list(tuned), list(ranks), row_length or 0, **arguments)
