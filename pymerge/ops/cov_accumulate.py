"""Uncentred second moments of streamed batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops._foreign import writes_array

_MIRROR_BLOCK = 128


def cov_accumulate_reference(
    cov: Tensor,
    x: Tensor,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    small: bool = False,
    precision: str = "float32",
) -> None:
    wide = torch.float64 if precision == "float64" or x.dtype == torch.float64 else torch.float32
    rows = x.to(wide)
    if mask is not None:
        rows = torch.where(mask.unsqueeze(-1), rows, 0.0)  # whatever padding holds, NaN too
    product = rows @ rows.mT if small else rows.mT @ rows  # [..., n, n], or [..., N, N]
    cov.add_(torch.triu(product * alpha))


impl("pymerge::cov_accumulate", "CompositeExplicitAutograd", cov_accumulate_reference)


@register_fake("pymerge::cov_accumulate")
def _(cov, x, alpha=1.0, mask=None, small=False, precision="float32"):
    return None


@writes_array("cov")
def cov_accumulate(
    cov: Tensor,
    x: Tensor,
    *,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    small: bool = False,
    precision: str = "float32",
) -> None:
    """cov += alpha * x^T x over the rows that `mask` keeps, in place; only the upper triangle is computed and written.

    cov      [n, n] or [B, n, n] with contiguous rows, float32 or float64: totals over many batches belong in float64
    x        [..., N, n] with a two-dimensional cov (leading dimensions are rows too), [B, N, n] otherwise; bfloat16,
             float16, float32, float64, any strides, never copied as a whole nor widened in memory
    mask     bool, x's shape without the last dimension: rows to count; others are not read as numbers (NaN is safe)
    small    cov [N, N] += alpha * x x^T instead, for N < n (the same non-zero eigenvalues); masked rows give zeros
    precision  of products and of sums within 1024 rows: "float32", or "float64" where the tail of the spectrum matters
             (PAVE at a condition of the moments above 1e4); float64 x always takes float64
    Error    float32: products are exact for bfloat16 and float16, sums relative to |x|^T |x| within (1024 + N / 1024)
             * 2^-24. float64 cov: runs of 1024 rows (CUDA: 8192) are added in float64.
    Cost     N n (n + 1) / 2 multiply-adds. Same bits for any number of threads.
    Raises   RuntimeError (shapes, dtypes, devices; cov with overlapping or strided rows).
    Source   arXiv 2510.14697 (PAVE), arXiv 2602.20208 (ESM): the moments that both take.

    Read the result through `cov_mirror_`, once, when it is complete."""
    if cov.dim() == 2 and x.dim() > 2 and not small:
        x = x.reshape(-1, x.shape[-1])
        mask = None if mask is None else mask.reshape(-1)
    torch.ops.pymerge.cov_accumulate(cov, x, alpha, mask, small, precision)


@writes_array("cov")
def cov_mirror_(cov: Tensor) -> Tensor:
    """Copies the upper triangle of each [..., n, n] matrix onto the lower one, in place; returns cov.

    Cost     one read and one write of half the entries, in small blocks: no temporary of the matrix's size.
    Raises   ValueError (matrices that are not square)."""
    if cov.dim() < 2 or cov.shape[-1] != cov.shape[-2]:
        raise ValueError(f"cov_mirror_: square matrices are needed, got {list(cov.shape)}")
    n = cov.shape[-1]
    for begin in range(0, n, _MIRROR_BLOCK):
        end = min(begin + _MIRROR_BLOCK, n)
        block = cov[..., begin:end, begin:end]
        block.copy_(torch.triu(block) + torch.triu(block, 1).mT)
        cov[..., end:, begin:end] = cov[..., begin:end, end:].mT
    return cov
