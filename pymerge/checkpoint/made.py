"""A tensor that is computed from one of a checkpoint's when its bytes are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.checkpoint.byte_tensor import ByteTensor

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.checkpoint.read import AnyTensor


class MadeTensor(ByteTensor):
    """Looks like a float32 tensor of the shape of `source`: what `make` returns for it. It is made as a whole when its
    first bytes are read, and let go when its last are.

    stored  as of `source`: a merge is rounded to it at the end"""

    __slots__ = ("_make", "_made", "_source", "dtype", "file", "name", "nbytes", "offset", "shape", "stored")

    def __init__(self, source: AnyTensor, make: Callable[[Tensor], Tensor]) -> None:
        self._source, self._make = source, make
        self._made: Tensor | None = None
        self.name, self.shape, self.dtype, self.offset = source.name, source.shape, "F32", source.offset
        self.nbytes = 4 * math.prod(self.shape)
        self.stored = source.stored
        self.file: Path | None = source.file

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view)."""
        import torch

        if self._made is None:
            self._made = self.load().contiguous().reshape(-1).view(torch.uint8)
        view[:] = self._made[start : start + view.nbytes].numpy().data
        if start + view.nbytes == self.nbytes:
            self._made = None

    def load(self) -> Tensor:
        """The whole tensor."""
        return self._make(self._source.load())
