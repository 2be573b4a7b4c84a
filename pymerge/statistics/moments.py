"""The uncentred second moment of one layer's input, as the rows themselves or as X^T X, whichever is smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.errors import NonFinite
from pymerge.linalg.packed import pack, unpack
from pymerge.ops.cov_accumulate import cov_accumulate, cov_mirror_


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What one distinct input has been, over all rows seen.

    rows     N, padding not counted
    mean     float32 [n]
    samples  X [N, n], where `rows_are_kept`
    triangle the upper triangle of X^T X, row by row [n (n + 1) / 2], otherwise
    """

    rows: int
    mean: Tensor
    samples: Tensor | None = None
    triangle: Tensor | None = None

    @property
    def width(self) -> int:
        return self.mean.shape[0]

    def second_moment(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """X^T X [n, n], symmetric, not divided by the number of rows.

        Cost     from samples N n (n + 1) / 2 multiply-adds, else a copy"""
        n = self.width
        if self.samples is not None:
            total = torch.zeros(n, n, dtype=dtype)
            cov_accumulate(total, self.samples, precision="float64" if dtype == torch.float64 else "float32")
            return cov_mirror_(total)
        assert self.triangle is not None
        return cov_mirror_(unpack(self.triangle, n, dtype))


def rows_are_kept(rows: int, width: int) -> bool:
    """Whether N rows are kept themselves: up to 9 n / 16, an eighth more than X^T X takes. They are cheaper to compute
    with, and 32 images of 50 tokens in front of a layer of 3072, ESM's default on ViT-B/32, are within it."""
    return 16 * rows <= 9 * width


class Accumulator:
    """Rows of one input, batch by batch: kept while `rows_are_kept`, then turned into X^T X."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.rows = 0
        self.kept: list[Tensor] = []
        self.total: Tensor | None = None
        self.sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x [N, n] on any device, any floating dtype."""
        x = x.detach()
        column_sums = x.sum(0, dtype=torch.float64).cpu()
        if not bool(torch.isfinite(column_sums).all()):
            raise NonFinite(f"{self.name}: the input of this layer has NaN or infinite entries in the samples")
        self.sum = column_sums if self.sum is None else self.sum + column_sums
        self.rows += x.shape[0]
        if self.total is None and rows_are_kept(self.rows, x.shape[1]):
            self.kept.append(x.to("cpu", self.dtype, copy=True))
            return
        if self.total is None:
            self.total = torch.zeros(x.shape[1], x.shape[1], dtype=self.dtype)
        for part in (*self.kept, x.cpu()):
            cov_accumulate(self.total, part, precision="float64" if self.dtype == torch.float64 else "float32")
        self.kept = []

    def finish(self) -> Moments:
        """What was seen; the accumulator is empty afterwards."""
        assert self.sum is not None
        mean = (self.sum / max(1, self.rows)).float()
        samples = torch.cat(self.kept) if self.total is None else None
        triangle = pack(self.total) if self.total is not None else None
        self.kept, self.total = [], None
        return Moments(rows=self.rows, mean=mean, samples=samples, triangle=triangle)
