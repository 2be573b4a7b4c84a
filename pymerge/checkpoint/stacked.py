"""Tensors of one checkpoint as another stores them: several as one, a part of one, matrices the other way round.

Each looks like a LazyTensor and reads the bytes that are asked for from where they are; nothing is kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.byte_tensor import ByteTensor
from pymerge.checkpoint.header import ITEMSIZE, safe_name

if TYPE_CHECKING:
    from pymerge.checkpoint.read import AnyTensor

SCRATCH = 8 << 20  # bytes that are turned at a time
TOGETHER = 16  # rows that are turned at once: as many as the processor's cache holds a line of
SPARSE = 4  # columns to one that is wanted, up to which a matrix is read whole


class View(ByteTensor):
    """What the views have in common: a place in the order of reading, whole tensors, checked ranges."""

    __slots__ = ("dtype", "name", "nbytes", "offset", "shape", "stored")
    file: Path | None = None

    def __init__(self, name: str, like: AnyTensor, shape: Sequence[int]) -> None:
        self.name, self.shape, self.offset = name, tuple(shape), 0
        self.dtype, self.stored = like.dtype, like.stored
        self.nbytes = self.numel * ITEMSIZE[self.dtype]

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view) of the tensor, which are whole entries."""
        width = ITEMSIZE[self.dtype]
        if start < 0 or start + view.nbytes > self.nbytes or start % width or view.nbytes % width:
            raise ValueError(f"{self.name}: bytes {start}..{start + view.nbytes} are not entries of it")
        if view.nbytes:
            self._fill(view.cast("B"), start)

    def _fill(self, view: memoryview, start: int) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({safe_name(self.name)}, {self.dtype}, {list(self.shape)})"


class StackedTensor(View):
    """Tensors of one dtype, one behind the other, as one of `shape`."""

    __slots__ = ("_ends", "_parts")

    def __init__(self, name: str, parts: Sequence[AnyTensor], shape: Sequence[int]) -> None:
        super().__init__(name, parts[0], shape)
        self._parts, self._ends = tuple(parts), list(accumulate(part.nbytes for part in parts))
        if self._ends[-1] != self.nbytes or any(part.dtype != self.dtype for part in parts):
            raise ValueError(f"{name}: {len(parts)} tensors are not {self.dtype} {list(shape)}")

    def _fill(self, view: memoryview, start: int) -> None:
        place = bisect_right(self._ends, start)
        while view.nbytes:
            part, end = self._parts[place], self._ends[place]
            within = start - (end - part.nbytes)
            here = min(view.nbytes, end - start)
            part.read_into(view[:here], within)
            view, start, place = view[here:], start + here, place + 1


class PartTensor(View):
    """The entries of a tensor from `first` on, as one of `shape`."""

    __slots__ = ("_begin", "_source")

    def __init__(self, name: str, source: AnyTensor, first: int, shape: Sequence[int]) -> None:
        super().__init__(name, source, shape)
        self._source, self._begin = source, first * ITEMSIZE[self.dtype]
        if first < 0 or self._begin + self.nbytes > source.nbytes:
            raise ValueError(f"{name}: {list(shape)} from entry {first} on is not in {list(source.shape)}")

    def _fill(self, view: memoryview, start: int) -> None:
        self._source.read_into(view, self._begin + start)


class TurnedTensor(View):
    """A tensor [..., m, n] as [..., n, m].

    Memory  SPARSE times SCRATCH, or a row if that is more
    Cost    of SCRATCH bytes: one read for each row of the source's matrix, or SPARSE times as many bytes in one"""

    __slots__ = ("_source",)

    def __init__(self, source: AnyTensor) -> None:
        super().__init__(source.name, source, (*source.shape[:-2], *source.shape[:-3:-1]))
        self._source = source

    def _fill(self, view: memoryview, start: int) -> None:
        import numpy as np

        width, (rows, columns) = ITEMSIZE[self.dtype], self.shape[-2:]
        first, last = start // width, (start + view.nbytes) // width
        out = np.frombuffer(view, f"u{width}")
        row, step = first // columns, max(1, SCRATCH // (columns * width))
        while row * columns < last:
            matrix, within = divmod(row, rows)
            count = min(step, rows - within, -(-last // columns) - row)
            begin, end = max(first, row * columns), min(last, (row + count) * columns)
            block = self._rows(matrix, within, count)
            out[begin - first : end - first] = block[begin - row * columns : end - row * columns]
            row += count

    def _rows(self, matrix: int, first: int, count: int) -> Any:
        """The entries of `count` rows of a matrix [rows, columns]: columns of the source's [columns, rows]."""
        import numpy as np

        width, (rows, columns) = ITEMSIZE[self.dtype], self.shape[-2:]
        whole = SPARSE * count >= rows  # a read costs as much as some entries
        taken, start = rows if whole else count, matrix * rows * columns * width
        raw = np.empty(columns * taken * width, np.uint8)
        if whole:
            self._source.read_into(raw.data, start)
        else:
            for i, row in enumerate(raw.reshape(columns, -1)):
                self._source.read_into(row.data, start + (i * rows + first) * width)
        found = raw.view(f"u{width}").reshape(columns, taken)
        found = found[:, first : first + count] if whole else found
        turned = np.empty((count, columns), found.dtype)
        for i in range(0, columns, TOGETHER):
            turned[:, i : i + TOGETHER] = found[i : i + TOGETHER].T
        return turned.reshape(-1)
