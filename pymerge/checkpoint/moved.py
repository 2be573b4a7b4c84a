"""A tensor with the entries of some axes in another order, or some of its rows, put there as its bytes are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import _C
from pymerge.checkpoint.byte_tensor import ByteTensor
from pymerge.checkpoint.header import ITEMSIZE, safe_name

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.checkpoint.read import AnyTensor

SCRATCH = 256 << 10  # bytes of rows that are put in order at a time: they stay in the processor's cache
SPARSE = 4  # rows to one that is wanted, from which those in between are skipped: a read costs as much as some rows


class MovedTensor(ByteTensor):
    """Looks like `source`, with entry i of an axis being entry index[i] of the source's.

    Memory   of a read: some times SCRATCH, or some rows if that is more
    Cost     rows are read in the source's order, at most SPARSE times as many as are asked for; one gather an axis

    moves    axis -> int64 [size of the axis], a permutation; of axis 0 any rows, any number of them"""

    __slots__ = ("_inner", "_order", "_row", "_rows", "_source", "dtype", "file", "name", "nbytes", "offset", "shape")

    def __init__(self, name: str, source: AnyTensor, moves: Mapping[int, Tensor]) -> None:
        self.name, self._source = name, source
        self.dtype, self.offset = source.dtype, source.offset
        self.shape = (len(moves[0]), *source.shape[1:]) if 0 in moves else source.shape
        self.nbytes = math.prod(self.shape) * ITEMSIZE[self.dtype]
        self.file: Path | None = source.file
        # The tensor is taken as rows [rows, *row]: axis 0 where that moves, else all axes in front of those that do.
        lead = 1 if 0 in moves else min(moves, default=0)
        self._rows, self._row = math.prod(self.shape[:lead]), self.shape[lead:]
        self._order = moves[0].numpy() if 0 in moves else None
        self._inner: dict[int, Any] = {
            axis - lead + 1: index.numpy() for axis, index in sorted(moves.items()) if axis > 0
        }

    @property
    def stored(self) -> str:
        """The dtype that a merge is rounded to."""
        return self._source.stored

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view) of the tensor."""
        view, end = view.cast("B"), start + view.nbytes
        if start < 0 or end > self.nbytes:
            raise ValueError(f"{self.name}: bytes {start}..{end} asked for, the tensor has {self.nbytes}")
        if self._order is None and not self._inner:
            self._source.read_into(view, start)
            return
        width = self.nbytes // max(1, self._rows)
        while start < end:
            row, within = divmod(start, width)
            count = (end - start) // width if within == 0 else 0
            if count:
                self._fill(view[: count * width], row, row + count)
                done = count * width
            else:  # the range begins or ends within a row
                whole = memoryview(bytearray(width))
                self._fill(whole, row, row + 1)
                done = min(end - start, width - within)
                view[:done] = whole[within : within + done]
            view, start = view[done:], start + done

    def _fill(self, out: memoryview, begin: int, stop: int) -> None:
        """Rows begin .. stop in the new order."""
        import numpy as np

        width = out.nbytes // (stop - begin)
        wanted = np.arange(begin, stop) if self._order is None else self._order[begin:stop]
        places = np.argsort(wanted, kind="stable")  # where the rows go, in the source's order
        *others, last = self._inner or (None,)
        columns = self._inner[last].data if last is not None else None
        unit = math.prod(self._row[last or 0 :]) * ITEMSIZE[self.dtype]
        step = max(1, min(SCRATCH // width, stop - begin))
        scratch = np.empty(SPARSE * step * width, np.uint8).data
        for first in range(0, stop - begin, step):
            here = places[first : first + step]
            raw, rows = self._read(wanted[here], width, scratch)
            for axis in others:
                raw = np.take(self._entries(raw), self._inner[axis], axis=axis).reshape(-1).view(np.uint8).data
            _C.gather_rows(raw, out, width, rows.data, here.data, columns, unit)

    def _read(self, rows: Any, width: int, scratch: memoryview) -> tuple[memoryview, Any]:
        """Some rows of the source, ascending, and where they are in what was read: all between the first and the last
        where many are wanted, else runs."""
        import numpy as np

        low, span = int(rows[0]), int(rows[-1] - rows[0]) + 1
        if span <= SPARSE * len(rows):
            raw = scratch[: span * width]
            self._source.read_into(raw, low * width)
            return raw, rows - low
        raw = scratch[: len(rows) * width]
        edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for edge, after in zip(edges, edges[1:], strict=False):
            self._source.read_into(raw[edge * width : after * width], int(rows[edge]) * width)
        return raw, np.arange(len(rows))

    def _entries(self, rows: memoryview) -> Any:
        """Bytes of rows as integers of the entries' width [rows, *row]."""
        import numpy as np

        return np.frombuffer(rows, f"u{ITEMSIZE[self.dtype]}").reshape(-1, *self._row)

    def __repr__(self) -> str:
        return f"MovedTensor({safe_name(self.name)}, {self.dtype}, {list(self.shape)})"
