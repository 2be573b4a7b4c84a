"""A weight with a LoRA adapter on it, as one tensor that is computed where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.checkpoint.byte_tensor import ByteTensor
from pymerge.checkpoint.header import ITEMSIZE, TORCH_NAME, safe_name

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.checkpoint.read import AnyTensor

BLOCK = 1 << 18  # entries that are computed together, always the same ones: no bit depends on what is asked for


class AdaptedTensor(ByteTensor):
    """weight + scale * B A, in float32 (float64 where the weight is), not rounded to the dtype of the weight.

    weight      the base model's tensor [m, n]
    a, b        the adapter's [r, in] and [out, r]
    transposed  the weight is stored [in, out] (Conv1D, embeddings)

    Looks like a LazyTensor. Reading costs the weight and the factors, and 2 r flops an entry.
    """

    __slots__ = ("a", "b", "dtype", "name", "nbytes", "offset", "scale", "shape", "stored", "transposed", "weight")
    file: Path | None = None

    def __init__(
        self,
        weight: AnyTensor,
        a: AnyTensor,
        b: AnyTensor,
        scale: float,
        transposed: bool,
    ) -> None:
        self.weight, self.a, self.b, self.scale, self.transposed = weight, a, b, scale, transposed
        self.name, self.shape, self.offset = weight.name, weight.shape, 0
        self.dtype = "F64" if weight.dtype == "F64" else "F32"
        self.stored = weight.stored  # a merge is rounded to it at the end
        self.nbytes = self.numel * ITEMSIZE[self.dtype]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """left [m, r] and right [r, n] of self.dtype: the adapter adds left @ right, the scale is in left."""
        import torch

        dtype = getattr(torch, TORCH_NAME[self.dtype])
        a, b = self.a.load().to(dtype), self.b.load().to(dtype)
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return left.contiguous() * self.scale, right.contiguous()

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view) of the tensor, which are whole entries."""
        import torch

        width, columns = ITEMSIZE[self.dtype], self.shape[1]
        first, last = start // width, (start + view.nbytes) // width
        if start < 0 or start + view.nbytes > self.nbytes or start % width or view.nbytes % width:
            raise ValueError(f"{self.name}: bytes {start}..{start + view.nbytes} are not entries of it")
        if first == last:
            return
        out = torch.frombuffer(view, dtype=getattr(torch, TORCH_NAME[self.dtype]))
        left, right = self.factors()
        step = max(1, BLOCK // columns)
        for row in range(first // columns // step * step, -(-last // columns), step):
            rows = min(step, self.shape[0] - row)
            begin, end = max(first, row * columns), min(last, (row + rows) * columns)
            block = left[row : row + rows] @ right
            flat = block.view(-1)[begin - row * columns : end - row * columns]
            out[begin - first : end - first] = flat.add_(self._of_weight(begin, end - begin))

    def _of_weight(self, first: int, count: int) -> Tensor:
        import torch

        width = ITEMSIZE[self.weight.dtype]
        raw = torch.empty(count * width, dtype=torch.uint8)
        self.weight.read_into(raw.numpy().data, first * width)
        return raw.view(getattr(torch, TORCH_NAME[self.weight.dtype]))

    def __repr__(self) -> str:
        return f"AdaptedTensor({safe_name(self.name)}, {self.dtype}, {list(self.shape)}, rank {self.rank})"
