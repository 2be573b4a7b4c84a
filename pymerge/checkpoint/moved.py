"""A tensor with the entries of some axes in another order, put there as its bytes are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.header import ITEMSIZE, TORCH_NAME, safe_name

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.checkpoint.read import AnyTensor

SCRATCH = 1 << 20  # bytes of rows whose entries are put in order at a time: they stay in the processor's cache
NARROW = 512  # bytes of a row below which reading all rows is cheaper than reading one by one


class MovedTensor:
    """Looks like `source`, with entry i of an axis being entry index[i] of the source's.

    Memory   of a read: SCRATCH, or one row if that is more; all rows if they are narrow and move
    Cost     a read for each run of rows that lie together in the source; one gather for each other axis that moves

    moves    axis -> int64 [size of the axis], a permutation"""

    __slots__ = ("_inner", "_order", "_row", "_rows", "_source", "dtype", "file", "name", "nbytes", "offset", "shape")

    def __init__(self, name: str, source: AnyTensor, moves: Mapping[int, Tensor]) -> None:
        self.name, self._source = name, source
        self.dtype, self.shape, self.nbytes, self.offset = source.dtype, source.shape, source.nbytes, source.offset
        self.file: Path | None = source.file
        # The tensor is taken as rows [rows, *row]: axis 0 where that moves, else all axes in front of those that do.
        lead = 1 if 0 in moves else min(moves, default=len(self.shape))
        self._rows, self._row = math.prod(self.shape[:lead]), self.shape[lead:]
        self._order = moves[0].numpy() if 0 in moves else None
        self._inner = {axis - lead + 1: index.numpy() for axis, index in sorted(moves.items()) if axis > 0}

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view) of the tensor."""
        view, end = view.cast("B"), start + view.nbytes
        if start < 0 or end > self.nbytes:
            raise ValueError(f"{self.name}: bytes {start}..{end} asked for, the tensor has {self.nbytes}")
        if start == end:
            return
        width = self.nbytes // self._rows
        first, last = start // width, -(-end // width)
        step = max(1, SCRATCH // width) if self._inner and not self._narrow else last - first
        for begin in range(first, last, step):
            stop = min(last, begin + step)
            low, high = max(start, begin * width), min(end, stop * width)
            part = view[low - start : high - start]
            if high - low == (stop - begin) * width:
                self._fill(part, begin, stop)
            else:
                rows = memoryview(bytearray((stop - begin) * width))
                self._fill(rows, begin, stop)
                part[:] = rows[low - begin * width : high - begin * width]

    @property
    def _narrow(self) -> bool:
        return self._order is not None and self.nbytes // self._rows < NARROW

    def _fill(self, out: memoryview, begin: int, stop: int) -> None:
        """Rows begin .. stop in the new order."""
        import numpy as np

        if not self._inner:
            self._gather(out, begin, stop)
            return
        raw = np.empty(out.nbytes, np.uint8)
        self._gather(raw.data, begin, stop)
        *before, (axis, index) = self._inner.items()
        rows = self._entries(raw.data)
        for other, order in before:
            rows = np.take(rows, order, axis=other)
        np.take(rows, index, axis=axis, out=self._entries(out), mode="clip")  # other modes copy once more

    def _entries(self, rows: memoryview) -> Any:
        """Bytes of rows as integers of the entries' width [rows, *row]."""
        import numpy as np

        return np.frombuffer(rows, f"u{ITEMSIZE[self.dtype]}").reshape(-1, *self._row)

    def _gather(self, out: memoryview, begin: int, stop: int) -> None:
        """Rows begin .. stop, each with its entries as in the source, in the order of the source's bytes."""
        import numpy as np

        width = self.nbytes // self._rows
        if self._order is None:
            self._source.read_into(out, begin * width)
            return
        order = self._order[begin:stop]
        if self._narrow:
            raw = np.empty((self._rows, width), np.uint8)
            self._source.read_into(raw.reshape(-1).data)
            np.take(raw, order, axis=0, out=np.frombuffer(out, np.uint8).reshape(-1, width), mode="clip")
            return
        places = np.argsort(order)  # where the rows go, in the source's order
        rows = order[places]
        together = (np.diff(rows) == 1) & (np.diff(places) == 1)
        edges = np.flatnonzero(np.concatenate([[True], ~together, [True]]))
        for edge, after in zip(edges.tolist(), edges[1:].tolist(), strict=False):
            at = int(places[edge]) * width
            self._source.read_into(out[at : at + (after - edge) * width], int(rows[edge]) * width)

    def load(self) -> Tensor:
        """The whole tensor, as stored, in memory of its own."""
        import torch

        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        self.read_into(flat.numpy().data)
        return flat.view(getattr(torch, TORCH_NAME[self.dtype])).reshape(self.shape)

    def __repr__(self) -> str:
        return f"MovedTensor({safe_name(self.name)}, {self.dtype}, {list(self.shape)})"
