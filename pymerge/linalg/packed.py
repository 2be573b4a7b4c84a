"""Symmetric matrices kept as their upper triangle, row by row: products with them that never make them whole.

A matrix of 3072 in float64 is 75 MB of new pages, which cost more than the arithmetic that fills them; a slab of some
rows stays in the caches and is used again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch
from torch import Tensor

from pymerge.linalg import _dense, _lapack
from pymerge.linalg.subspaces import _column_signs, _scaled, covariance_subspace

SLAB = 256  # rows


def pack(upper: Tensor) -> Tensor:
    """The upper triangle of [n, n], row by row [n (n + 1) / 2]."""
    n = upper.shape[0]
    packed = upper.new_empty(n * (n + 1) // 2)
    at = 0
    for row in range(n):
        packed[at : at + n - row] = upper[row, row:]
        at += n - row
    return packed


def unpack(packed: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """[n, n] with zeros below the diagonal."""
    upper = numpy.zeros((n, n), str(dtype).removeprefix("torch."))  # pages that are not written cost nothing
    entries, at = packed.numpy(), 0
    for row in range(n):  # with numpy, whose slices cost a fraction of torch's
        upper[row, row:] = entries[at : at + n - row]
        at += n - row
    return torch.from_numpy(upper)


def slabs(packed: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """(i, S[i:j, i:] in float64) for the rows i..j-1 of each slab, all of S from its diagonal block on; S is given by
    `packed`. The tensor is overwritten by the next slab."""
    entries, at = packed.numpy(), 0
    buffer = numpy.empty(min(SLAB, n) * n)
    for first in range(0, n, SLAB):
        rows, width = min(SLAB, n - first), n - first
        slab = buffer[: rows * width].reshape(rows, width)
        for row in range(rows):
            slab[row, row:] = entries[at : at + width - row]
            at += width - row
        below = numpy.tril_indices(rows, -1)
        slab[below] = slab[below[::-1]]
        yield first, torch.from_numpy(slab)


def congruence(d: Tensor, packed: Tensor) -> Tensor:
    """d S d^T [m, m], lower triangle, column-major, float64 on the CPU; d [m, n]. With S = H + H^T (H: S's blocks right
    of the diagonal and half of those on it), (d H) d^T + d (d H)^T: n^2 m / 2 + n m^2 multiply-adds."""
    d = d.contiguous()
    y = torch.zeros_like(d)
    for first, slab in slabs(packed, d.shape[1]):
        slab[:, : slab.shape[0]].mul_(0.5)
        y[:, first:].addmm_(d[:, first : first + slab.shape[0]], slab)
    return _lapack.symmetric_product(d, y)


def packed_covariance_subspace(d: Tensor, packed: Tensor, rank: int, *, mode: str = "exact") -> tuple[Tensor, Tensor]:
    """`covariance_subspace(d, C, rank, mode=mode)` of C [n, n] by its upper triangle [n (n + 1) / 2] on the CPU; d
    [m, n]. C is made only where m > n and where the fast mode iterates."""
    m, n = d.shape
    c, weight, scale = _scaled("c", packed[None], 0, torch.Size())
    x, norm, power = _scaled("d", d, 0, torch.Size())
    if m > n or mode != "exact" or norm == 0.0 or weight == 0.0:
        return covariance_subspace(d, unpack(packed, n, torch.float64), rank, mode=mode)
    theta, basis = _dense.top_eigh(congruence(x.double(), c[0]), rank)
    return _column_signs(basis.to(d.dtype)), theta * power**2 * scale
