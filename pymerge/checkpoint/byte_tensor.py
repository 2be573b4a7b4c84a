"""What all tensors that are read by ranges of bytes have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pymerge.checkpoint.header import TORCH_NAME

if TYPE_CHECKING:
    from torch import Tensor


class ByteTensor:
    """dtype (safetensors code), shape, nbytes and `read_into` are the subclass's."""

    __slots__ = ()
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view) of the tensor."""
        raise NotImplementedError

    def load(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        import torch

        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        self.read_into(flat.numpy().data)
        return flat.view(getattr(torch, TORCH_NAME[self.dtype])).reshape(self.shape)
