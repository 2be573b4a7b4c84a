"""A tensor whose rows come from several tensors, gathered as its bytes are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.checkpoint.byte_tensor import ByteTensor
from pymerge.checkpoint.header import ITEMSIZE, TORCH_NAME, safe_name
from pymerge.checkpoint.moved import MovedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.checkpoint.read import AnyTensor

SCRATCH = 1 << 20  # bytes of rows that are put together at a time


class Rows(NamedTuple):
    """Rows of one source: its row index[i] goes to row places[i]. int64 [n], places ascending without repetition."""

    source: AnyTensor
    places: Any
    index: Any


class RowsTensor(ByteTensor):
    """Looks like `like` with `count` rows: row i is the mean of the rows that `parts` put there, zero where none does.
    `pad` rows behind these are the mean of all rows before them.

    Nothing is rounded: where rows are averaged, or sources differ in dtype, the dtype is F32 (F64 where a source is).
    Memory   of a read: some times SCRATCH, or some rows if that is more; the index arrays
    Cost     rows of each source are read in its order; the mean for `pad` rows takes one more pass, once

    stored   dtype of `like` in its file: a merge is rounded to it at the end"""

    __slots__ = (
        *("_count", "_mean", "_parts", "_shares", "_width", "dtype", "file", "name", "nbytes", "offset", "shape"),
        *("exact", "stored"),
    )

    def __init__(self, like: AnyTensor, parts: Sequence[Rows], count: int, pad: int = 0) -> None:
        import numpy as np
        import torch

        self._shares = np.zeros(count, np.int32)
        for part in parts:
            self._shares[part.places] += 1
        dtypes = {part.source.dtype for part in parts} | {like.dtype}
        self.exact = not pad and len(dtypes) == 1 and int(self._shares.max(initial=0)) <= 1
        self.dtype = like.dtype if self.exact else "F64" if "F64" in dtypes else "F32"
        self.stored = like.stored
        self.name, self.offset, self._count = like.name, like.offset, count
        self.shape = (count + pad, *like.shape[1:])
        self.nbytes = math.prod(self.shape) * ITEMSIZE[self.dtype]
        self.file: Path | None = like.file
        self._width = math.prod(self.shape[1:])  # entries of a row
        self._parts = [
            (part.places, MovedTensor(self.name, part.source, {0: torch.from_numpy(part.index)})) for part in parts
        ]
        self._mean: Tensor | None = None

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view) of the tensor."""
        import numpy as np

        view = view.cast("B")
        end, width = start + view.nbytes, self._width * ITEMSIZE[self.dtype]
        if start < 0 or end > self.nbytes:
            raise ValueError(f"{self.name}: bytes {start}..{end} asked for, the tensor has {self.nbytes}")
        if start == end:
            return
        for begin, stop in chunks(start // width, -(-end // width), width):
            made = self._made(begin, stop).reshape(-1).view(np.uint8)
            low, high = max(start, begin * width), min(end, stop * width)
            view[low - start : high - start] = made[low - begin * width : high - begin * width].data

    def _made(self, begin: int, stop: int) -> Any:
        """Rows begin .. stop as an array."""
        import torch

        if self.exact:
            return self._bytes(begin, stop)
        body = self._sum(begin, max(begin, min(stop, self._count)))
        if stop > self._count:
            if self._mean is None:
                self._mean = self._mean_row()
            body = torch.cat([body, self._mean.to(body.dtype).expand(stop - max(begin, self._count), -1)])
        return body.numpy()

    def _bytes(self, begin: int, stop: int) -> Any:
        """Rows of one dtype, each from one source, as bytes."""
        import numpy as np

        made = np.zeros((stop - begin, self._width * ITEMSIZE[self.dtype]), np.uint8)
        for places, raw, _ in self._pieces(begin, stop):
            made[places] = raw
        return made

    def _sum(self, begin: int, stop: int) -> Tensor:
        """Rows that are sums of any dtypes, divided by how many were summed."""
        import torch

        total = torch.zeros(stop - begin, self._width, dtype=getattr(torch, TORCH_NAME[self.dtype]))
        for places, raw, dtype in self._pieces(begin, stop):
            rows = torch.from_numpy(raw).view(getattr(torch, TORCH_NAME[dtype])).to(total.dtype)
            total.index_add_(0, torch.from_numpy(places), rows)
        shares = torch.from_numpy(self._shares[begin:stop]).clamp(min=1).to(total.dtype)
        return total.div_(shares[:, None])

    def _pieces(self, begin: int, stop: int) -> Iterator[tuple[Any, Any, str]]:
        """What each part puts into rows begin .. stop: places from `begin` on, rows as bytes [n, width], dtype."""
        import numpy as np

        for places, tensor in self._parts:
            low, high = (int(at) for at in np.searchsorted(places, (begin, stop)))
            if high > low:
                width = self._width * ITEMSIZE[tensor.dtype]
                raw = np.empty((high - low, width), np.uint8)
                tensor.read_into(raw.reshape(-1).data, low * width)
                yield places[low:high] - begin, raw, tensor.dtype

    def _mean_row(self) -> Tensor:
        import torch

        total = torch.zeros(self._width, dtype=torch.float64)
        for begin, stop in chunks(0, self._count, self._width * ITEMSIZE[self.dtype]):
            total += self._sum(begin, stop).double().sum(0)
        return total / self._count

    def __repr__(self) -> str:
        return f"RowsTensor({safe_name(self.name)}, {self.dtype}, {list(self.shape)})"


def chunks(begin: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, of SCRATCH bytes each, at fixed places: no bit depends on what is asked for."""
    step = max(1, SCRATCH // max(1, width))
    for at in range(begin // step * step, stop, step):
        yield max(begin, at), min(at + step, stop)
