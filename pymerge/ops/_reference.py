"""Steps that the reference implementations share, in plain PyTorch. Their bits are those of the native kernels.

Tensors of one call have one shape; T tasks, n entries, R rows. All arithmetic is float32; numbers enter as float32
tensors, because PyTorch may turn a division by a Python number into a multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.ops._random import draws


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which entries of the deltas stay. keep, keys: one a task; cuts: theta float32 [T, R], index int64 [T, R]."""

    keep: Sequence[float] | None = None
    keys: Sequence[int] | None = None
    row_length: int = 0
    top: tuple[Tensor, Tensor] | None = None
    skip: tuple[Tensor, Tensor] | None = None


def pair(theta: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if theta is None or index is None else (theta, index)


def scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def deltas(base: Tensor | None, tuned: Sequence[Tensor]) -> list[Tensor]:
    """d_t, float32 [n]."""
    flat = [x.float().reshape(-1) for x in tuned]
    return flat if base is None else [x - base.float().reshape(-1) for x in flat]


def random_mask(keep: float, key: int, index: Tensor) -> Tensor:
    """Which of the entries `index` (int64, within the tensor) the mask keeps: bool, of index's shape."""
    if keep >= 1.0:
        return torch.ones_like(index, dtype=torch.bool)
    limit = int(keep * 2.0**32)
    draw = draws(key, index, 0)
    return (draw < limit >> 16) | ((draw == limit >> 16) & (draws(key, index, 1) < (limit & 0xFFFF)))


def masked(d: Sequence[Tensor], keep: Sequence[float] | None, keys: Sequence[int] | None) -> list[Tensor]:
    if keep is None or keys is None:
        return list(d)
    zero, index = torch.zeros((), device=d[0].device), torch.arange(len(d[0]), device=d[0].device)
    return [torch.where(random_mask(p, k, index), x, zero) for x, p, k in zip(d, keep, keys, strict=True)]


def among_first(d: Tensor, cut: tuple[Tensor, Tensor], task: int, row_length: int) -> Tensor:
    """Entries before the cut in (magnitude descending, index ascending) order: bool [n]."""
    index = torch.arange(len(d), device=d.device)
    row = index // row_length if row_length > 0 else torch.zeros_like(index)
    theta, last = cut[0][task][row], cut[1][task][row]
    return (d.abs() > theta) | ((d.abs() == theta) & (index < last))


def selected(d: Sequence[Tensor], selection: Selection) -> list[Tensor]:
    """d_t with the entries that are not selected set to zero."""
    chosen, zero = masked(d, selection.keep, selection.keys), torch.zeros((), device=d[0].device)
    for task, x in enumerate(chosen):
        if selection.top is not None:
            x = torch.where(among_first(x, selection.top, task, selection.row_length), x, zero)
        if selection.skip is not None:
            x = torch.where(among_first(x, selection.skip, task, selection.row_length), zero, x)
        chosen[task] = x
    return chosen


def weighted(d: Sequence[Tensor], weights: Sequence[float], rescales: Sequence[float] | None) -> list[Tensor]:
    """x_t = weight_t * (rescale_t * d_t)"""
    if rescales is not None:
        d = [scalar(r, x) * x for r, x in zip(rescales, d, strict=True)]
    return [scalar(w, x) * x for w, x in zip(weights, d, strict=True)]


def total(x: Sequence[Tensor]) -> Tensor:
    """0 + x_0 + x_1 + ..., in this order."""
    result = torch.zeros_like(x[0])
    for one in x:
        result = result + one
    return result


def count_nonfinite(x: Tensor) -> Tensor:
    return (~torch.isfinite(x.float())).sum()
