"""A tensor of a checkpoint with the entries of some axes in another order, put there as its bytes are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.checkpoint.header import ITEMSIZE, TORCH_NAME, safe_name

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.checkpoint.read import AnyTensor

WHOLE = 4 << 20  # bytes: a smaller tensor is read as one, of larger ones the rows that are asked for


class MovedTensor:
    """Looks like `source`, with entry i of an axis being entry index[i] of the source's.

    moves   axis -> int64 [size of the axis]"""

    __slots__ = ("_moves", "_source", "dtype", "file", "name", "nbytes", "offset", "shape")

    def __init__(self, name: str, source: AnyTensor, moves: Mapping[int, Tensor]) -> None:
        self.name, self._source, self._moves = name, source, dict(moves)
        self.dtype, self.shape, self.nbytes, self.offset = source.dtype, source.shape, source.nbytes, source.offset
        self.file: Path | None = source.file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view) of the tensor.

        Cost     one read a run of rows that lie together in the source, and one copy of the rows that are touched"""
        import torch

        if start < 0 or start + view.nbytes > self.nbytes:
            raise ValueError(
                f"{self.name}: bytes {start}..{start + view.nbytes} asked for, the tensor has {self.nbytes}"
            )
        if view.nbytes == 0:
            return
        row_bytes = self.nbytes // self.shape[0]
        first, last = start // row_bytes, -(-(start + view.nbytes) // row_bytes)
        if self.nbytes <= WHOLE:
            first, last = 0, self.shape[0]
        rows = self._rows(first, last).contiguous().reshape(-1).view(torch.uint8)
        at = start - first * row_bytes
        torch.frombuffer(view, dtype=torch.uint8).copy_(rows[at : at + view.nbytes])

    def _rows(self, first: int, last: int) -> Tensor:
        """Rows first .. last in the new order, as integers of the entries' width."""
        import torch

        wanted = self._moves.get(0, torch.arange(self.shape[0]))[first:last]
        row_bytes = self.nbytes // self.shape[0]
        raw = torch.empty((len(wanted), row_bytes), dtype=torch.uint8)
        whole = self.nbytes <= WHOLE
        if whole:
            self._source.read_into(raw.numpy().reshape(-1).data)
        else:
            breaks = ((wanted[1:] - wanted[:-1]) != 1).nonzero().flatten() + 1
            edges = [0, *breaks.tolist(), len(wanted)]
            for begin, end in zip(edges, edges[1:], strict=False):
                self._source.read_into(raw[begin:end].numpy().reshape(-1).data, int(wanted[begin]) * row_bytes)
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ITEMSIZE[self.dtype]]
        rows = raw.reshape(-1).view(width).reshape(len(wanted), *self.shape[1:])
        for axis, index in self._moves.items():
            if axis > 0 or whole:
                rows = rows.index_select(axis, index)
        return rows

    def load(self) -> Tensor:
        """The whole tensor, as stored, in memory of its own."""
        import torch

        return self._rows(0, self.shape[0]).contiguous().view(getattr(torch, TORCH_NAME[self.dtype]))

    def __repr__(self) -> str:
        return f"MovedTensor({safe_name(self.name)}, {self.dtype}, {list(self.shape)})"
