"""What methods have in common whose coefficients come from inner products of the task tensors alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pymerge.methods.base import ElementWiseCombine, TaskGroup, TensorInfo
from pymerge.ops.delta_rule import DeltaRule

if TYPE_CHECKING:
    from torch import Tensor

Gram = Sequence[Sequence[float]]  # inner products [T][T] of the flattened task tensors, float64
Coefficients = Callable[[Gram], tuple[float, ...]]
Vectors = Literal["tensor", "rows", "columns"]

_PART = 1 << 16  # entries that are worked on at once (whole vectors): their temporaries stay in the cache


class GramCombine(ElementWiseCombine):
    """One coefficient a task from the T x T Gram matrix of the task tensors, then one weighted sum.

    A task tensor is one vector, and the merge a `DeltaRule` (two passes over the inputs, no torch); or each of its rows
    (along the last dimension) or columns (along the first) is a vector with coefficients of its own, on torch tensors,
    a few vectors at a time.
    """

    takes_selection = False  # the Gram matrix must be that of the purified task vectors

    @property
    def vectors(self) -> Vectors:
        """What is one vector."""
        return "tensor"

    def coefficients(self, tasks: int) -> Coefficients:
        """The function from the Gram matrix to the T coefficients."""
        raise NotImplementedError

    def row_coefficients(self, gram: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The same for many vectors at once: gram [T][T] and the T coefficients are float64 tensors of one shape."""
        raise NotImplementedError

    @property
    def element_wise(self) -> bool:
        return self.vectors == "tensor"

    @property
    def unit(self) -> Literal["tensor", "rows"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "rows" if self.vectors == "rows" else "tensor"

    def workspace(self, info: TensorInfo) -> int:
        if self.vectors == "tensor":
            return 0
        longest = info.shape[-1 if self.vectors == "rows" else 0] if info.shape else 1
        return min(info.numel, max(_PART, longest)) * (8 * info.tasks + 24)

    def rule(self, info: TensorInfo) -> DeltaRule:
        return DeltaRule(weights=(1.0,) * info.tasks, gram_weights=self.coefficients(info.tasks))

    def combine(self, group: TaskGroup) -> Tensor:
        if self.vectors == "tensor":
            return super().combine(group)
        import torch

        merged = torch.empty(group.tuned[0].shape, dtype=torch.float32, device=group.tuned[0].device)
        if not merged.numel():
            return merged
        base = None if group.base is None else self._matrix(group.base)
        tuned, out = [self._matrix(x) for x in group.tuned], self._matrix(merged)
        across = 0 if self.vectors == "rows" else 1
        step = max(1, _PART // out.shape[1 - across])
        for first in range(0, out.shape[across], step):
            place = across, first, min(step, out.shape[across] - first)
            part = replace(
                group,
                base=None if base is None else base.narrow(*place),
                tuned=tuple(x.narrow(*place) for x in tuned),
            )
            out.narrow(*place).copy_(self._of_vectors(part, 1 - across))
        return merged

    def _matrix(self, x: Tensor) -> Tensor:
        """x with its vectors as rows or columns; a view where x is contiguous."""
        shape = x.shape or (1,)
        return x.reshape(-1, shape[-1]) if self.vectors == "rows" else x.reshape(shape[0], -1)

    def _of_vectors(self, group: TaskGroup, dim: int) -> Tensor:
        """The merged update, float64, of vectors along dimension `dim`."""
        tasks = range(len(group.tuned))
        x = [group.delta(t).double() for t in tasks]
        pairs = {(s, t): (x[s] * x[t]).sum(dim) for t in tasks for s in range(t + 1)}
        weights = self.row_coefficients([[pairs[min(s, t), max(s, t)] for t in tasks] for s in tasks])
        update = weights[0].unsqueeze(dim) * x[0]
        for weight, one in zip(weights[1:], x[1:], strict=True):
            update.addcmul_(weight.unsqueeze(dim), one)
        return update


def norms(gram: Gram) -> list[float]:
    """Norm of each task tensor."""
    return [math.sqrt(max(0.0, gram[t][t])) for t in range(len(gram))]
